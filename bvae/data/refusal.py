"""The wording of this package's refusals."""

from pathlib import Path

from bvae.errors import UserError


def refusal(path: Path | str, what: str, cause: BaseException | None = None) -> UserError:
    """A `UserError` of one line: the path, what is wrong with it, and the parser's own words in brackets."""
    text = f"{path}: {what}"
    if cause is not None:
        # An OSError repeats the path; its strerror does not.
        reason = (isinstance(cause, OSError) and cause.strerror) or str(cause) or type(cause).__name__
        text += f" ({reason})"
    return UserError(" ".join(text.splitlines()))
