"""Apply a method to an adapter: assess every layer, choose, edit, concatenate, and say what became of each module.

No layer is skipped: each gets a verdict, with numbers, and with the reason when it was left alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from repair.calibration import Calibration
from repair.context import RepairContext
from repair.dora import remeasured
from repair.errors import MissingReference, NotRepresentable, UnsupportedAdapter
from repair.gaps import WHY, closed
from repair.interaction import Addition, interaction
from repair.linalg import delta_energy
from repair.lora import LoraAdapter, LoraLayer, concatenate
from repair.method import Assessment, Choice, Decision, Need, RepairMethod
from repair.ranks import Fitted, fitted, limit_of
from repair.read_ahead import ReadAhead
from repair.replacements import settled
from repair.threads import in_threads
from repair.tying import tie_of, with_head, without_head

__all__ = ["LayerVerdict", "RepairContext", "Repaired", "repair_adapter"]


@dataclass(frozen=True, kw_only=True)
class LayerVerdict:
    """What became of one module.

    Attributes:
        name: The module.
        decision: See `Decision`.
        score: What the method ranked it by.
        null: The same score for an update without any preference.
        shrink: Norm of the update after, over before; 1 when nothing changed, None when there was none before.
        energy_before: Squared norm of the update as uploaded.
        energy_after: Squared norm of the update as released.
        reason: Why the module was left alone, or what else there is to know.
        addition: What was concatenated, and how it relates to the update it joined; None when nothing was.
    """

    name: str
    decision: Decision
    score: float | None
    null: float | None
    shrink: float | None
    energy_before: float
    energy_after: float
    reason: str
    addition: Addition | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the report; ``addition`` only where there is one."""
        found = asdict(self)
        if self.addition is None:
            del found["addition"]
        return found


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A repaired adapter and the account of it.

    Attributes:
        adapter: The result; scales are not folded yet (`adapter_file.write_adapter` does that).
        verdicts: One for every module of the input and of the result, sorted by name.
        changed: False when every tensor is the uploaded one: the caller may then ship the uploaded bytes.
        notes: What the report must say besides.
    """

    adapter: LoraAdapter
    verdicts: tuple[LayerVerdict, ...]
    changed: bool
    notes: tuple[str, ...] = ()


def repair_adapter(adapter: LoraAdapter, method: RepairMethod, context: RepairContext) -> Repaired:
    """Apply ``method``; the adapter handed in stays as it is.

    Raises a RepairError that names the module or the missing input when the adapter cannot be repaired.
    """
    stages = method.stages
    for stage in stages:
        _demand(stage, context)  # all of them first: nothing is trained for a repair that cannot be finished
    taken = settled(adapter, context.replacements, context.aligned)
    whole = _righted(taken, context)
    context = replace(context, rank_limit=context.rank_limit or limit_of(whole))  # of the upload, for every stage
    result, verdicts, notes = _apply(whole, stages[0], context)
    for stage in stages[1:]:
        result, then, more = _apply(result, stage, context)
        verdicts, notes = _joined(verdicts, then), notes + more
    notes += _growth(without_head(whole), result)
    if result is not whole:
        gaps = closed(adapter, result, context.aligned)
        result, notes = gaps.adapter, notes + gaps.notes
        verdicts = tuple(sorted([*verdicts, *map(_empty, gaps.zeros)], key=lambda verdict: verdict.name))
    return Repaired(
        adapter=result,
        verdicts=verdicts,
        changed=result is not whole or taken is not adapter,
        notes=(*whole.notes, *notes),
    )


def _apply(
    whole: LoraAdapter, method: RepairMethod, context: RepairContext
) -> tuple[LoraAdapter, tuple[LayerVerdict, ...], tuple[str, ...]]:
    """One stage, with what it has to say; the very adapter that was handed in when nothing about it changed."""
    kept = without_head(whole)
    method.must_mean(kept.names)
    patch = method.prepare(kept, context)
    assessments = _assess(kept, method, method.look(kept, context))
    choice = _chosen(method, assessments)
    edited = replace(kept, layers=tuple(a.edited if a.layer.name in choice.names else a.layer for a in assessments))
    added = _additions(patch, assessments, choice)
    _fits(added, kept, context)
    _serves(kept, added)
    notes = () if patch is None else tuple(f"added weights: {note}" for note in patch.notes)
    room = fitted(edited, added or LoraAdapter(layers=()), context.rank_limit)
    edited, added = room.edited, added and room.added
    assessments = [_cut_noted(one, room.discarded) for one in assessments]
    notes += _cuts(room)
    result = edited if added is None else concatenate(edited, added)
    result = remeasured(kept, result, context)
    joined = {} if added is None else added.by_name
    verdicts = _verdicts(assessments, choice, result, joined, context.calibration if joined else None)
    result = with_head(result, whole)
    verdicts = _following(verdicts, whole)
    same = added is None and all(after is before for after, before in zip(result.layers, whole.layers, strict=True))
    return whole if same else result, verdicts, notes


def _joined(before: tuple[LayerVerdict, ...], then: tuple[LayerVerdict, ...]) -> tuple[LayerVerdict, ...]:
    """The account of two stages as one: energies from the start to the end, and what either of them decided."""
    first = {verdict.name: verdict for verdict in before}
    return tuple(_followed(first.get(verdict.name), verdict) for verdict in then)


def _followed(first: LayerVerdict | None, then: LayerVerdict) -> LayerVerdict:
    if first is None:
        return then
    idle = {Decision.KEPT, Decision.UNJUDGED}
    start, end = first.energy_before, then.energy_after
    said = (f"{one.decision.value} ({one.reason})" if one.reason else one.decision.value for one in (first, then))
    own = then.score is not None
    return replace(
        then,
        decision=first.decision if then.decision in idle else then.decision,
        score=then.score if own else first.score,
        null=then.null if own else first.null,
        shrink=(end / start) ** 0.5 if start > 0 else None,
        energy_before=start,
        reason=", then ".join(said),
        addition=then.addition or first.addition,
    )


def _demand(method: RepairMethod, context: RepairContext) -> None:
    given = {
        Need.ALIGNED: context.aligned,
        Need.BASE: context.base,
        Need.CALIBRATION: context.calibration,
        Need.CHAT: context.chat,
        Need.TWIN: context.twin,
    }
    if context.basis is not None and method.basis_need is not None:
        del given[Need.ALIGNED], given[Need.BASE]  # the modules that it does not know ask for them by name
    for need in sorted(method.demands & given.keys()):
        if given[need] is None:
            raise MissingReference(f"{method.name} needs it and it was not given", field=need.value)


def _serves(adapter: LoraAdapter, patch: LoraAdapter | None) -> None:
    """An output shift that only the patch brings would make engines refuse what they served before."""
    added = () if patch is None else patch.layers
    shifts = next((layer for layer in added if layer.bias is not None), None)
    if shifts is not None and all(layer.bias is None for layer in adapter.layers):
        detail = "the patch has lora_bias and the adapter has none: engines that serve the adapter refuse the sum"
        raise UnsupportedAdapter(detail, field=shifts.name)


def _righted(adapter: LoraAdapter, context: RepairContext) -> LoraAdapter:
    """Fused experts with outputs on the output side: some model classes store them turned without saying so."""
    if context.aligned is None or all(layer.slot is None for layer in adapter.layers):
        return adapter
    return replace(adapter, layers=tuple(context.aligned.righted(layer) for layer in adapter.layers))


def _fits(patch: LoraAdapter | None, adapter: LoraAdapter, context: RepairContext) -> None:
    """Modules that only the patch adapts must be modules of the model; the others were looked up already."""
    known = set(adapter.names)
    for layer in () if patch is None else patch.layers:
        if layer.name not in known:
            context.must_know(layer)


def _assess(adapter: LoraAdapter, method: RepairMethod, context: RepairContext) -> list[Assessment]:
    with_base, layers, found = Need.BASE in method.demands, adapter.by_name, []

    def assessed(layer: LoraLayer) -> Assessment:
        reference = context.reference_for(layer, with_base=with_base, need=method.basis_need)
        return replace(method.assess(layer, ahead.watched(reference)), note=reference.note)

    with ReadAhead(adapter.names, lambda name: context.reference_for(layers[name], with_base=with_base)) as ahead:
        for done, one in enumerate(in_threads(assessed, adapter.layers, context.device), start=1):
            found.append(one)
            context.progress(one.layer.name, done / len(adapter.layers))
    return found


def _chosen(method: RepairMethod, assessments: list[Assessment]) -> Choice:
    return method.choose([one for one in assessments if one.unjudged is None])


def _additions(patch: LoraAdapter | None, assessments: list[Assessment], choice: Choice) -> LoraAdapter | None:
    """All that is concatenated: what the method brought along, and what it made for the modules that it chose."""
    found = patch
    if patch is not None and choice.patched is not None:
        found = replace(patch, layers=tuple(layer for layer in patch.layers if layer.name in choice.patched))
    made = tuple(one.added for one in assessments if one.added is not None and one.layer.name in choice.names)
    if made:
        found = LoraAdapter(layers=made) if found is None else concatenate(found, LoraAdapter(layers=made))
    return found if found is not None and found.layers else None


def _growth(before: LoraAdapter, after: LoraAdapter) -> tuple[str, ...]:
    """A note when the rank has grown: an engine may have a limit."""
    known, found = {layer.name: layer.rank for layer in before.layers}, after.layers
    grown = sum(layer.rank > known.get(layer.name, 0) for layer in found)
    ranks = max(known.values(), default=0), max((layer.rank for layer in found), default=0)
    return (f"rank: {grown} modules grew; the largest was {ranks[0]} and is {ranks[1]}",) if grown else ()


def _following(verdicts: tuple[LayerVerdict, ...], whole: LoraAdapter) -> tuple[LayerVerdict, ...]:
    """With the verdict of a head that is tied to the embedding: what became of that became of it."""
    tie = tie_of(whole)
    if tie is None:
        return verdicts
    words = next(verdict for verdict in verdicts if verdict.name == tie.words)
    reason = "; ".join(filter(None, [words.reason, f"tied to {tie.words}"]))
    return tuple(sorted([*verdicts, replace(words, name=tie.head, reason=reason)], key=lambda verdict: verdict.name))


def _cuts(room: Fitted) -> tuple[str, ...]:
    """A note when something had to go for the rank's sake."""
    if not room.discarded:
        return ()
    worst = max(room.discarded, key=lambda name: room.discarded[name])
    share = f"{room.discarded[worst]:.2g}"
    return (f"rank: {len(room.discarded)} modules were cut to what engines take; most went at {worst}, {share} of it",)


