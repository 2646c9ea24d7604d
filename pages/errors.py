"""What can go wrong with a page."""


class NotAReport(ValueError):
    """The document is no report of this version; says which field stands in the way, never what it holds."""
