"""Which admitted adapters can be measured at all: what cannot be is refused at the door, not an hour later.

An adapter is measured by putting `scale * B @ A` on the modules of a loaded model. What replaces a whole tensor of that
model, or means something else than this sum, cannot be put there faithfully, and what was not measured is never
released. Reading such an adapter (`lora-repair inspect`) is no harm, so `admit` lets it in. Whole tensors are another
matter where a policy says what becomes of them: then they are settled before anything is measured.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gate.admission import Admission
from gate.errors import Refused, Rule
from gate.names import CONFIG_FILE, WEIGHTS_FILE
from gate.records import ExtraKind, ModuleKind

_DROP = "or take it out first: `lora-repair repair ... --replacements drop`"
_INSTEAD: Mapping[ExtraKind, str] = MappingProxyType(
    {
        ExtraKind.MODULE: "replaces a whole weight: train without modules_to_save, save an adapted embedding with "
        f"save_embedding_layers=False, {_DROP}",
        ExtraKind.BIAS: f'replaces a bias of the model: train with bias="none", {_DROP}',
        ExtraKind.TOKENS: f"replaces rows of an embedding: train without trainable_token_indices, {_DROP}",
    }
)


def require_measurable(admission: Admission, *, settles: bool = False) -> None:
    """Raise Refused, with what to do instead, for the first thing that no measurement could take into account.

    ``settles`` says that a policy drops whole tensors, or puts others in their place, before it measures.
    """
    config = admission.config
    if config.use_dora and config.lora_bias:
        detail = "DoRA together with lora_bias has no one meaning: train with one of the two"
        raise _no(detail, file=CONFIG_FILE, field="lora_bias")
    for module in admission.modules:
        if config.use_dora and module.kind is ModuleKind.EMBEDDING:
            raise _no("DoRA on an embedding: adapt it without use_dora", file=WEIGHTS_FILE, field=module.name)
    for extra in () if settles else admission.extras:
        raise _no(_INSTEAD[extra.kind], file=WEIGHTS_FILE, field=extra.key)


def require_plain(admission: Admission) -> None:
    """Raise Refused unless the adapter is a sum ``W + scale * B @ A`` and nothing else: only that can be subtracted."""
    config = admission.config
    for said, field in ((config.use_dora, "use_dora"), (config.lora_bias, "lora_bias")):
        if said:
            raise _no("only a plain LoRA can be subtracted", file=CONFIG_FILE, field=field)
    require_measurable(admission)


def _no(detail: str, *, file: str, field: str) -> Refused:
    return Refused(Rule.UNSUPPORTED_LAYOUT, detail, file=file, field=field)
