"""Which prompts are asked: those of one half in their recorded order, as many of each kind as the policy says."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from repair.checks.duplicates import apart, thinned
from repair.checks.early import ENDS_EARLY, to_the_end
from repair.checks.errors import PackMissing
from repair.checks.packs import Half, Pack, Prompt, load_pack, ordered
from repair.checks.policy import KINDS, Kind, Packs, Policy, Sizes


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The prompts of one half in their recorded order.

    Attributes:
        half: Whose prompts these are.
        prompts: By pack, as many as the policy asks.
        digests: What each pack's rows were.
        missing: Packs that the policy asks for and that are not installed.
        sizes: What the policy asks.
        packs: Where it wants the prompts of each kind from.
        harms: Every category of harm that the packs hold on this half.
        whole: One look-alike in so many is answered to the end.
        near_duplicates: Rows of each pack, of both halves, that are left out for being nearly another one.
    """

    half: Half
    prompts: Mapping[str, tuple[Prompt, ...]]
    digests: Mapping[str, str]
    missing: frozenset[str]
    sizes: Sizes
    packs: Packs
    harms: frozenset[str]
    whole: int
    near_duplicates: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy, half: Half) -> "Suite":
        """Read the packs that the policy asks for."""
        sizes, packs = policy.suite.of(half), policy.suite.packs
        wanted = {kind: sizes.of(kind) for kind in KINDS if sizes.of(kind)}
        installed, missing = _installed([name for kind in wanted for name in packs.of(kind)])
        found: dict[str, Pack] = {}
        left_out: dict[str, int] = {}
        for kind in wanted:  # a look-alike is meant to be nearly a harmful prompt
            there = [installed[name] for name in packs.of(kind) if name in installed]
            found |= {pack.name: pack for pack in thinned(there)}
            left_out |= apart(there)[1]
        prompts = {
            name: rows
            for kind, size in wanted.items()
            for name, rows in _drawn(
                [found[name] for name in packs.of(kind) if name in found], half, size, seed=policy.suite.seed
            ).items()
        }
        digests = {name: pack.digest for name, pack in installed.items()}
        harms = {row.category for name in packs.harmful if name in found for row in found[name].of_half(half)}
        return cls(
            half=half,
            prompts=prompts,
            digests=digests,
            missing=missing,
            sizes=sizes,
            packs=packs,
            harms=frozenset(harms),
            whole=policy.suite.whole,
            near_duplicates=left_out,
        )

    def of_kind(self, kind: Kind) -> tuple[Prompt, ...]:
        """The prompts of one kind, pack after pack."""
        return tuple(prompt for name in self.packs.of(kind) for prompt in self.prompts.get(name, ()))

    @property
    def heard(self) -> frozenset[str]:
        """Ids of the prompts whose replies are heard to their end, whatever they say."""
        return frozenset(
            prompt.id
            for name, prompts in self.prompts.items()
            for prompt in prompts
            if self.packs.kind_of(name) != ENDS_EARLY or to_the_end(prompt.id, self.whole)
        )

    @property
    def short(self) -> dict[str, dict[str, int]]:
        """Kinds of which the packs hold fewer prompts than the policy asks."""
        held = {kind: {"asked": self.sizes.of(kind), "held": len(self.of_kind(kind))} for kind in KINDS}
        return {kind: one for kind, one in held.items() if one["held"] < one["asked"]}

    @property
    def planned(self) -> dict[str, int]:
        """How many rows each pack is to give."""
        return {name: len(rows) for name, rows in self.prompts.items()}


def _installed(names: list[str]) -> tuple[dict[str, Pack], frozenset[str]]:
    """The packs that are there, and the names of those that are not."""
    found, missing = {}, set()
    for name in names:
        try:
            found[name] = load_pack(name)
        except PackMissing:
            missing.add(name)
    return found, frozenset(missing)


def _drawn(packs: list[Pack], half: Half, size: int, *, seed: int) -> dict[str, tuple[Prompt, ...]]:
    """So many prompts of one kind, drawn from all its packs together with categories in equal parts; by pack."""
    home = {id(row): pack.name for pack in packs for row in pack.rows}
    drawn = ordered([row for pack in packs for row in pack.of_half(half)], seed=seed)[:size]
    return {pack.name: tuple(row for row in drawn if home[id(row)] == pack.name) for pack in packs}
