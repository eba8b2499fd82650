"""Files of an open bundle that are replaced, written to or cut: never used, never the process's end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny_graphs as tiny
from support.sequences import OneSequence
from support.tiny_bundle import TOKENS, decoder_golden, variant, write_bundle

from edge_reasoner.activation.activate import activate
from edge_reasoner.backends.onnxruntime import session
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import BundleError

GRAPH, WEIGHTS, TOKENIZER = "graphs/fp32.onnx", "graphs/fp32.onnx.data", "tokenizer/reasoner/tokenizer.json"
CHILD_SECONDS = 120


def write(root: Path, seed: int) -> Path:
    """A sound bundle of one fp32 decoder."""
    weights = tiny.weights(seed)
    path = tiny.save(tiny.decoder_model(weights), root.parent / f"{seed}.onnx")
    sequence = OneSequence(OrtDecoder(path, tiny.decoder_spec()))
    logits = sequence.extend(np.array(TOKENS), len(TOKENS)).copy()
    return write_bundle(
        root,
        decoder_golden(logits, 0.01),
        (variant("fp32"),),
        {"fp32": tiny.decoder_model(weights)},
        encoder=False,
    )


@pytest.fixture
def root(tmp_path):
    """The bundle that is opened."""
    return write(tmp_path / "bundle", 0)


@pytest.fixture
def other(tmp_path):
    """A bundle with the same files, sizes and names, and other weights."""
    return write(tmp_path / "other", 1)


def refused(call, *arguments) -> str:
    """The one line with which it is refused."""
    with pytest.raises(BundleError) as error:
        call(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def first_logits(bundle) -> np.ndarray:
    """What the bundle's model says after one token."""
    activated = activate(bundle, "reasoner", threads=1, cache_dir=None)
    try:
        cache = activated.decoder.new_cache(8)
        return activated.decoder.extend(cache, np.array([5])).logits.copy()
    finally:
        activated.model.close()


@pytest.mark.parametrize("name", [GRAPH, TOKENIZER, "golden/reasoner.json"])
@pytest.mark.parametrize("how", ["replaced", "written", "link"])
def test_a_small_file_that_was_swapped_is_not_read(root, tmp_path, name, how):
    """Replaced by a rename, written to in place, or a link now: what is read is what was checked."""
    bundle = open_bundle(root)
    data = bytearray(bundle.read_bytes(name, 1 << 20))
    data[len(data) // 2] ^= 1
    swapped = tmp_path / "swapped"
    swapped.write_bytes(data)
    if how == "replaced":
        swapped.replace(root / name)
    elif how == "written":
        (root / name).write_bytes(data)
    else:
        (root / name).unlink()
        (root / name).symlink_to(swapped)
    assert name in refused(bundle.read_bytes, name, 1 << 20)


@pytest.mark.parametrize("how", ["replaced", "written", "written, times set back", "cut", "link"])
def test_weights_that_were_swapped_are_not_loaded(root, other, how):
    """Between check and loading: another file of that size, a change in place, perhaps with its time set
    back, a cut, a link to the same content."""
    bundle = open_bundle(root)
    place, times = root / WEIGHTS, (root / WEIGHTS).stat()
    if how == "replaced":
        (other / WEIGHTS).replace(place)
    elif how.startswith("written"):
        place.write_bytes((other / WEIGHTS).read_bytes())
        if how.endswith("set back"):
            os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif how == "cut":
        os.truncate(place, 4096)
    else:
        shutil.move(place, root.parent / "moved")
        place.symlink_to(root.parent / "moved")
    assert WEIGHTS in refused(activate_now, bundle)


def activate_now(bundle) -> None:
    """Opens the reasoner, without a cache."""
    activate(bundle, "reasoner", threads=1, cache_dir=None).model.close()


def test_a_folder_in_its_place_is_not_looked_at(root, other):
    """The whole bundle is renamed away and another put there: the model is the one that was checked."""
    expected, others = first_logits(open_bundle(root)), first_logits(open_bundle(other))
    assert not np.allclose(expected, others)
    bundle = open_bundle(root)
    root.rename(root.parent / "away")
    other.rename(root)
    assert np.array_equal(first_logits(bundle), expected)


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_inside_is_swapped(root, other, link):
    """The folder of the graphs is another one, or a link to one: refused."""
    bundle = open_bundle(root)
    (root / "graphs").rename(root.parent / "graphs")
    if link:
        (root / "graphs").symlink_to(other / "graphs")
    else:
        (other / "graphs").rename(root / "graphs")
    assert "graphs" in refused(activate_now, bundle)


def test_weights_swapped_only_while_they_are_loaded(root, other, monkeypatch):
    """Other weights are there when the runtime opens the file, the right ones afterwards: refused."""
    library = session.onnxruntime
    real = library.InferenceSession

    def swapping(*arguments, **options):
        for a, b in ((root / WEIGHTS, root.parent / "kept"), (other / WEIGHTS, root / WEIGHTS)):
            a.rename(b)
        try:
            return real(*arguments, **options)
        finally:
            (root / WEIGHTS).rename(other / WEIGHTS)
            (root.parent / "kept").rename(root / WEIGHTS)

    bundle = open_bundle(root)
    session.open_session(bundle.graph(GRAPH), session.CPU, {}, 1).close()
    monkeypatch.setattr(library, "InferenceSession", swapping)
    assert "chang" in refused(session.open_session, bundle.graph(GRAPH), session.CPU, {}, 1)


CUT = """
import os, sys
import numpy as np
from edge_reasoner.activation.activate import activate
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import EdgeReasonerError

bundle = open_bundle(sys.argv[1])
model = activate(bundle, "reasoner", threads=1, cache_dir=None).decoder
cache = model.new_cache(64)
model.extend(cache, np.array([5, 6, 7]))
os.truncate(sys.argv[2], int(sys.argv[3]))
for tokens in ([8], list(range(3, 40))):
    try:
        model.extend(cache, np.array(tokens))
        sys.exit("went on")
    except EdgeReasonerError as error:
        print(error)
"""


@pytest.mark.parametrize("size_bytes", ["0", "4096"])
def test_weights_cut_while_the_model_is_open(root, size_bytes):
    """The next call says so in one line; the process does not end by SIGBUS."""
    done = subprocess.run(
        [sys.executable, "-c", CUT, root, root / WEIGHTS, size_bytes],
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert (
        done.stdout.splitlines()
        == [f"{WEIGHTS}: changed since the bundle was opened; open the bundle again"] * 2
    )


def test_descriptors_are_given_back(root):
    """Opening many bundles and models leaves no descriptor open."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no /proc here")
    first_logits(open_bundle(root))
    before = len(list(folder.iterdir()))
    for _ in range(20):
        first_logits(open_bundle(root))
        open_bundle(root).graph(GRAPH).check()
    assert len(list(folder.iterdir())) <= before
