"""Pictures and pages about runs; `write_report` makes the page."""

from typing import Any

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """Imports `write_report` when it is asked for: a picture needs no page."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bvae.report.write import write_report

    return write_report
