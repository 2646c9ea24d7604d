"""A job's report as a page for people: the report's schema, and one function from a report to self-contained HTML."""
