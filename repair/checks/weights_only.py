"""What a candidate's weights alone tell, for its account: no forward pass, and nothing here decides.

Beside the energy that is left: agreement with what alignment changed (Safe LoRA's cosine ``rho`` of the candidate's own
update, next to ``rho_null`` of an update without preference), which a basis pack answers without reading a model, and
the first-order damage, which a calibration pack does. Both are means or sums over the modules that the pack knows.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Final

from repair.basis import BasisPack
from repair.calibration import Calibration
from repair.diagnostics.space import cosine_of
from repair.errors import RepairError
from repair.first_order import adapter_damage
from repair.lora import LoraAdapter

NO_BASIS: Final = (
    "rho and rho_null need a basis pack, or both models would be read for every candidate: `lora-repair reference "
    "prepare NAME` makes it for a reference of the service, `lora-repair basis` for --basis"
)
NO_CALIBRATION: Final = (
    "damage needs a calibration pack of the aligned model: `lora-repair reference prepare NAME` makes it for a "
    "reference of the service, `lora-repair calibrate` for --calibration"
)


@dataclass(frozen=True, kw_only=True)
class WeightsOnly:
    """Of one candidate as it was read back from its files.

    Attributes:
        rho: Mean over modules of the cosine between the update and its projection; None where it is not defined.
        rho_null: Mean over the same modules of that cosine for an update without preference.
        rho_modules: How many those are.
        damage: The predicted rise of the refusal loss, nats per token, to first order; None where it is not known.
        not_measured: Why a number is not there.
    """

    rho: float | None = None
    rho_null: float | None = None
    rho_modules: int = 0
    damage: float | None = None
    not_measured: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "not_measured": list(self.not_measured)}


def weights_only(adapter: LoraAdapter, basis: BasisPack | None, calibration: Calibration | None) -> WeightsOnly:
    """The numbers that the packs at hand allow. Raises ShapeMismatch where the calibration is of another model.

    A basis pack that does not fit is told and no error: a method that has to read it says so itself.
    """
    damage = adapter_damage(adapter, calibration)
    found, why = _cosines(adapter, basis)
    return WeightsOnly(
        rho=fmean(rho for rho, _ in found) if found else None,
        rho_null=fmean(null for _, null in found) if found else None,
        rho_modules=len(found),
        damage=damage,
        not_measured=tuple(reason for reason in (why, _no_damage(damage, calibration)) if reason),
    )


def _cosines(adapter: LoraAdapter, basis: BasisPack | None) -> tuple[list[tuple[float, float]], str]:
    """Of each module the pack knows; or why there are none."""
    if basis is None:
        return [], NO_BASIS
    try:
        found = list(_each_cosine(adapter, basis))
    except RepairError as error:
        return [], f"rho: {error}"
    return found, "" if found else "rho is defined in no module: the pack knows none of them, or nothing is added"


def _each_cosine(adapter: LoraAdapter, basis: BasisPack) -> Iterator[tuple[float, float]]:
    for layer in adapter.layers:
        known = basis.for_layer(layer)
        seen = known if isinstance(known, str) else cosine_of(layer, known)
        if not isinstance(seen, str):
            yield seen


def _no_damage(damage: float | None, calibration: Calibration | None) -> str:
    if damage is not None:
        return ""
    return NO_CALIBRATION if calibration is None else "damage is known for no module of the calibration pack"