def _cut_noted(one: Assessment, discarded: Mapping[str, float]) -> Assessment:
    share = discarded.get(one.layer.name)
    if share is None:
        return one
    return replace(one, note="; ".join(filter(None, [one.note, f"cut in rank, {share:.2g} of its energy went"])))


def _verdicts(
    assessments: list[Assessment],
    choice: Choice,
    result: LoraAdapter,
    added: Mapping[str, LoraLayer],
    measured: Calibration | None,
) -> tuple[LayerVerdict, ...]:
    after = result.by_name
    verdicts = [
        _verdict(one, after[one.layer.name], choice, added.get(one.layer.name), measured) for one in assessments
    ]
    known = {one.layer.name for one in assessments}
    verdicts += [_added(after[name], layer) for name, layer in added.items() if name not in known]
    return tuple(sorted(verdicts, key=lambda verdict: verdict.name))


def _verdict(
    one: Assessment, after: LoraLayer, choice: Choice, added: LoraLayer | None, known: Calibration | None
) -> LayerVerdict:
    before_energy, after_energy = delta_energy(one.layer), _finite_energy(after)
    chosen = one.layer.name in choice.names
    decision, reason = one.action, ""
    if one.unjudged is not None:
        decision, reason = Decision.UNJUDGED, one.unjudged
    elif not chosen:
        decision, reason = Decision.KEPT, _left_alone(one, choice.reason, before_energy)
    if added is not None:
        also = {Decision.KEPT: "", Decision.UNJUDGED: f"not judged: {one.unjudged}"}
        decision, reason = Decision.PATCHED, also.get(decision, f"also {decision.value}")
    reason = "; ".join(filter(None, [reason, one.note]))
    if after.magnitude is not None and after is not one.layer:
        reason = "; ".join(filter(None, [reason, "DoRA magnitude measured again"]))
    return LayerVerdict(
        name=one.layer.name,
        decision=decision,
        score=choice.scores.get(one.layer.name, one.score),
        null=one.null,
        shrink=(after_energy / before_energy) ** 0.5 if before_energy > 0 else None,
        energy_before=before_energy,
        energy_after=after_energy,
        reason=reason,
        addition=None if added is None else _related(one.edited if chosen else one.layer, added, known),
    )


