"""Line charts as SVG, by hand: a few panels side by side, numbers on straight axes that start at zero."""

from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 300, 56, 36, 52
COLOURS = ("#1f77b4", "#d95f02", "#2a9d52", "#7a4fb5")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; ``dashed`` for what is not measured but computed."""

    label: str
    points: list[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart."""

    title: str
    across: str
    up: str
    lines: list[Line]


def svg(panels: list[Panel]) -> str:
    """The panels from left to right."""
    parts = [_panel(panel, at * WIDTH) for at, panel in enumerate(panels)]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="#222">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def _panel(panel: Panel, left: float) -> str:
    right, bottom = left + WIDTH - 16, HEIGHT - BOTTOM
    most_x = _round_up(max(x for line in panel.lines for x, _ in line.points))
    most_y = _round_up(max(y for line in panel.lines for _, y in line.points))

    def place(x: float, y: float) -> tuple[float, float]:
        start = left + LEFT
        return start + (right - start) * x / most_x, bottom - (bottom - TOP) * y / most_y

    parts = [_text(left + WIDTH / 2, 18, panel.title, "middle", bold=True)]
    for step in range(6):
        x, y = place(most_x * step / 5, most_y * step / 5)
        parts.append(f'<path d="M{left + LEFT:.1f} {y:.1f}H{right:.1f}" stroke="#ddd"/>')
        parts.append(_text(left + LEFT - 6, y + 4, f"{most_y * step / 5:.3g}", "end"))
        parts.append(_text(x, bottom + 16, f"{most_x * step / 5:.3g}", "middle"))
    parts.append(_text((left + LEFT + right) / 2, bottom + 36, panel.across, "middle"))
    parts.append(_text(left + 6, TOP - 6, panel.up, "start"))
    for at, line in enumerate(panel.lines):
        colour, dash = COLOURS[at % len(COLOURS)], ' stroke-dasharray="5 4"' if line.dashed else ""
        spots = [place(x, y) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if not line.dashed:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        y = TOP + 14 + 15 * at
        parts.append(f'<path d="M{left + LEFT + 8} {y - 4}h18" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(_text(left + LEFT + 32, y, line.label, "start"))
    return "\n".join(parts)


def _text(x: float, y: float, words: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def _round_up(value: float) -> float:
    """The next number with one or two leading digits that divides well by five."""
    scale = 1.0
    while value > 10 * scale:
        scale *= 10
    while value <= scale:
        scale /= 10
    return next(step * scale for step in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0) if value <= step * scale)
