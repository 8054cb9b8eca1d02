"""What every refusal of the user's input must be."""

import pytest

from bvae.errors import UserError


def refused(call, *words):
    """`call()` raises UserError, in one line that has all `words` in it."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for word in words:
        assert str(word) in text
