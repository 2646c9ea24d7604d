"""What can go wrong when a model answers over HTTP; a branch of the family in `repair/errors.py`.

RepairError
`-- CheckError
    `-- EndpointError        the server cannot be used: bad address, refused, or an answer of another shape
        `-- EndpointSilent   no answer after every try: it may pass
"""

from repair.checks.errors import CheckError


class EndpointError(CheckError):
    """The server cannot be used; `status` is what it answered with, None where there was no answer to read."""

    rule = "endpoint-failed"

    def __init__(self, detail: str = "", *, field: str = "", file: str = "", status: int | None = None) -> None:
        """As its kin, with the number of the answer."""
        super().__init__(detail, field=field, file=file)
        self.status = status


class EndpointSilent(EndpointError):
    """The server did not answer."""

    rule = "endpoint-silent"
