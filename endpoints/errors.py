"""What can go wrong when a model answers over HTTP; a branch of the family in `repair/errors.py`.

RepairError
`-- CheckError
    `-- EndpointError        the server cannot be used: bad address, refused, or an answer of another shape
        `-- EndpointSilent   no answer after every try: it may pass
"""

from repair.checks.errors import CheckError


class EndpointError(CheckError):
    """The server cannot be used."""

    rule = "endpoint-failed"


class EndpointSilent(EndpointError):
    """The server did not answer."""

    rule = "endpoint-silent"
