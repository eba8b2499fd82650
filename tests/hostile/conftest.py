"""Graphs as the exporter writes them, made once for all attacks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pytest
from support.hostile_graphs import Sound, sound_graphs


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Sound]:
    """By name: `packed`, `normed`, `encoder`."""
    return MappingProxyType(sound_graphs(tmp_path_factory.mktemp("sound")))
