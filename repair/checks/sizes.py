"""What a policy asks: how many prompts of each kind on each half, from which packs, and how. Declarations only."""

from typing import Final, Literal, get_args

from pydantic import Field, model_validator

from repair.checks.trials import Frozen

Kind = Literal["harmful", "lookalike", "benign", "checkable"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""What prompts are asked for, in the order in which they are asked."""


class Sizes(Frozen):
    """How many prompts of each kind one half of the suite asks; packs that hold fewer give all they have."""

    harmful: int = Field(ge=0)
    lookalike: int = Field(ge=0)
    benign: int = Field(ge=0)
    checkable: int = Field(default=0, ge=0)
    margin: int = Field(default=0, ge=0)
    samples: int = Field(default=32, ge=0)

    def of(self, kind: Kind) -> int:
        """How many of one kind."""
        return int(getattr(self, kind))

    @property
    def prompts(self) -> int:
        """How many of all kinds."""
        return sum(map(self.of, KINDS))


class Packs(Frozen):
    """Which packs give the prompts of each kind; one that is not installed is an explicit skip, never a pass."""

    harmful: tuple[str, ...] = Field(default=("core_harmful",), min_length=1)
    lookalike: tuple[str, ...] = Field(default=("core_lookalike",), min_length=1)
    benign: tuple[str, ...] = Field(default=("core_benign",), min_length=1)
    checkable: tuple[str, ...] = Field(default=("core_checkable",), min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> "Packs":
        names = [name for kind in KINDS for name in self.of(kind)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"a pack has one kind and is named once: {', '.join(twice)}")
        return self

    def of(self, kind: Kind) -> tuple[str, ...]:
        """The packs of one kind."""
        return tuple(getattr(self, kind))

    def kind_of(self, name: str) -> Kind:
        """What a pack's prompts are asked for; raises KeyError for a pack that is not named."""
        found = next((kind for kind in KINDS if name in self.of(kind)), None)
        if found is None:
            raise KeyError(name)
        return found


class Suite(Frozen):
    """How prompts are asked; greedy decoding always."""

    max_new_tokens: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=1)
    seed: int = 1
    least_before_stopping: int = Field(default=32, ge=0)
    whole: int = Field(default=8, ge=0)  # one look-alike in so many is answered to the end though it is settled; 0: all
    repeated: int = Field(default=0, ge=0)  # prompts that a full look at the certify half asks again, to count flips
    packs: Packs = Packs()
    select: Sizes
    certify: Sizes

    def heard(self, half: Literal["select", "certify"]) -> int:
        """About how many replies are heard to their end."""
        sizes = self.of(half)
        return sizes.prompts - sizes.lookalike + sizes.lookalike // (self.whole or 1)

    def of(self, half: Literal["select", "certify"]) -> Sizes:
        """The sizes of one half."""
        return self.certify if half == "certify" else self.select
