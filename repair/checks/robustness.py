"""The robustness stage asks one arm harmful requests in other framings, and keeps rows, never texts.

A reply is judged against the request as its pack has it, however it was put: what matters is whether the reply gives
what was wanted. What it shows is worked out in `withstood.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repair.checks.backend import Backend, Reply
from repair.checks.errors import Cancelled
from repair.checks.evidence import Row
from repair.checks.frame import Frame
from repair.checks.framings import FRAMINGS, Framing
from repair.checks.judge import Exchange, Judge
from repair.checks.measurement import row_of
from repair.checks.packs import Prompt, ordered
from repair.checks.policy import Policy
from repair.checks.robustness_settings import FramingName
from repair.checks.run import never
from repair.checks.suite import Suite
from repair.context import Progress, silent
from repair.lora import LoraAdapter


@dataclass(frozen=True, kw_only=True)
class Framed:
    """What became of the requests in one framing.

    Attributes:
        name: Of the framing.
        rows: One for each reply; replies to one prompt stand side by side, as many to each.
        left_out: Prompts that do not fit the framing.
        skipped: Why it was not put at all; empty where it was.
    """

    name: FramingName
    rows: tuple[Row, ...] = ()
    left_out: int = 0
    skipped: str = ""

    def by_prompt(self) -> list[tuple[Row, ...]]:
        """The rows of each prompt."""
        keys = dict.fromkeys((row.pack, row.id) for row in self.rows)
        return [tuple(row for row in self.rows if (row.pack, row.id) == key) for key in keys]

    def as_dict(self) -> dict[str, Any]:
        """For the cache."""
        rows = [row.as_dict() for row in self.rows]
        return {"name": self.name, "rows": rows, "left_out": self.left_out, "skipped": self.skipped}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Framed":
        """What `as_dict` wrote."""
        return cls(**{**document, "rows": tuple(Row.of(one) for one in document["rows"])})


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one arm said in all framings of the policy, and what that took in positions."""

    framed: tuple[Framed, ...]
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For the cache."""
        return {"framed": [one.as_dict() for one in self.framed], "tokens": self.tokens}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Answers":
        """What `as_dict` wrote."""
        return cls(framed=tuple(Framed.of(one) for one in document["framed"]), tokens=document["tokens"])


def ask_framed(
    backend: Backend,
    adapter: LoraAdapter | None,
    policy: Policy,
    *,
    arm: str,
    judge: Judge,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> Answers:
    """Put the policy's framings to one arm, each on the same prompts of the certify half."""
    before, wanted = backend.tokens, policy.robustness.framings
    prompts = framed_prompts(policy)
    asking = _Asking(backend=backend, policy=policy, arm=arm, judge=judge, cancelled=cancelled)
    found = []
    with backend.arm(adapter):
        for done, name in enumerate(wanted):
            progress(f"{arm}: robustness: {name}", done / len(wanted))
            found.append(asking.put(FRAMINGS[name], prompts))
    return Answers(framed=tuple(found), tokens=backend.tokens - before)


def framed_prompts(policy: Policy) -> list[tuple[str, Prompt]]:
    """Harmful prompts of the certify half with their packs: the first of the recorded order over all packs together."""
    suite = Suite.of(policy, "certify")
    home = {id(prompt): pack for pack in suite.packs.harmful for prompt in suite.prompts.get(pack, ())}
    drawn = ordered(suite.of_kind("harmful"), seed=policy.suite.seed)[: policy.robustness.prompts]
    return [(home[id(prompt)], prompt) for prompt in drawn]


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """The arm that is on."""

    backend: Backend
    policy: Policy
    arm: str
    judge: Judge
    cancelled: Callable[[], bool]

    def put(self, framing: Framing, prompts: Sequence[tuple[str, Prompt]]) -> Framed:
        able = self.backend.capabilities()
        if why := "; ".join(able.missing[one] for one in framing.needs if not able.has(one)):
            return Framed(name=framing.name, skipped=why)
        put = [(pack, one, text) for pack, one in prompts if (text := framing.rewrite(one.text)) is not None]
        if not put:
            return Framed(name=framing.name, left_out=len(prompts), skipped="no prompt fits it")
        size = self.policy.suite.batch_size
        batches = (put[start : start + size] for start in range(0, len(put), size))
        rows = tuple(row for batch in batches for row in self._rows(framing, batch))
        return Framed(name=framing.name, rows=rows, left_out=len(prompts) - len(put))

    def _rows(self, framing: Framing, batch: Sequence[tuple[str, Prompt, str]]) -> Iterator[Row]:
        rounds = [self._round(frame, batch) for frame in framing.frames(self.policy.robustness, self.policy.suite.seed)]
        for replies in zip(*rounds, strict=True):
            yield from replies

    def _round(self, frame: Frame, batch: Sequence[tuple[str, Prompt, str]]) -> list[Row]:
        if self.cancelled():
            raise Cancelled
        suite = self.policy.suite
        replies: list[Reply] = self.backend.generate(
            [text for _, _, text in batch],
            max_new_tokens=suite.max_new_tokens,
            batch_size=suite.batch_size,
            frame=frame,
        )
        judged = self.judge.judge(
            [
                Exchange(prompt=one.text, reply=reply.text, harmful=True)
                for (_, one, _), reply in zip(batch, replies, strict=True)
            ]
        )
        return [
            row_of(self.arm, pack, one, reply, judgement)
            for (pack, one, _), reply, judgement in zip(batch, replies, judged, strict=True)
        ]
