"""The table of backends: a row is all that a backend needs to be found."""

from __future__ import annotations

import pytest

from edge_reasoner.backends import BACKENDS, load_backend
from edge_reasoner.contract.profile import list_profiles, load_profile
from edge_reasoner.errors import BundleError


@pytest.mark.parametrize("name", list(BACKENDS))
def test_a_row_is_a_backend_that_boards_have(name):
    """A row's name is its backend's own, and the one under which board profiles list the library."""
    assert load_backend(name).name == name
    assert any(load_profile(board).runtime(name) is not None for board in list_profiles())


def test_a_name_without_a_row_is_refused():
    """The message names every backend there is."""
    with pytest.raises(BundleError) as caught:
        load_backend("litert-next")
    assert "'litert-next' is unknown" in str(caught.value)
    assert all(name in str(caught.value) for name in BACKENDS)
