"""A bundle is opened where it is; a `.tar` goes through the cache, or through a folder that vanishes."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support import tiny_graphs as tiny
from support.tiny_bundle import TOKENS, decoder_golden, write_bundle

from edge_reasoner.activation.opening import open_bundle_at
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.contract.bundle.tar import pack_bundle, unpack_bundle_to
from edge_reasoner.errors import BundleError

HOUR_S = 3600.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    logits = np.random.default_rng(0).normal(size=(len(TOKENS), tiny.VOCAB)).astype(np.float32)
    return write_bundle(tmp_path_factory.mktemp("sound") / "bundle", decoder_golden(logits, 0.1))


@pytest.fixture(scope="module")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as one file; read only."""
    return pack_bundle(open_bundle(bundle), tmp_path_factory.mktemp("packed") / "my.bundle.tar")


def test_a_directory_is_used_as_it_stands(bundle: Path, tmp_path: Path) -> None:
    """Nothing goes to the cache."""
    assert open_bundle_at(bundle, tmp_path / "cache").root == bundle.resolve()
    assert not (tmp_path / "cache").exists()


def test_a_tar_is_unpacked_once(archive: Path, bundle: Path, tmp_path: Path) -> None:
    """The second opening takes the same files; their content is the packed bundle's."""
    first = open_bundle_at(archive, tmp_path)
    stamps = {path: path.stat().st_ino for path in first.root.rglob("*")}
    assert open_bundle_at(archive, tmp_path) == first
    assert {path: path.stat().st_ino for path in first.root.rglob("*")} == stamps
    assert first.root == tmp_path / "bundles" / first.manifest.bundle_id
    for path in bundle.rglob("*"):
        if path.is_file():
            assert (first.root / path.relative_to(bundle)).read_bytes() == path.read_bytes()


def test_packing_gives_the_same_bytes_which_tar_reads(archive: Path, bundle: Path, tmp_path: Path) -> None:
    """No times or owners; Python's tarfile lists the bundle's files."""
    assert pack_bundle(open_bundle(bundle), tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert names[0] == "manifest.json"
    assert sorted(names) == sorted(
        path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()
    )


def test_packing_and_unpacking_overwrite_nothing(archive: Path, bundle: Path, tmp_path: Path) -> None:
    """An existing target, or one inside the bundle, is refused by name; nothing is left behind."""
    opened = open_bundle(bundle)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    with pytest.raises(BundleError, match="exists already"):
        unpack_bundle_to(archive, tmp_path / "full")
    with pytest.raises(BundleError, match="exists already"):
        pack_bundle(opened, archive)
    with pytest.raises(BundleError, match="inside the bundle"):
        pack_bundle(opened, bundle / "b.tar")
    with pytest.raises(BundleError, match="No such file"):
        pack_bundle(opened, tmp_path / "absent/b.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert unpack_bundle_to(archive, tmp_path / "new/er").manifest == opened.manifest


@pytest.mark.parametrize("cache", [None, "file/cache"])
def test_without_a_cache_a_temporary_folder_is_used_and_removed(
    archive: Path, tmp_path: Path, cache: str | None
) -> None:
    """No cache, or one that cannot be made: the bundle opens, and nothing is left when the process ends."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "tmp").mkdir()
    program = (
        "import sys\nfrom pathlib import Path\nfrom edge_reasoner.activation.opening import open_bundle_at\n"
        "cache = Path(sys.argv[2]) if len(sys.argv) > 2 else None\n"
        "print(open_bundle_at(sys.argv[1], cache).root)"
    )
    given = [] if cache is None else [str(tmp_path / cache)]
    done = subprocess.run(
        [sys.executable, "-c", program, str(archive), *given],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "tmp")) and not list((tmp_path / "tmp").iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_childs_end_leaves_the_temporary_folder(archive: Path, tmp_path: Path) -> None:
    """The folder vanishes when the process that made it ends, not when a child of it does."""
    program = (
        "import os, sys\nfrom edge_reasoner.activation.opening import open_bundle_at\n"
        "root = open_bundle_at(sys.argv[1], None).root\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit()\n"
        "os.waitpid(child, 0)\nprint(root.is_dir())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(archive)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "True\n" and not list(tmp_path.iterdir())


def test_the_cache_is_bounded(archive: Path, tmp_path: Path) -> None:
    """The longest unused goes first; what was used within the hour, and the one just opened, stay."""
    now_s = 1_700_000_000.0
    folders = {}
    for name, age_s in (
        ("old", 3 * HOUR_S),
        ("older", 9 * HOUR_S),
        ("recent", 60.0),
        (".unpack-x", HOUR_S * 2),
    ):
        folders[name] = tmp_path / "bundles" / name
        folders[name].mkdir(parents=True)
        (folders[name] / "weights").write_bytes(bytes(1000))
        os.utime(folders[name], (now_s - age_s, now_s - age_s))
    opened = open_bundle_at(archive, tmp_path, max_unpacked_bytes=3500, now=lambda: now_s)
    left = {path.name for path in (tmp_path / "bundles").iterdir()}
    assert left == {"old", "recent", opened.root.name}


def test_what_is_no_archive_is_named(bundle: Path, tmp_path: Path) -> None:
    """What is no bundle archive is refused in one line that names it."""
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(BundleError, match=r"b\.tar: .*gzip; decompress it first"):
        open_bundle_at(tmp_path / "b.tar", tmp_path / "cache")
    with pytest.raises(BundleError, match=r"manifest\.json: not a readable \.tar"):
        open_bundle_at(bundle / "manifest.json", tmp_path / "cache")


def test_a_name_that_no_disk_can_hold(tmp_path: Path) -> None:
    """Bad input like any path that does not exist, not an error of the system."""
    with pytest.raises(BundleError, match="no such bundle"):
        open_bundle_at("x" * 5000, tmp_path)
