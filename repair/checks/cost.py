"""What a verdict took, in forward tokens: positions put through the model, counted and not timed, told apart.

The budget of a policy limits one part of it, `choosing`: that is what grows with the number of candidates. The other
parts are fixed by what was asked for: the aligned model once for a reference and a policy, the upload once, each look
at the certify half as often as the policy allows, training as often as a trial that trains is worth its minutes.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Forward tokens by what they were for. Training's backward passes are in none of them.

    Attributes:
        full_check: Of one full check of the aligned model on the certify half: the unit of the budget.
        aligned_certify: Of the aligned model on the certify half; measured once and remembered, so paid by the first
            job of a reference under a policy.
        aligned_select: The same on the select half; 0 where nothing had to be chosen.
        aligned_robustness: The same in the robustness stage; 0 where that was not run.
        upload: Of the upload on the certify half, what utility is measured against included.
        choosing: Of everything that chose among the candidates.
        choosing_limit: What choosing might take; 0 where nothing had to be chosen.
        building: Of making the candidates, where that takes the model.
        certifying: Of the looks at the certify half.
        spent: What this very run took: `in_all` without what was remembered. It depends on what ran before, so it is
            told in the provenance and not in the report, which equal inputs make equal.
    """

    full_check: int = 0
    aligned_certify: int = 0
    aligned_select: int = 0
    aligned_robustness: int = 0
    upload: int = 0
    choosing: int = 0
    choosing_limit: int = 0
    building: int = 0
    certifying: int = 0
    spent: int = 0

    @property
    def in_all(self) -> int:
        """Everything that the verdict rests on, whoever paid for it."""
        aligned = self.aligned_certify + self.aligned_select + self.aligned_robustness
        return aligned + self.upload + self.choosing + self.building + self.certifying

    def as_dict(self) -> dict[str, Any]:
        """For the report, with what choosing took in full checks."""
        ratio = self.choosing / self.full_check if self.full_check else None
        told = {name: value for name, value in vars(self).items() if name != "spent"}
        return {**told, "in_all": self.in_all, "choosing_in_full_checks": ratio}
