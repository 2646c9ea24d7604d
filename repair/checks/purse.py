"""What choosing has cost in forward tokens, and what it may still cost. Knows no candidates and no prompts."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class Purse:
    """The budget of one race.

    Attributes:
        limit: Forward tokens that choosing may cost.
        spent: What it has cost so far.
        share: Of the limit, what may be spent now; the rest is kept for what comes later.
        dearest: What the dearest single step has cost.
        dearest_prompt: What a prompt of the dearest look has cost.
    """

    limit: float
    spent: int = 0
    share: float = 1.0
    dearest: int = 0
    dearest_prompt: float = 0.0

    @property
    def broke(self) -> bool:
        """Whether another step like the dearest one so far would cost more than may be spent."""
        return self.spent + self.dearest > self.limit * self.share

    @property
    def used(self) -> float:
        """The share of the whole limit that is spent; 1 where there is nothing to spend."""
        return min(self.spent / self.limit, 1.0) if self.limit else 1.0

    def affords(self, prompts: int) -> bool:
        """Whether so many prompts fit into what may be spent, at the dearest price that a prompt has had."""
        return self.spent + self.dearest_prompt * prompts <= self.limit * self.share

    def pay(self, tokens: int, *, prompts: int = 0) -> None:
        """A step was taken; a look tells how many prompts it put."""
        self.spent += tokens
        self.dearest = max(self.dearest, tokens)
        if prompts:
            self.dearest_prompt = max(self.dearest_prompt, tokens / prompts)

    def exhausted(self) -> str:
        """Why nothing more was asked."""
        return f"the {self.limit * self.share:.0f} forward tokens that choosing may cost were spent"
