"""Everything the gate can say no to, as one exception with three coordinates: file, field, rule.

    Refused          the upload is malformed or hostile

A refusal is part of the API: `rule` is stable and meant for programs, `detail` is for people. All text that
comes from the upload is cleaned here, once: no control character, no page-long name reaches a log or terminal.
"""

from enum import StrEnum

LONGEST_NAME = 200
LONGEST_DETAIL = 500


class Rule(StrEnum):
    """Which rule of the gate was broken."""

    # --- files
    MISSING_FILE = "missing-file"
    """A file that every adapter has is not there."""
    UNEXPECTED_FILE = "unexpected-file"
    """The name is not on the list of files that an adapter may have."""
    NOT_A_REGULAR_FILE = "not-a-regular-file"
    """A link, folder, device or pipe stands where a file should."""
    FILE_TOO_LARGE = "file-too-large"
    """Larger than a file of this name may be."""
    PICKLE = "pickle"
    """Pickled Python objects, whatever the file is called: loading them runs their code."""

    # --- text and JSON
    NOT_UTF8 = "not-utf8"
    """Text that is not UTF-8."""
    NOT_JSON = "not-json"
    """Text that is not one JSON object."""
    DUPLICATE_KEY = "duplicate-key"
    """One JSON object has the same key twice; readers differ in which one they take."""
    TOO_DEEP = "too-deep"
    """JSON nested deeper than any real file."""
    TOO_MANY_VALUES = "too-many-values"
    """More JSON values, tensors or patterns than any real file has."""
    BAD_NUMBER = "bad-number"
    """NaN, Infinity, or a number that does not fit 64 bits."""
    BAD_TEXT = "bad-text"
    """A string with NUL or a lone surrogate, or one that is too long."""

    # --- safetensors header
    TRUNCATED = "truncated"
    """The file ends before its header says so."""
    HEADER_TOO_LARGE = "header-too-large"
    """The header claims a length that no real file has."""
    BAD_HEADER = "bad-header"
    """The header is not of the form that safetensors prescribes."""
    UNKNOWN_DTYPE = "unknown-dtype"
    """A number format that safetensors does not know."""
    BAD_SHAPE = "bad-shape"
    """A shape that is not a short list of non-negative integers."""
    SIZE_MISMATCH = "size-mismatch"
    """Shape and number format need another number of bytes than the offsets span."""
    OVERLAPPING_OFFSETS = "overlapping-offsets"
    """Two tensors share bytes."""
    OFFSET_GAP = "offset-gap"
    """Bytes between tensors, or after the last, that belong to none."""

    # --- adapter_config.json
    MISSING_KEY = "missing-key"
    """A key without which the adapter has no meaning."""
    WRONG_TYPE = "wrong-type"
    """A known key holds another type of value."""
    OUT_OF_RANGE = "out-of-range"
    """A number, a list or a name outside of what is allowed."""
    UNSUPPORTED_PEFT_TYPE = "unsupported-peft-type"
    """An adapter of another family than LoRA."""
    UNSUPPORTED_LAYOUT = "unsupported-layout"
    """A LoRA variant that we do not handle; measured as plain LoRA it would be something else."""
    REMOTE_CODE = "remote-code"
    """The config names code to import or to download."""
    UNSAFE_PATH = "unsafe-path"
    """A path that is absolute or leaves its folder."""
    REGEX_TOO_COMPLEX = "regex-too-complex"
    """A regular expression that is invalid, or that some engine could need exponential time for."""

    # --- adapter_model.safetensors
    UNEXPECTED_TENSOR = "unexpected-tensor"
    """A tensor that the config does not announce, or whose name follows no known form."""
    MISSING_TENSOR = "missing-tensor"
    """One of the tensors that make a module complete is not there."""
    BAD_DTYPE = "bad-dtype"
    """A number format that adapter weights may not have."""
    RANK_MISMATCH = "rank-mismatch"
    """A, B and the config disagree about the rank."""
    SHAPE_MISMATCH = "shape-mismatch"
    """The tensor does not fit the weight of the base model."""
    UNKNOWN_MODULE = "unknown-module"
    """The base model has no module of this name."""
    NOT_TARGETED = "not-targeted"
    """The config does not target this module: some engines would apply it, others would drop it."""
    QUANTISED = "quantised"
    """A model with weights of a few bits, where the original is needed."""
    NAN_WEIGHT = "nan-weight"
    """The tensor contains NaN."""
    INF_WEIGHT = "inf-weight"
    """The tensor contains an infinity."""
    HUGE_WEIGHT = "huge-weight"
    """A finite value that becomes infinite as soon as the model is served in 16 bit."""

    # --- archives
    BAD_ARCHIVE = "bad-archive"
    """Not an archive of a kind that we read, or a damaged one."""
    LINK_IN_ARCHIVE = "link-in-archive"
    """A symbolic or hard link."""
    DEVICE_IN_ARCHIVE = "device-in-archive"
    """A device, a pipe or another special file."""
    DUPLICATE_MEMBER = "duplicate-member"
    """Two members would be written to the same name, on some system."""
    TOO_MANY_MEMBERS = "too-many-members"
    """More members than an adapter has files."""
    ARCHIVE_BOMB = "archive-bomb"
    """Unpacks to far more than its own size."""
    ARCHIVE_TOO_LARGE = "archive-too-large"
    """Unpacks to more bytes than an upload may have."""
    NESTED_ARCHIVE = "nested-archive"
    """An archive within the archive."""


class Refused(Exception):
    """The upload is malformed or hostile; `file`, `field` and `rule` say where and why."""

    def __init__(self, rule: Rule, detail: str, *, file: str, field: str = "content") -> None:
        """Name the rule, and as precisely as possible the place: a key, a tensor, a member; else the content."""
        self.rule = rule
        self.file = clean(file, limit=LONGEST_NAME)
        self.field = clean(field, limit=LONGEST_NAME) or "content"
        self.detail = clean(detail, limit=LONGEST_DETAIL)
        place = ": ".join(part for part in (self.file, self.field) if part)
        super().__init__(f"{place or 'upload'}: {self.detail} [{rule}]")

    def as_dict(self) -> dict[str, str]:
        """The refusal as a document."""
        return {"file": self.file, "field": self.field, "rule": self.rule.value, "detail": self.detail}


def clean(text: str, *, limit: int) -> str:
    """`text` without anything that does not print, and not longer than `limit`."""
    cut = text[:limit]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return shown[: limit - 1] + "…" if len(text) > limit or len(shown) > limit else shown
