"""Which prompts are asked: the packs of one half in their recorded order, as many as the policy says."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from repair.checks.duplicates import apart, thinned
from repair.checks.errors import PackMissing
from repair.checks.packs import Half, Prompt, load_pack, ordered
from repair.checks.policy import Policy, Sizes

PACKS: Mapping[str, str] = {
    "core_harmful": "harmful",
    "core_lookalike": "lookalike",
    "core_benign": "benign",
    "core_checkable": "checkable",
}
"""Each pack and the size in the policy that says how many of its rows are asked; asked in this order."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The prompts of one half in their recorded order.

    Attributes:
        half: Whose prompts these are.
        prompts: By pack, as many as the policy asks.
        digests: What each pack's rows were.
        missing: Packs that the policy asks for and that are not installed.
        sizes: What the policy asks.
        near_duplicates: Rows of each pack, of both halves, that are left out for being nearly another one.
    """

    half: Half
    prompts: Mapping[str, tuple[Prompt, ...]]
    digests: Mapping[str, str]
    missing: frozenset[str]
    sizes: Sizes
    near_duplicates: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy, half: Half) -> "Suite":
        """Read the packs that the policy asks for."""
        sizes = policy.suite.certify if half == "certify" else policy.suite.select
        prompts, digests, missing = {}, {}, set()
        left_out: dict[str, int] = {}
        for name, size in PACKS.items():
            wanted = int(getattr(sizes, size))
            if wanted == 0:
                continue
            try:
                pack = load_pack(name)
            except PackMissing:
                missing.add(name)
                continue
            digests[name] = pack.digest
            left_out |= apart([pack])[1]
            (thin,) = thinned([pack])
            prompts[name] = tuple(ordered(thin.of_half(half), seed=policy.suite.seed)[:wanted])
        return cls(
            half=half,
            prompts=prompts,
            digests=digests,
            missing=frozenset(missing),
            sizes=sizes,
            near_duplicates=left_out,
        )

    @property
    def planned(self) -> dict[str, int]:
        """How many rows each pack is to give."""
        return {name: len(rows) for name, rows in self.prompts.items()}
