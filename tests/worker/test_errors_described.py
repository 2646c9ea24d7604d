"""What the ledger says about each kind of error, and what it never says."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from ledger.errors import BlobDamaged, BlobMissing, BlobStoreError
from ledger.jobs import Retry
from repair.checks.errors import CandidatesBroke, PolicyInvalid
from repair.errors import MissingWeight, UnsupportedAdapter
from tests.checks.acting import SECRET
from worker.errors import ReferenceChanged
from worker.pipeline import describe, last_lines


@pytest.mark.parametrize(
    ("error", "code", "retry"),
    [
        (UnsupportedAdapter("no such layout", field="q_proj"), "unsupported-layout", Retry.PERMANENT),
        (MissingWeight("none", field="q_proj"), "missing-weight", Retry.PERMANENT),
        (PolicyInvalid("no such policy", field="x"), "policy-invalid", Retry.PERMANENT),
        (CandidatesBroke("broke", field="scale"), "candidates-broke", Retry.PERMANENT),
        (ReferenceChanged("model.safetensors"), "reference-changed", Retry.PERMANENT),
        (torch.OutOfMemoryError("CUDA out of memory"), "out-of-memory", Retry.TRANSIENT),
        (MemoryError(), "out-of-memory", Retry.TRANSIENT),
        (BlobMissing("sha256:a"), "storage", Retry.TRANSIENT),
        (BlobDamaged("sha256:a"), "storage", Retry.TRANSIENT),
        (BlobStoreError(), "storage", Retry.TRANSIENT),
        (OSError(28, "No space left on device"), "storage", Retry.TRANSIENT),
        (RuntimeError("x"), "unexpected", Retry.TRANSIENT),
        (KeyError("x"), "unexpected", Retry.TRANSIENT),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_kind_of_error_has_its_code_and_its_hope(error: Exception, code: str, retry: Retry) -> None:
    """A fact about the adapter is final; a fact about the machine may pass."""
    failure = describe(error)
    assert (failure.code, failure.retry) == (code, retry)
    assert failure.message


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, AssertionError, TypeError])
def test_an_unknown_error_never_carries_its_text(kind: type[Exception]) -> None:
    """It may quote what a model said."""
    with pytest.raises(kind) as caught:
        fail(kind)
    said = json.dumps(asdict(describe(caught.value))) + json.dumps(last_lines(caught.value))
    assert SECRET not in said
    assert kind.__name__ in said
    assert "test_errors_described.py" in said


def fail(kind: type[Exception]) -> None:
    raise kind(f"the model said {SECRET}")
