"""The benchmarks run. What they measure is never asserted: a busy machine would fail us for its neighbours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[2]


def test_the_benchmarks_of_a_pair_run_and_say_where(tmp_path: Path) -> None:
    """Each part on a pair of a few hundred kilobytes; every result describes the machine and leaves no pair behind."""
    words = ["--shrink", "32", "--folder", str(tmp_path), "--out", str(tmp_path / "results")]
    subprocess.run([sys.executable, "-m", "bench.whole_adapter", *words], check=True, capture_output=True, cwd=ROOT)

    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(found) == {f"whole_adapter_{part}_smoke" for part in ("adapter", "basis", "many")}
    assert {path.name for path in tmp_path.iterdir()} == {"results"}
    for result in found.values():
        assert {"cpu", "cores", "load_before", "quiet", "torch"} <= set(result["machine"])
    weights = 64 * (64 + 16 + 16 + 64) + 3 * 256 * 64
    assert found["whole_adapter_adapter_smoke"]["bytes_needed"] == 2 * 2 * weights  # two models, two bytes each


def test_the_benchmark_of_a_block_runs(tmp_path: Path) -> None:
    """Both sides give one cosine for each of the seven linears; it fails by itself where they differ."""
    words = ["--shrink", "32", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "bench.block", *words], check=True, capture_output=True, cwd=ROOT)

    found = json.loads((tmp_path / "block_smoke.json").read_text())
    assert len(found["ours"]) == len(found["naive"]) == 7


def test_the_benchmark_of_the_curve_runs_and_draws(tmp_path: Path) -> None:
    """A point for each size, rank and number of candidates; a picture with three panels that is well-formed."""
    words = ["--shrink", "32", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-m", "bench.curve", *words], check=True, capture_output=True, cwd=ROOT)

    points = json.loads((tmp_path / "out" / "curve_smoke.json").read_text())["points"]
    wanted = {(0, 0), (4, 1), (16, 1), (64, 1), (16, 10), (16, 20), (16, 40)}
    assert {(one["rank"], one["candidates"]) for one in points} == wanted
    picture = ET.fromstring((tmp_path / "out" / "curve_smoke.svg").read_text())  # noqa: S314 - we wrote it
    texts = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"GB of weights, both models", "rank of the adapter", "candidates for one adapter"} <= set(texts)
    assert "nan" not in ET.tostring(picture, encoding="unicode")
