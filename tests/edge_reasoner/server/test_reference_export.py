"""From a checkpoint to the bundle that the reference cloud serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_reasoner.errors import InputError
from edge_reasoner.server.reference_export import content_key, reference_bundle


def _no_exporter() -> None:
    raise InputError("install edge-reasoner[export]")


def test_key_follows_the_content(tmp_path: Path) -> None:
    """Names and bytes decide, not times or hidden files; links are followed."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "b/.cache").write_text("x")
    key = content_key(tmp_path / "a")
    assert key == content_key(tmp_path / "b")
    (tmp_path / "b/config.json").unlink()
    (tmp_path / "b/config.json").symlink_to(tmp_path / "a/config.json")
    assert key == content_key(tmp_path / "b")
    (tmp_path / "a/config.json").write_text("[]")
    assert key != content_key(tmp_path / "a") and key != content_key(tmp_path / "a/config.json")


def test_bundle_or_exporter(tmp_path: Path) -> None:
    """A bundle is served as it is; a checkpoint needs an exporter; what does not exist is said first."""
    (tmp_path / "manifest.json").write_text("{}")
    said: list[str] = []
    assert reference_bundle(str(tmp_path), tmp_path / "c", say=said.append, find=_no_exporter) == tmp_path
    (tmp_path / "m.gguf").write_text("x")
    with pytest.raises(InputError, match="edge-reasoner\\[export\\]"):
        reference_bundle(str(tmp_path / "m.gguf"), tmp_path / "c", say=said.append, find=_no_exporter)
    with pytest.raises(InputError, match="no such"):
        reference_bundle(str(tmp_path / "no"), tmp_path / "c", say=said.append)
    assert not said and not (tmp_path / "c").exists()


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    """A cache below a file, a model's name that no disk can hold: one line that says what to set or give."""
    (tmp_path / "m.gguf").write_text("x")
    with pytest.raises(InputError, match="EDGE_REASONER_CACHE"):
        reference_bundle(
            str(tmp_path / "m.gguf"), tmp_path / "m.gguf" / "c", say=str, find=lambda: lambda model, out: out
        )
    with pytest.raises(InputError, match="no such"):
        reference_bundle("x" * 5000, tmp_path, say=str)
