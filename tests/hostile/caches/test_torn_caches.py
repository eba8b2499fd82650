"""Caches after a power cut, or in a stranger's hands: never believed, never the end, always made anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny_graphs
from support.sequences import OneSequence
from support.tiny_bundle import TOKENS, decoder_golden, write_bundle

from edge_reasoner.activation.activate import activate
from edge_reasoner.activation.opening import open_bundle_at
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.contract.bundle.tar import pack_bundle
from edge_reasoner.machine.isa import ImportProbe

SAFE = ImportProbe(module="onnxruntime", safe=True, conclusive=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A sound bundle as a `.tar`."""
    folder = tmp_path_factory.mktemp("caches")
    path = tiny_graphs.save(tiny_graphs.decoder_model(tiny_graphs.weights()), folder / "g.onnx")
    sequence = OneSequence(OrtDecoder(path, tiny_graphs.decoder_spec()))
    logits = sequence.extend(np.array(TOKENS), len(TOKENS)).copy()
    root = write_bundle(folder / "bundle", decoder_golden(logits, 0.15), encoder=False)
    return pack_bundle(open_bundle(root), folder / "b.tar")


@pytest.fixture(scope="module")
def filled(archive, tmp_path_factory):
    """A cache that holds all there is to hold."""
    cache = tmp_path_factory.mktemp("filled") / "cache"
    start(archive, cache)
    assert start(archive, cache)
    return cache


@pytest.fixture
def cache(filled, tmp_path):
    """A copy to damage."""
    return shutil.copytree(filled, tmp_path / "cache")


def start(archive: Path, cache: Path, confinement=None) -> bool:
    """Opens the archive and activates its reasoner; whether the choice came from the cache."""
    bundle = open_bundle_at(archive, cache)
    result = activate(
        bundle, "reasoner", threads=1, cache_dir=cache, confinement=confinement, probe_import=lambda: SAFE
    )
    result.decoder.new_cache(4)
    result.model.close()
    assert result.activation.variant_id == "int4"
    return result.from_cache


def files(cache: Path) -> list[Path]:
    """Every file of a cache."""
    return sorted(path for path in cache.rglob("*") if path.is_file())


def fifo(path: Path) -> None:
    """A pipe: who opens it to read would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def linked(target: str):
    """Puts a link there."""

    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return damage


def folder(path: Path) -> None:
    """A folder that is not empty."""
    path.unlink()
    (path / "inside").mkdir(parents=True)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 512),
    "gone": Path.unlink,
    "fifo": fifo,
    "folder": folder,
    "loose end": linked("nowhere"),
    "endless": linked("/dev/zero"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_each_file_of_a_cache_is_damaged(archive, cache, damage):
    """One file after the other: the same `.tar` opens each time, and its cache is sound again."""
    for path in files(cache):
        DAMAGES[damage](path)
        start(archive, cache)
        if damage != "folder":  # what cannot be replaced by a file is left, and costs a test at each start
            assert start(archive, cache), path


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_all_files_of_a_cache_are_damaged(archive, cache, damage):
    """All together, as after a power cut on a file system that writes names before content."""
    for path in files(cache):
        DAMAGES[damage](path)
    start(archive, cache)
    assert damage == "folder" or start(archive, cache)


@pytest.mark.parametrize("what", ["file", "loose end", "link", "empty", "another"])
def test_something_else_is_where_the_bundle_was(archive, cache, tmp_path, what):
    """No folder of that bundle at its place: it is put there, and what a link leads to is not touched."""
    (place,) = (cache / "bundles").iterdir()
    moved = place.rename(tmp_path / "moved")
    if what == "file":
        place.write_bytes(b"")
    elif what == "loose end":
        place.symlink_to("nowhere")
    elif what == "link":
        place.symlink_to(moved)
    elif what == "empty":
        place.mkdir()
    else:
        (place / "graphs").mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
    bundle = open_bundle_at(archive, cache)
    assert bundle.root == place.resolve() and not place.is_symlink()
    open_bundle(place)
    open_bundle(moved)


@pytest.mark.parametrize("where", ["bundles", "activation", "import"])
def test_a_file_is_where_a_folder_should_be(archive, cache, where):
    """Nothing can be kept there then; everything is found out anew."""
    shutil.rmtree(cache / where)
    (cache / where).write_bytes(b"")
    start(archive, cache)
    start(archive, cache)


def tampered(text: str, **changes) -> str:
    """The choice with other content, its report saying that just this passed."""
    plain = json.loads(text)
    plain.update(changes)
    plain["reports"] = [
        {
            "variant_id": plain["variant_id"],
            "session_options": plain["session_options"],
            "passed": True,
            "reason": "trust me",
            "error": 0.0,
            "step_ms": 0.001,
        }
    ]
    return json.dumps(plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"session_options": {"session.disable_prepacking": "1"}},
        {"session_options": {"session.optimized_model_filepath": "written"}},
        {"session_options": {"mlas.qnbit.force_fp32": "1"}, "reference": False},
        {"session_options": {"\x00": "\ud800"}},
        {"reference": True},
        {"variant_id": "none"},
    ],
)
def test_a_choice_that_this_bundle_does_not_offer(archive, cache, changes):
    """Options or variants from the cache that no candidate has are not opened: the test decides anew."""
    (path,) = (cache / "activation").iterdir()
    path.write_text(tampered(path.read_text(), **changes), encoding="utf-8", errors="surrogatepass")
    assert not start(archive, cache)
    assert start(archive, cache)


@pytest.mark.parametrize("where", ["activation", "import"])
def test_what_others_may_write_is_not_read(archive, cache, where):
    """A file that anybody may write, or that another user owns, counts as absent; then it is replaced."""
    (path,) = (cache / where).iterdir()
    path.chmod(0o666)
    said = []

    def probe() -> ImportProbe:
        said.append(1)
        return SAFE

    def again() -> bool:
        bundle = open_bundle_at(archive, cache)
        result = activate(
            bundle, "reasoner", threads=1, cache_dir=cache, confinement=None, probe_import=probe
        )
        result.model.close()
        return not said if where == "import" else result.from_cache

    assert not again()
    said.clear()
    assert again()
    assert path.stat().st_mode & 0o777 == 0o644
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        assert not again()


@pytest.mark.parametrize("where", ["activation", "import"])
def test_a_link_in_a_cache_is_not_written_through(archive, cache, tmp_path, where):
    """A link to a file of the user: it is replaced, the file stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (path,) = (cache / where).iterdir()
    path.unlink()
    path.symlink_to(victim)
    start(archive, cache)
    assert victim.read_text() == "mine" and not path.is_symlink() and start(archive, cache)


OPENING = """
import sys
from pathlib import Path
from edge_reasoner.activation.activate import activate
from edge_reasoner.activation.opening import open_bundle_at

bundle = open_bundle_at(sys.argv[1], Path(sys.argv[2]))
activate(bundle, "reasoner", threads=1, cache_dir=Path(sys.argv[2])).model.close()
print(bundle.root)
"""


def test_six_processes_mend_one_torn_cache(archive, cache):
    """All at once: each gets its model, and one sound copy is there afterwards."""
    for path in files(cache):
        path.write_bytes(b"")
    command = [sys.executable, "-c", OPENING, archive, cache]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    assert start(archive, cache)
