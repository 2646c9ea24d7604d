"""What `python -m repair` does without measuring, and without the talking: plain arguments in, an `Answer` out.

Starts without transformers; what generates text is `measure.py`.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gate.admission import admit
from gate.measurable import require_plain
from gate.names import README_FILE
from repair.adapter_file import copy_adapter, read_adapter, write_adapter
from repair.basis import TOLERANCE, BasisPack
from repair.calibration import Calibration, CalibrationSettings, Identity, write_calibration
from repair.checkpoint import Checkpoint
from repair.checks.arms import torch_dtype_for
from repair.checks.packs import pack_digests
from repair.checks.policy import bundled_policies, load_policy
from repair.context import Progress, RepairContext
from repair.diagnostics.account import diagnose
from repair.errors import BadParameters, OutputExists
from repair.lora import LoraAdapter
from repair.method import Need, RepairMethod
from repair.methods import METHODS
from repair.report import adapter_digests, digests, environment, inspection, method_report, output_entry
from repair.run import repair_adapter
from repair.serving import serving, serving_report
from repair.treatment import Replacements

if TYPE_CHECKING:
    from repair.checks.chat import ChatModel


DIRECTIONS = 64  # of v, for thorough diagnostics without a basis pack: as many as a pack holds

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


class Exit(IntEnum):
    """How a command ends; a command of the user's shell can act on it."""

    OK = 0
    ERROR = 1
    REFUSED_BY_POLICY = 2
    INCONCLUSIVE = 3


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One JSON object, and how to leave."""

    document: Mapping[str, Any]
    code: Exit = Exit.OK


@dataclass(frozen=True, kw_only=True)
class Place:
    """The models beside an adapter, and where to compute."""

    aligned: Path | None = None
    base: Path | None = None
    calibration: Path | None = None
    patch: Path | None = None
    twin: Path | None = None
    basis: Path | None = None
    basis_tolerance: float = TOLERANCE
    device: torch.device
    progress: Progress

    def inputs(self, adapter: Path) -> dict[str, Any]:
        """Everything that went in, with digests."""
        models = {"aligned": self.aligned, "base": self.base}
        found = {"adapter": adapter_digests(adapter)}
        return found | {name: digests(path) for name, path in models.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How the result of one method is written.

    Attributes:
        replacements: What to do with tensors that replace something of the model as a whole.
        balanced: Both factors equally large.
        rank_limit: The largest rank; None for the step that the upload fits.
    """

    replacements: Replacements = field(default_factory=Replacements)
    balanced: bool = False
    rank_limit: int | None = None