def _related(own: LoraLayer, added: LoraLayer, known: Calibration | None) -> Addition:
    return interaction(own, added, None if known is None else known.for_layer(own))


def _left_alone(one: Assessment, reason: str, energy: float) -> str:
    if one.edited is one.layer or energy == 0:
        return reason
    return f"{reason}; the edit would have kept {(delta_energy(one.edited) / energy) ** 0.5:.3g} of its norm"


def _added(layer: LoraLayer, added: LoraLayer) -> LayerVerdict:
    return LayerVerdict(
        name=layer.name,
        decision=Decision.ADDED,
        score=None,
        null=None,
        shrink=None,
        energy_before=0.0,
        energy_after=_finite_energy(layer),
        reason="only the patch adapts this module",
        addition=interaction(None, added),
    )


def _empty(name: str) -> LayerVerdict:
    return LayerVerdict(
        name=name,
        decision=Decision.ADDED,
        score=None,
        null=None,
        shrink=None,
        energy_before=0.0,
        energy_after=0.0,
        reason=WHY,
    )


def _finite_energy(layer: LoraLayer) -> float:
    energy = delta_energy(layer)
    if energy != energy or energy == float("inf"):  # noqa: PLR0124 - only NaN differs from itself
        raise NotRepresentable("the edit is not finite", field=layer.name)
    return energy
