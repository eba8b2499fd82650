"""Packing: the staging folder's promises, file entries, and a report that no name can break out of."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import stat
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from support.answering_bundle import write_answering_bundle

from edge_export.pipeline import export
from edge_export.stages.pack import (
    _move_into_place,
    bundle_bytes,
    check_destination,
    file_entries,
    restore_earlier,
    staging_folder,
)
from edge_export.stages.report import render_report
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import InputError


def names(folder) -> list[str]:
    """What a folder holds."""
    return sorted(path.name for path in folder.iterdir())


def test_staging_becomes_the_bundle(tmp_path):
    """What was written appears at once, readable by others; the old one is there until then."""
    out = tmp_path / "out"
    for text in ("first", "second"):
        with staging_folder(out) as folder:
            (folder / "file").write_text(text)
            assert text == "first" or (out / "file").read_text() == "first"
        assert (out / "file").read_text() == text
    assert names(tmp_path) == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_staging_vanishes_when_its_block_fails(error, tmp_path):
    """An error of any kind removes the staging folder and nothing else."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("old")
    with pytest.raises(error), staging_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
        raise error
    assert names(tmp_path) == ["out"] and (tmp_path / "out/file").read_text() == "old"


def test_the_old_bundle_comes_back_when_the_new_one_cannot_move(tmp_path):
    """The staging folder gone at the last moment: the earlier bundle is where it was."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("old")
    with pytest.raises(FileNotFoundError):
        _move_into_place(tmp_path / "gone", tmp_path / "out")
    assert names(tmp_path) == ["out"] and (tmp_path / "out/file").read_text() == "old"


def test_what_a_killed_export_left_is_removed(tmp_path):
    """A staging folder that nobody holds goes; those of running exports, and other folders, stay."""
    for name in (".out.abc.partial", ".out.abc.old", ".other.abc.partial", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    with staging_folder(tmp_path / "out") as first, staging_folder(tmp_path / "out") as second:
        assert first.is_dir() and second.is_dir() and first != second
        (first / "file").write_text("x")
        assert not (tmp_path / ".out.abc.partial").exists()
    assert names(tmp_path) == [".other.abc.partial", ".out.abc.old", ".out.partial", "out"]


def test_a_folder_that_cannot_be_written(tmp_path):
    """A parent that is a file, or is missing, is named."""
    (tmp_path / "file").write_text("x")
    for parent in ("file", "missing"):
        with pytest.raises(InputError, match="does not exist"):
            check_destination(tmp_path / parent / "out")
        with pytest.raises(InputError, match="cannot be written"), staging_folder(tmp_path / parent / "out"):
            pass


def test_a_name_that_the_system_refuses(tmp_path):
    """A name that is too long is found before the work, as input that cannot be used."""
    with pytest.raises(InputError, match="cannot be written"):
        check_destination(tmp_path / ("x" * 300))


def test_file_entries_are_sizes_and_digests(tmp_path):
    """Sorted by path, hashed by hashlib, sizes in bytes."""
    (tmp_path / "a").mkdir()
    contents = {"b.bin": b"x" * 3_000_000, "a/c.txt": b"", "a/b.txt": b"hello"}
    for path, data in contents.items():
        (tmp_path / path).write_bytes(data)
    entries = file_entries(tmp_path, contents)
    assert [entry.path for entry in entries] == ["a/b.txt", "a/c.txt", "b.bin"]
    for entry in entries:
        assert entry.sha256 == hashlib.sha256(contents[entry.path]).hexdigest()
        assert entry.size_bytes == len(contents[entry.path])
    assert bundle_bytes(tmp_path) == 3_000_005


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


def test_report_escapes_what_the_model_says(tmp_path):
    """Names and warnings from a checkpoint are text, never markup; nothing is loaded from outside."""
    evil = '<script src="http://x">&"\'</script>'
    units = [
        {"unit": "layers.0.qkv", "format": "int4-b32-asym", "loss_nats": 0.25, "parameters": 1},
        {"unit": "layers.1.qkv", "format": "int8-b32-sym", "parameters": 1},
        {"unit": "head", "format": "float", "parameters": 1},
    ]
    page = render_report(evil, {evil: evil, "number": 1.23456789}, units, [evil]).decode("utf-8")
    parsed = _Elements()
    parsed.feed(page)
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert parsed.text.count(evil) == 5 and "1.235" in parsed.text
    assert parsed.tags.count("rect") == 3 and "loss 0.25 nats" in parsed.text


def test_report_of_a_name_that_is_no_text():
    """A folder's name in another encoding, controls and direction overrides: the page is UTF-8 text still."""
    page = render_report("a\udcffb\u202ec\x1bd", {}, [], []).decode("utf-8")
    assert "a?b\ufffdc\ufffdd" in page


def test_report_without_units_or_warnings():
    """An encoder's report has no map of layers; no warnings are said to be none."""
    page = render_report("t", {}, [], []).decode("utf-8")
    assert "<li>none</li>" in page


REPLACE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from edge_export.stages.pack import staging_folder

rename = Path.replace

def replace(self, target):
    if self.name.endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

Path.replace = replace
with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("new")
"""


def _killed_between_the_renames(out) -> None:
    done = subprocess.run([sys.executable, "-c", REPLACE_AND_DIE, str(out)], timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    assert sorted(path.suffix for path in out.parent.iterdir()) == [".old", ".partial"]


def test_killed_between_the_renames(tmp_path):
    """The earlier bundle, set aside by then, is put back, whole; the next export leaves only its own."""
    out = tmp_path / "out"
    write_answering_bundle(out)
    before = open_bundle(out).manifest.bundle_id
    _killed_between_the_renames(out)
    restore_earlier(out)
    assert open_bundle(out).manifest.bundle_id == before
    with staging_folder(out) as folder:
        (folder / "file").write_text("newer")
    assert names(tmp_path) == ["out"]


def test_what_stands_aside_is_removed_once_there_is_a_bundle(tmp_path):
    """A stale folder goes when `out` is a bundle; one in use, and one that is no bundle, alone, stay."""
    out, aside = tmp_path / "out", tmp_path / ".out.abc.old"
    write_answering_bundle(out)
    write_answering_bundle(aside)
    held = os.open(aside, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    restore_earlier(out)
    assert names(tmp_path) == [".out.abc.old", "out"]
    os.close(held)
    restore_earlier(out)
    assert names(tmp_path) == ["out"]
    out.rename(aside)
    (aside / "manifest.json").write_text("{}")
    restore_earlier(out)
    assert names(tmp_path) == [".out.abc.old"]


def test_an_export_begins_with_mending(tmp_path):
    """Whatever becomes of it: here its model is missing, and the earlier bundle is back all the same."""
    out, aside = tmp_path / "out", tmp_path / ".out.abc.old"
    write_answering_bundle(aside)
    with pytest.raises(InputError, match="nowhere"):
        export(str(tmp_path / "nowhere"), "generic-x86", out)
    open_bundle(out)
    assert names(tmp_path) == ["out"]