def device_of(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda:N``; raises BadParameters, also for a device that this machine does not have."""
    if _DEVICE.fullmatch(name) is None:
        raise BadParameters(f"no such device: {name}; there are auto, cpu, cuda and cuda:N", field="device")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(name)
    if found.type == "cuda" and (found.index or 0) >= (there := torch.cuda.device_count()):
        raise BadParameters(f"{name} was asked for, this machine shows {there} CUDA devices", field="device")
    return found


def method_named(name: str, settings: Sequence[str]) -> RepairMethod:
    """A method out of ``--method`` and ``--set key=value``; values are JSON where they parse as such."""
    if name not in METHODS:
        raise BadParameters(f"no method is called {name}; there are: {', '.join(METHODS)}", field="method")
    parameters: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key or key in parameters:
            raise BadParameters(f"--set takes key=value, each key once: {setting!r}", field=f"{name}.{key}")
        parameters[key] = _value(text)
    return METHODS[name].parse(parameters)


def catalogue() -> Answer:
    """Methods with their parameters, bundled policies and suites: what the service offers."""
    policies = [load_policy(name) for name in bundled_policies()]
    document = {
        "methods": [method.catalogue_entry() for method in METHODS.values()],
        "policies": [policy.model_dump(mode="json") | {"digest": policy.digest} for policy in policies],
        "suites": [policy.suite.model_dump(mode="json") | {"name": policy.name} for policy in policies],
    }
    return Answer(document=document)


def inspect(adapter: Path) -> Answer:
    """What is inside; refuses what the gate refuses."""
    admission = admit(adapter)
    uploaded = read_adapter(adapter)
    found = inspection(uploaded, adapter)
    notes = sorted({*found["notes"], *admission.notes})
    served = [one.as_dict() for one in serving(uploaded)]
    return Answer(document=found | {"notes": notes, "needs": list(admission.needs), "serving": served})


def repair_by_method(
    adapter: Path, method: RepairMethod, place: Place, out: Path, how: Writing, *, thorough: bool = False
) -> Answer:
    """One method, one folder out; when nothing changed, the uploaded bytes.

    ``thorough`` diagnostics load the aligned model where it is named, and look for directions in the pair.
    """
    must_be_free(out)
    uploaded = admitted(adapter)
    inputs = place.inputs(adapter)
    context = _context(method, place, inputs, how)
    repaired = repair_adapter(uploaded, method, context)
    if thorough and place.aligned is not None and context.chat is None:
        context = replace(context, chat=chat_of(place))
    found = diagnose(uploaded, context, directions=DIRECTIONS if thorough else 0, weights=True if thorough else None)
    export = None
    if repaired.changed:
        export = write_adapter(repaired.adapter, out, balanced=how.balanced)
    else:
        copy_adapter(adapter, out)
    keep_readme(adapter, out)
    for stage in method.stages:
        inputs |= {name: adapter_digests(path) for name, path in stage if isinstance(path, Path)}
    inputs |= {f"pack/{name}": {"digest": digest} for name, digest in pack_digests(method.packs).items()}
    outputs = {"adapter": output_entry(out, export)}
    document = method_report(method, repaired, inputs=inputs, outputs=outputs, diagnostics=found, device=place.device)
    return Answer(document=document | {"serving": serving_report(uploaded, read_adapter(out))})


def admitted(directory: Path) -> LoraAdapter:
    """The adapter in a folder, after the gate has read every byte."""
    admit(directory)
    return read_adapter(directory)


def _context(method: RepairMethod, place: Place, inputs: dict[str, Any], how: Writing) -> RepairContext:
    return RepairContext(
        aligned=None if place.aligned is None else Checkpoint.open(place.aligned),
        base=None if place.base is None else Checkpoint.open(place.base),
        calibration=calibration_of(place, inputs),
        patch=patch_of(place, inputs),
        twin=twin_of(place, inputs),
        basis=basis_of(place, method, inputs),
        chat=chat_of(place) if Need.CHAT in method.demands else None,
        device=place.device,
        progress=place.progress,
        replacements=how.replacements,
        rank_limit=how.rank_limit,
    )


def aligned_of(place: Place) -> Path:
    """The aligned model's folder; raises BadParameters."""
    if place.aligned is None:
        raise BadParameters("name the folder of the aligned model: --aligned DIR", field="aligned")
    return place.aligned


def chat_of(place: Place) -> "ChatModel":
    """The aligned model, loaded."""
    from repair.checks.chat import ChatModel  # noqa: PLC0415 - transformers takes seconds to import

    return ChatModel.load(aligned_of(place), str(place.device))


def calibration_of(place: Place, inputs: dict[str, Any]) -> Calibration | None:
    """The calibration that was named, for this aligned model; it joins ``inputs``. Raises WrongReference."""
    if place.calibration is None:
        return None
    aligned_of(place)
    found = Calibration.open(place.calibration, aligned=inputs["aligned"]["digest"])
    inputs["calibration"] = {"path": place.calibration.name, "digest": found.digest}
    return found


def patch_of(place: Place, inputs: dict[str, Any]) -> LoraAdapter | None:
    """The refusal LoRA that was named; it joins ``inputs``."""
    if place.patch is None:
        return None
    inputs["patch"] = adapter_digests(place.patch)
    return admitted(place.patch)


def twin_of(place: Place, inputs: dict[str, Any]) -> LoraAdapter | None:
    """The harmful twin that was named; it joins ``inputs``. Raises Refused for anything but a plain LoRA."""
    if place.twin is None:
        return None
    inputs["twin"] = adapter_digests(place.twin)
    require_plain(admit(place.twin))
    return read_adapter(place.twin)


def basis_of(place: Place, method: RepairMethod, inputs: dict[str, Any]) -> BasisPack | None:
    """As `any_basis_of`, for one method. Raises BadParameters also when the method would not look at it."""
    if place.basis is not None and all(stage.basis_need is None for stage in method.stages):
        raise BadParameters(f"{method.name} with these parameters takes nothing from a basis pack", field="basis")
    return any_basis_of(place, inputs)


def any_basis_of(place: Place, inputs: dict[str, Any]) -> BasisPack | None:
    """The basis pack that was named, for the models that were; it joins ``inputs``.

    Raises WrongReference when it is for another pair, BadParameters when the tolerance is none.
    """
    if place.basis is None:
        return None
    if not 0 <= place.basis_tolerance <= 1:
        raise BadParameters("between 0 and 1", field="basis-tolerance")
    models = {name: inputs[name]["digest"] for name in ("aligned", "base") if name in inputs}
    found = BasisPack.open(place.basis, **models, tolerance=place.basis_tolerance)
    inputs["basis"] = {
        "path": place.basis.name,
        "digest": found.digest,
        "aligned": found.header["aligned"],
        "base": found.header["base"],
        "tolerance": place.basis_tolerance,
    }
    return found


def calibrate(place: Place, out: Path, settings: CalibrationSettings) -> Answer:
    """A calibration pack for the aligned model under ``out``; one that is there already is not made again."""
    from repair.calibrate import measure_modules  # noqa: PLC0415 - reads packs only when asked
    from repair.refusing import calibration_rows  # noqa: PLC0415 - as above

    aligned = digests(aligned_of(place))
    rows = calibration_rows(settings)
    dtype = str(torch_dtype_for(place.device)).removeprefix("torch.")
    identity = Identity(aligned=aligned["digest"], rows=rows.digest, dtype=dtype, settings=settings)
    folder = identity.folder(out)
    known = folder.exists()
    if not known:
        modules = measure_modules(chat_of(place), rows, settings, progress=place.progress)
        with suppress(OutputExists):  # another process has made the same one meanwhile
            write_calibration(identity, modules, folder, about=environment(place.device))
    found = Calibration.open(folder, aligned=aligned["digest"])
    output = {"path": str(folder), "digest": found.digest, "modules": len(found.names), "cached": known}
    return Answer(document={"inputs": {"aligned": aligned}, "outputs": {"calibration": output}})


def must_be_free(out: Path) -> None:
    """Say so before the work, not after it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExists(file=str(out))


def keep_readme(source: Path, out: Path) -> None:
    """Copy the uploader's README, where there is one."""
    if (source / README_FILE).is_file():
        shutil.copyfile(source / README_FILE, out / README_FILE)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
