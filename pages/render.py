"""A report as one HTML file that loads nothing and runs nothing.

Names of modules, parameters and refusals are the uploader's: all of it is escaped by the template engine, letters that
could hide or turn round their neighbours are written out, and the page forbids itself every script and every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from pages.document import Report
from pages.errors import NotAReport
from pages.view import view
from pages.words import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE_VERSION: Final = 2
"""Counts what changes the bytes of a page; part of its entity tag."""


def render(document: Mapping[str, Any] | bytes) -> str:
    """The page of a report, given as JSON or as what JSON gave. Raises NotAReport, naming the field."""
    report = parse(document)
    template = _environment().get_template("report.html")
    return template.render(style=stylesheet(), policy=content_policy(), **view(report))


def parse(document: Mapping[str, Any] | bytes) -> Report:
    """The report behind a document. Raises NotAReport."""
    if not isinstance(document, bytes):
        document = json.dumps(document).encode()
    try:
        return Report.model_validate_json(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole document"
        raise NotAReport(f"not a report of version 1: {field}: {first['msg']}") from error


@cache
def stylesheet() -> str:
    """The page's own style."""
    return files("pages").joinpath("templates", "style.css").read_text(encoding="utf-8")


@cache
def content_policy() -> str:
    """What a browser may do with the page: apply its one style sheet, by hash, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(stylesheet().encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
