"""A report for those who do not want all of it: one line for each check and arm, or a page to read.

A report is written by the worker and never changes, so its summary is kept in memory by digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from api.conditional import strong_etag
from api.downloads import disposition
from ledger.errors import BlobError
from pages.errors import NotAReport
from pages.render import PAGE_VERSION, content_policy, render

if TYPE_CHECKING:
    from ledger.blobs import BlobStore

# The aligned model, the upload, and the candidate that was certified.
ARMS: Final = ("aligned", "input", "certify")
NUMBERS: Final = ("name", "outcome", "hits", "n", "rate", "low", "high", "bound", "cut_off_share", "reason")

Checks = dict[str, list[dict[str, Any]]]


@lru_cache(maxsize=256)
def checks_of(blobs: BlobStore, report_digest: str) -> Checks | None:
    """The checks of each arm; None when the report cannot be read: a job is shown without them all the same."""
    try:
        report = json.loads(blobs.read(report_digest))
    except (BlobError, ValueError):
        return None
    found = {arm: _lines(report.get(arm)) for arm in ARMS} if isinstance(report, Mapping) else {}
    return {arm: lines for arm, lines in found.items() if lines} or None


@lru_cache(maxsize=16)
def page_of(blobs: BlobStore, report_digest: str) -> str | None:
    """The report as HTML; None when it was written by a version whose reports have other fields."""
    try:
        return render(blobs.read(report_digest))
    except NotAReport:
        return None


def page_headers(report_digest: str, *, save_as: str) -> dict[str, str]:
    """A page is a function of the report and of the version that draws it, so its tag names both."""
    return {
        "ETag": strong_etag(f"{report_digest}-page{PAGE_VERSION}"),
        "Cache-Control": "private, no-cache",
        "Content-Disposition": disposition(save_as).replace("attachment", "inline", 1),
        "Content-Security-Policy": f"{content_policy()}; frame-ancestors 'none'; sandbox",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _lines(arm: Any) -> list[dict[str, Any]]:
    checks = arm.get("checks") if isinstance(arm, Mapping) else None
    if not isinstance(checks, list):
        return []
    return [{key: check.get(key) for key in NUMBERS} for check in checks if isinstance(check, Mapping)]
