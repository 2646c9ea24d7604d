"""One upload: its parts to a staging folder, the gate's judgement, the blobs, the row. Flat memory throughout.

`receive` is the asynchronous half, bound to the request; `admit` and `store` are synchronous and run in a thread. The
staging folder belongs to the caller, which removes it in any case.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api import samples
from api.errors import field_problem
from api.multipart import PartRule, Received, ReceivedFile, Receiver, RepeatedPart, announced_digests, too_large
from api.problems import Problem
from gate.admission import Admission, admit
from gate.archive import Limits, unpack
from gate.errors import Refused, Rule
from gate.measurable import require_measurable
from gate.names import check_name
from ledger import references
from ledger.adapters import NewAdapter
from ledger.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fastapi import Request

    from api.service import Service

# Handed to the thread in pieces of this size: hashing a megabyte takes about a millisecond.
PIECE: Final = 1 << 20
# After a refusal we read on for so long, because a client that still sends would never see the answer.
LINGER: Final = 64 << 20
# Boundaries, part headers and short fields.
OVERHEAD: Final = 1 << 20
# More than the gate allows for any of them, so that the gate's refusal, which names the rule, comes first.
SMALL_FILE: Final = 16 << 20
SAMPLES_FILE: Final = 8 << 20
WEIGHTS: Final = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """An upload that the gate let in."""

    folder: Path
    admission: Admission
    name: str
    reference: str | None
    samples: Path | None


async def receive(request: Request, folder: Path, *, limit: int) -> Received:
    """Stream the body into ``folder``.

    Raises:
        Problem: it is no multipart, too large, or has not the digest that a header announces.
        Refused: it has a part that no adapter has.
    """
    stream = request.stream()
    announced = announced_digests(*(request.headers.get(name) for name in ("repr-digest", "content-digest")))
    receiver = Receiver(
        content_type=request.headers.get("content-type", ""),
        announced=announced,
        rule_for=partial(part_rule, folder=folder, limit=limit),
        limit=limit + OVERHEAD,
    )
    try:
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit + OVERHEAD:
            raise too_large("The body", limit)
        async for piece in _pieces(stream):
            await run_in_threadpool(receiver.feed, piece)
        return receiver.finish()
    except RepeatedPart as error:
        await _drain(stream)
        raise Refused(Rule.DUPLICATE_MEMBER, "the upload has this part twice", file=error.name) from error
    except (Problem, Refused):
        await _drain(stream)
        raise
    finally:
        receiver.close()


def part_rule(name: str, is_file: bool, *, folder: Path, limit: int) -> PartRule:  # noqa: FBT001 - the parser's form
    """Where a part goes and how large it may be; raises for one that no adapter has."""
    if name == "samples":
        return PartRule(limit=SAMPLES_FILE, folder=folder)
    if name == "archive":
        return PartRule(limit=limit, folder=folder)
    if name in {"name", "reference"}:
        return PartRule(limit=1000, folder=None)
    if not is_file:
        raise field_problem(f"/{name}", "There is no such field; a file needs a filename.")
    # The gate's own list, asked before a byte is written: the name becomes a path.
    check_name(name)
    into = folder / "adapter"
    into.mkdir(exist_ok=True)
    return PartRule(limit=limit if name == WEIGHTS else min(limit, SMALL_FILE), folder=into)


def admit_upload(service: Service, received: Received, folder: Path) -> Admitted:
    """Let the gate judge every byte. Raises `Refused`, or a 422 problem about a field."""
    adapter = folder / "adapter"
    reference = received.fields.get("reference") or None
    shapes = _shapes(service, reference)
    if archive := received.files.get("archive"):
        if adapter.exists():
            raise field_problem("/archive", "Give the files or one archive, not both.")
        _unpack(archive, adapter, limit=service.settings.max_upload_bytes)
    adapter.mkdir(exist_ok=True)
    given = received.files.get("samples")
    if given:
        samples.normalise(given.path)
    admission = admit(adapter, shapes=shapes)
    require_measurable(admission, settles=service.offered.settles)
    return Admitted(
        folder=adapter,
        admission=admission,
        name=_name(received),
        reference=reference,
        samples=given.path if given else None,
    )


def store(service: Service, admitted: Admitted) -> NewAdapter:
    """Put the bytes that the gate saw into the blob store; a blob without a row is invisible."""
    files: list[dict[str, Any]] = []
    for record in admitted.admission.files:
        # The store compares: what is kept is what the gate saw, not what lies there now.
        service.blobs.put_file(admitted.folder / record.name, digest=record.sha256)
        files.append(asdict(record))
    return NewAdapter(
        name=admitted.name,
        digest=admitted.admission.digest,
        size=admitted.admission.size,
        files=files,
        inspection=admitted.admission.as_dict(),
        reference=admitted.reference,
        samples_digest=service.blobs.put_file(admitted.samples) if admitted.samples else None,
    )


def _unpack(archive: ReceivedFile, into: Path, *, limit: int) -> None:
    try:
        unpack(archive.path, into, Limits(total_bytes=limit))
    except Refused as refused:
        # It lies here under a name of ours; the uploader knows it by another.
        name = refused.file if refused.file != archive.path.name else archive.filename or refused.file
        raise Refused(refused.rule, refused.detail, file=name, field=refused.field) from refused
    archive.path.unlink()


def _shapes(service: Service, reference: str | None) -> dict[str, tuple[int, ...]] | None:
    if reference is None:
        return None
    with service.database.read() as tx:
        try:
            return references.shapes_of(references.get(tx, reference))
        except NotFound as error:
            raise field_problem("/reference", str(error)) from error


def _name(received: Received) -> str:
    name = received.fields.get("name", "").strip()
    if len(name) > 200:  # noqa: PLR2004 - the width of the column
        raise field_problem("/name", "A name has at most 200 characters.")
    return name or "unnamed"


async def _pieces(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body in pieces of about a megabyte: a thread for each of the server's chunks would cost more than hashing."""
    gathered = bytearray()
    async for chunk in stream:
        gathered += chunk
        if len(gathered) >= PIECE:
            yield bytes(gathered)
            gathered.clear()
    yield bytes(gathered)


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Read on and forget, up to `LINGER` bytes."""
    left = LINGER
    with suppress(ClientDisconnect):
        async for chunk in stream:
            left -= len(chunk)
            if left <= 0:
                return
