"""Commands about a model pair as such: keep what alignment changed in it, and score many adapters against it."""

from contextlib import suppress
from pathlib import Path

from repair.basis import BasisIdentity, BasisPack, BasisSettings
from repair.basis_writer import write_basis
from repair.checkpoint import Checkpoint
from repair.commands import Answer, Place, admitted
from repair.context import RepairContext
from repair.errors import BadParameters, OutputExists
from repair.measure_basis import left_out, measured_linears
from repair.report import adapter_digests, digests, environment
from repair.score import score_adapters


def make_basis(place: Place, out: Path, settings: BasisSettings) -> Answer:
    """A basis pack for the pair under ``out``; one that is there already is not made again."""
    aligned, base = _pair(place)
    inputs = {"aligned": digests(aligned), "base": digests(base)}
    identity = BasisIdentity(aligned=inputs["aligned"]["digest"], base=inputs["base"]["digest"], settings=settings)
    folder = identity.folder(out)
    known = folder.exists()
    if not known:
        context = _context(place)
        without, about = left_out(context), environment(place.device)
        with suppress(OutputExists):  # another process has made the same one meanwhile
            write_basis(identity, measured_linears(context, settings), folder, left_out=without, about=about)
    found = BasisPack.open(folder, aligned=identity.aligned, base=identity.base)
    modules = [
        {"name": name, "norm": entry["numbers"]["norm"], "kept": entry["kept"], "error": entry["numbers"]["error"]}
        for name, entry in sorted(found.header["modules"].items())
    ]
    output = {"path": str(folder), "digest": found.digest, "modules": len(modules), "cached": known}
    return Answer(document={"inputs": inputs, "outputs": {"basis": output}, "modules": modules})


def score(folders: list[Path], place: Place) -> Answer:
    """Safe LoRA's cosine of every module of every adapter; both models are read once for all."""
    names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise BadParameters("the same folder is named twice", field="adapters")
    aligned, base = _pair(place)
    adapters = {name: admitted(folder) for name, folder in zip(names, folders, strict=True)}
    inputs = {name: adapter_digests(folder) for name, folder in zip(names, folders, strict=True)}
    inputs |= {"aligned": digests(aligned), "base": digests(base)}
    scores = [one.as_dict() for one in score_adapters(adapters, _context(place))]
    return Answer(document={"inputs": inputs, "environment": environment(place.device), "modules": scores})


def _pair(place: Place) -> tuple[Path, Path]:
    if place.aligned is None or place.base is None:
        raise BadParameters("name both models: --aligned DIR --base DIR", field="aligned" if place.base else "base")
    return place.aligned, place.base


def _context(place: Place) -> RepairContext:
    aligned, base = _pair(place)
    return RepairContext(
        aligned=Checkpoint.open(aligned), base=Checkpoint.open(base), device=place.device, progress=place.progress
    )
