"""What can go wrong while measuring; a branch of the family in `repair/errors.py`.

RepairError
`-- CheckError
|-- PackMissing      no such prompt pack: the checks that need it are skipped, and say so
|-- PackChanged      the rows are not those that the manifest pins
|-- PackInvalid      a table of prompts cannot be read: names line and column
|-- NetworkOff       a pack would have to be fetched, and the operator has not allowed it
|-- PolicyInvalid    no such policy, or numbers that make none
|-- JudgeUnusable    no such judge, or its model or template cannot be used
|-- CalibrationInvalid  a judge's calibration cannot be read, or was made for another judge
|-- RowsInvalid      rows to judge, or labelled ones, of another shape
|-- CandidatesBroke  no candidate could be measured, and at least one broke by a fault of this program
|-- ArmUnsupported   an adapter holds something that cannot be applied faithfully
`-- Cancelled        the caller asked to stop
"""

from repair.errors import RepairError


class CheckError(RepairError):
    """A measurement could not be made."""

    rule = "check-failed"


class PackMissing(CheckError):
    """The prompt pack is not installed."""

    rule = "pack-missing"


class PackChanged(CheckError):
    """The rows of a prompt pack do not match its manifest."""

    rule = "pack-changed"


class PackInvalid(CheckError):
    """The table of prompts cannot be read."""

    rule = "pack-invalid"


class NetworkOff(CheckError):
    """Nothing is fetched unless the operator allows it."""

    rule = "network-off"


class PolicyInvalid(CheckError):
    """The policy cannot be read."""

    rule = "policy-invalid"


class JudgeUnusable(CheckError):
    """The judge cannot be used."""

    rule = "judge-unusable"


class CalibrationInvalid(CheckError):
    """The calibration does not belong to this judge."""

    rule = "calibration-invalid"


class RowsInvalid(CheckError):
    """The rows cannot be judged."""

    rule = "rows-invalid"


class CandidatesBroke(CheckError):
    """No candidate could be made."""

    rule = "candidates-broke"


class ArmUnsupported(CheckError):
    """The adapter cannot be applied to this model without changing its meaning."""

    rule = "arm-unsupported"


class Cancelled(CheckError):
    """The measurement was cancelled."""

    rule = "cancelled"
