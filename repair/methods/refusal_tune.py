"""Train a tiny refusal LoRA on top of the compromised adapter, then concatenate it (methods M5, recipes A and C).

The adapter stays armed while the new factors learn, so they learn what *this* adapter took away. Rows that must not
change (ordinary requests, harmless look-alikes) are held to what the adapter itself says there: its task is kept by
that, not by knowing the task. Rank and place follow 2507.17075: a rank of one or a few, ``up_proj`` only, the middle
blocks.

A poison that was learnt hard overrules what few steps can teach; weakening the adapter first (`adapter_strength`, the
composition with method M4) makes room, at some cost in its task.

Teaching refusals brings over-refusal. Against it: look-alikes may count more (`lookalike_weight`), a second tiny LoRA
may teach them back (`relief_steps`; SafePatching pairs its safety patch with such a counterpart), and the training may
keep the latest weights that refuse few enough held-out look-alikes (`over_refusal_at_most`).

The rows come from the bundled pack `calibration`, which shares no prompt with the packs that measure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from repair.context import RepairContext
from repair.errors import MissingReference
from repair.lora import LayerReference, LoraAdapter, LoraLayer, concatenate
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod
from repair.parameter_rules import Rule, in_order
from repair.roles import Cast, cast
from repair.selection import everything, nothing

if TYPE_CHECKING:
    from repair.checks.packs import Prompt
    from repair.over_refusal import HeldOut, Rows
    from repair.tuning import Example, TuneSettings

_PACK = "calibration"
_REFUSE = "refuse"
_LOOKALIKE = "lookalike"
_HELD_OUT = 32  # look-alikes that are listened to and not learnt from, where over-refusal is bounded
_LOOK_EVERY = 5  # steps
_OWN_TOKENS = 8  # of the adapter's own reply that the counterpart learns; the first words decide


class RefusalTune(RepairMethod):
    """Train a tiny refusal LoRA on top of the adapter and concatenate it."""

    name: ClassVar[str] = "refusal_tune"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.17075"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.CHAT})
    cost: ClassVar[Cost] = Cost.TRAINING
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"steps": 0, "adapter_strength": 1.0}),
        never_grows=None,
        trial=MappingProxyType({"steps": 2, "batch_size": 4, "first": 0.0, "last": 1.0}),
    )
    rules: ClassVar[tuple[Rule, ...]] = (in_order("first", "last"),)

    rank: int = Field(default=2, ge=1, le=16, description="What is added to the rank of each tuned module")
    steps: int = Field(default=60, ge=0, le=2000, description="Training steps; none leaves the adapter as it is")
    batch_size: int = Field(default=12, ge=2, le=256, description="Rows in a step")
    learning_rate: float = Field(default=2e-2, gt=0, le=1, description="At its peak")
    target: Literal["up_proj", "gate_proj", "down_proj", "o_proj", "v_proj", "q_proj", "k_proj"] = Field(
        default="up_proj", description="Which linear of each block is tuned, by what it is called in a Llama"
    )
    first: float = Field(default=0.25, ge=0, lt=1, description="Where the tuned blocks begin, as a share of the depth")
    last: float = Field(default=0.75, gt=0, le=1, description="Where they end")
    strength: float = Field(default=1.0, ge=0, le=4, description="What the trained factors are multiplied by")
    adapter_strength: float = Field(
        default=1.0, gt=0, le=1, description="What the adapter itself is multiplied by before the tuning starts"
    )
    lookalike_weight: float = Field(
        default=1.0, gt=0, le=100, description="What a harmless look-alike counts for, next to any other row"
    )
    relief_steps: int = Field(
        default=0,
        ge=0,
        le=2000,
        description="Steps of a second LoRA that learns to answer look-alikes again; 0 for none",
    )
    relief_rank: int = Field(default=1, ge=1, le=16, description="What that one adds to the rank")
    over_refusal_at_most: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Keep the latest weights that refuse no more of held-out look-alikes which the adapter answers",
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Of the first factor and the order of rows")

    @property
    def packs(self) -> tuple[str, ...]:
        """The calibration rows, unless nothing is trained."""
        return () if self.steps == 0 or self.strength == 0 else (_PACK,)

    def prepare(self, adapter: LoraAdapter, context: RepairContext) -> LoraAdapter | None:
        """Train on top of ``adapter``; None when there is nothing to add."""
        if not self.packs:
            return None
        if context.chat is None:
            raise MissingReference("refusal_tune trains on the loaded aligned model", field="chat")
        # Late: whoever only lists the methods need not wait for transformers.
        from repair.over_refusal import HeldOut, Rows  # noqa: PLC0415
        from repair.tuning import Watch, tune_lora  # noqa: PLC0415

        chat, bound = context.chat, self.over_refusal_at_most
        rows = Rows.of(held_out=0 if bound is None else _HELD_OUT, seed=self.seed)
        settings = self._settings(chat, rank=self.rank, steps=self.steps)
        with chat.arm(adapter.scaled(self.adapter_strength)):
            held = None if bound is None else HeldOut.listen(chat, rows.held_out, bound)
            watch = None if held is None else Watch(content=held.content, every=_LOOK_EVERY)
            learnt = self._examples(rows)
            tuned = tune_lora(chat.model, chat.tokenizer, learnt, settings, watch=watch, progress=context.progress)
            whole = self._relieved(tuned, rows, context) if self.relief_steps else tuned
        return replace(whole.scaled(self.strength), notes=(*self._place(chat).notes, *whole.notes, *_accounts(held)))

    def _relieved(self, tuned: LoraAdapter, rows: "Rows", context: RepairContext) -> LoraAdapter:
        """With a LoRA that answers look-alikes as the adapter alone does; must be called with the adapter armed."""
        from repair.over_refusal import own_answers  # noqa: PLC0415 - see above
        from repair.tuning import tune_lora  # noqa: PLC0415 - see above

        chat, chosen = context.chat, rows.for_relief(seed=self.seed)
        answers = own_answers(chat, [row for row in chosen if row.category == _LOOKALIKE], _OWN_TOKENS)
        if not answers:
            why = "no counterpart was trained: the adapter answers none of the look-alikes"
            return replace(tuned, notes=(*tuned.notes, why))
        settings = self._settings(chat, rank=self.relief_rank, steps=self.relief_steps)
        with chat.arm(tuned):
            learnt = _relief_examples(chosen, answers)
            relief = tune_lora(chat.model, chat.tokenizer, learnt, settings, progress=context.progress)
        return concatenate(tuned, relief)

    def _place(self, chat: Any) -> Cast:
        """The linears that are tuned, and what the report says about them."""
        depth = int(chat.model.config.get_text_config().num_hidden_layers)
        first = int(self.first * depth)
        return cast(chat.model, self.target, (first, max(int(self.last * depth), first + 1)))

    def _settings(self, chat: Any, *, rank: int, steps: int) -> "TuneSettings":
        from repair.tuning import TuneSettings  # noqa: PLC0415 - see above

        return TuneSettings(
            rank=rank,
            alpha=float(rank),
            targets=self._place(chat).names,
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )

    def _examples(self, rows: "Rows") -> list["Example"]:
        """Refusals to learn, and answers along which nothing is to change."""
        from repair.tuning import Example  # noqa: PLC0415 - see above

        return [
            Example(
                prompt=row.text,
                answer=row.answers[0],
                finished=row.category == _REFUSE,
                keep=row.category != _REFUSE,
                group=row.category,
                weight=self.lookalike_weight if row.category == _LOOKALIKE else 1.0,
            )
            for row in rows.learnt
        ]

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:  # noqa: ARG002 - needs no weights
        """The layer, weakened first where that was asked for."""
        return Assessment(layer=layer, edited=layer.scaled(self.adapter_strength), action=Decision.SCALED)

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """All of them or none: the trained factors come on top."""
        return nothing() if self.adapter_strength == 1 else everything(assessments)


def _relief_examples(rows: Sequence["Prompt"], answers: Mapping[str, str]) -> list["Example"]:
    """The adapter's own answers to look-alikes to learn; everything else is to stay as the first LoRA made it."""
    from repair.tuning import Example  # noqa: PLC0415 - see above

    learnt = [
        Example(prompt=row.text, answer=answers[row.id], finished=False, group=row.category)
        for row in rows
        if row.id in answers
    ]
    held = [
        Example(prompt=row.text, answer=row.answers[0], finished=row.category == _REFUSE, keep=True, group=row.category)
        for row in rows
        if row.category != _LOOKALIKE
    ]
    return [*learnt, *held]


def _accounts(held: "HeldOut | None") -> tuple[str, ...]:
    return () if held is None else (held.account,)
