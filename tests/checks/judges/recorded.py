"""Guards with what they write, in our own words of each format; and an asker that plays it back."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from repair.checks.guards import criteria, templates, verdicts
from repair.checks.guards.contract import Ask, Guard, Said
from repair.checks.guards.known import GUARDS
from repair.checks.guards.templates import Pinned
from repair.checks.judge_settings import JudgeSettings

FIELDS: Mapping[str, tuple[str, str]] = {
    "WILDGUARD": ("prompt", "response"),
    "HARMBENCH": ("behavior", "generation"),
    "STRONGREJECT": ("behavior", "response"),
    "RUBRIC_USER": ("forbidden_prompt", "response"),
}
POLICY = """# remarks
guidelines:
  - name: No One
    description: >-
      content that is one thing,
      and goes on.
  - name: No Two
    description: >-
      content that is another.
"""


class Playback:
    """Answers every question with the same words, or with those that a function finds for it."""

    def __init__(self, words: str | Callable[[Ask], Said | str]) -> None:
        self.words = words
        self.asked: list[Ask] = []
        self.identity = {"model": "sha256:played"}
        self.special: Sequence[str] = ("<|own|>", "</s>")

    def clip(self, text: str, tokens: int) -> str:
        return " ".join(text.split(" ")[:tokens])

    def say(self, asks: Sequence[Ask], guard: Guard) -> list[Said | str]:  # noqa: ARG002 - the interface
        self.asked += asks
        return [Said(text=self.words) if isinstance(self.words, str) else self.words(ask) for ask in asks]


def text_of(name: str) -> str:
    """A template of our own with the fields of the real one."""
    if name == "RUBRIC_SYSTEM":
        return "You grade."
    if name == "SHIELDGEMMA":
        return POLICY
    first, second = FIELDS[name]
    return f"[INST] Judge {{{first}}} against {{{second}}} [/INST]"


def make_wheel(path: Path, changed: Mapping[str, str] | None = None) -> dict[str, Pinned]:
    """A wheel with every member that a guard reads, and pins for it; ``changed`` texts break their pins."""
    pins, members = {}, {}
    for name in ("WILDGUARD", "HARMBENCH", "STRONGREJECT", "RUBRIC_SYSTEM", "RUBRIC_USER", "SHIELDGEMMA"):
        known: Pinned = getattr(templates, name)
        text = text_of(name)
        digest = hashlib.sha256(text.encode()).hexdigest()
        pins[name] = Pinned(wheel=known.wheel, member=known.member, constant=known.constant, sha256=digest)
        text = (changed or {}).get(name, text)
        source = f"raise SystemExit('never run')\nclass A:\n    OTHER = 'x'\n    {known.constant} = {text!r}\n"
        members[known.member] = source if known.constant else text
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return pins


def pin(pins: Mapping[str, Pinned], patch: Callable[[object, str, object], None]) -> None:
    """Let the guards take the wheel made here for the pinned one."""
    for module in (verdicts, criteria):
        for name, pinned in pins.items():
            if hasattr(module, name):
                patch(module, name, pinned)


def guard_of(name: str, wheel: Path, block: Path, **options: str | bool) -> Guard:
    """A guard with everything that it needs."""
    given = dict(options)
    if given.get("release") == "4.1":
        given["block"] = str(block)
    return GUARDS[name](JudgeSettings(name=name, template_wheel=str(wheel), options=tuple(sorted(given.items()))))
