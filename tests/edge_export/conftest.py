"""Shared by the export side's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Tiny matrices gain nothing from threads, and on a busy machine waiting for them costs a hundredfold."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """No test finds what another has left in the user's cache."""
    monkeypatch.setenv("EDGE_REASONER_CACHE", str(tmp_path_factory.mktemp("cache")))
