"""The end of a process and its children: with an answer under way, the way out is prompt and quiet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.answering_bundle import write_answering_bundle

TESTS = Path(__file__).resolve().parents[2]
TIMEOUT_S = 100

#: an answer that never ends by itself: whoever waits for it does not come out
ENDLESS = """
import contextlib, os, sys, threading
from support.watched_model import echo, engine_of
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.errors import BackendError

engine = engine_of(echo(context_tokens=10**9))
stream = engine.submit([50, 51], SamplingParams(max_tokens=None))
next(stream)
"""

REAL = """
import contextlib, sys, threading
from edge_reasoner import Reasoner

reasoner = Reasoner.open(sys.argv[1], mode="local", threads=2, cache_dir=sys.argv[2])
streams = [reasoner.stream(f"question {i}", max_tokens=1200) for i in range(40)]
for stream in streams[:5]:
    next(stream)
"""

WAYS_OUT = {
    "end of the script": "",
    "sys.exit while reading": "for piece in stream: sys.exit(0)",
    "sys.exit in a function": "def f():\n    for piece in stream: sys.exit()\nf()",
    "a daemon thread reads": (
        "from edge_reasoner.errors import BackendError\n"
        "def read():\n    with contextlib.suppress(BackendError): list(stream)\n"
        "threading.Thread(target=read, daemon=True).start()"
    ),
    "a cycle holds it": "cycle = [stream, engine] if 'engine' in dir() else [stream]; cycle.append(cycle)",
    "closed first": "(engine if 'engine' in dir() else reasoner).close()",
    "dropped first": "del stream",
}


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    )


@pytest.mark.parametrize("way", list(WAYS_OUT))
def test_exit_with_an_endless_answer(way: str) -> None:
    """Status 0, nothing on standard error, and an end at all."""
    ran = _run(f"{ENDLESS}\n{WAYS_OUT[way]}\n")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for onnxruntime."""
    return write_answering_bundle(tmp_path_factory.mktemp("exit") / "bundle")


@pytest.mark.parametrize("way", ["end of the script", "sys.exit while reading", "a daemon thread reads"])
def test_exit_with_onnxruntime_at_work(bundle: Path, tmp_path: Path, way: str) -> None:
    """The same with native threads inside the model."""
    ran = _run(f"{REAL}\n{WAYS_OUT[way]}\n", str(bundle), str(tmp_path))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_an_error_of_the_script_is_all_that_is_shown() -> None:
    """An exception that ends the script keeps its own traceback and status."""
    ran = _run(f"{ENDLESS}\nraise SystemError('of the script')\n")
    assert ran.returncode == 1 and ran.stderr.count("Traceback") == 1
    assert ran.stderr.endswith("SystemError: of the script\n")


FORK = """
import gc, warnings
warnings.simplefilter("ignore", DeprecationWarning)

def refused(act):
    try:
        act()
    except BackendError as error:
        return "before this process was forked" in str(error)
    return False

child = os.fork()
if child == 0:
    fine = [
        refused(lambda: engine.submit([50], SamplingParams())),
        refused(lambda: next(stream)),
        refused(stream.result),
    ]
    stream.cancel()
    stream.close()
    engine.close()
    del stream, engine
    gc.collect()
    print("child", fine, flush=True)
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
for _ in range(100):
    next(stream)
other = engine.submit([60], SamplingParams(max_tokens=2))
print("parent", other.result().token_ids, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_refused_and_the_parent_goes_on() -> None:
    """The child gets errors, not locks that nobody opens, and ends as usual; the parent is untouched."""
    ran = _run(f"{ENDLESS}\n{FORK}")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "child [True, True, True]\nparent (60, 60)\n"


ENDS = ("leave", "close", "drop", "open_own")

REAL_FORK = """
import contextlib, gc, multiprocessing, os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
from pathlib import Path
from edge_reasoner import Reasoner
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.backends.onnxruntime.encoder import OrtEncoder
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import BackendError

def opened():
    return Reasoner.open(sys.argv[1], mode="local", threads=2, cache_dir=sys.argv[2])

def refused(act):
    try:
        act()
    except BackendError as error:
        return "before this process was forked" in str(error)
    return False

bundle = open_bundle(sys.argv[1])
parts = {kind: bundle.component(kind) for kind in ("reasoner", "preprocessor")}
graphs = {kind: bundle.path_of(part.variants[0].graph) for kind, part in parts.items()}
decoder = OrtDecoder(graphs["reasoner"], parts["reasoner"].spec, threads=2)
encoder = OrtEncoder(graphs["preprocessor"], parts["preprocessor"].spec, threads=2)
cache = decoder.new_cache()
decoder.extend(cache, np.array([5, 6, 7]))
encoder.embed([[5, 6, 7]])
reasoner = opened()
expected = reasoner.ask("first", max_tokens=4).text
stream = reasoner.stream("question", max_tokens=1200)
next(stream)

def child(end):
    signal.alarm(60)  # the system's own end of a process that hangs, also in native code
    fine = [
        refused(lambda: reasoner.ask("x", max_tokens=2)),
        refused(lambda: next(stream)),
        refused(lambda: decoder.extend(cache, np.array([5]))),
        refused(decoder.new_cache), refused(cache.fork), refused(cache.save),
        refused(lambda: encoder.embed([[5, 6]])),
    ]
    end()
    print("child", all(fine), flush=True)

def leave():
    pass

def close():
    for thing in (stream, cache, encoder, decoder, reasoner, reasoner):
        thing.close()

def drop():
    global stream, cache, encoder, decoder, reasoner
    del stream, cache, encoder, decoder, reasoner
    gc.collect()

def open_own():
    close()
    with opened() as own:
        assert own.ask("first", max_tokens=4).text == expected

def forked(end):
    number = os.fork()
    if number == 0:
        child(end)
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

def multiprocessed(end):
    process = multiprocessing.get_context("fork").Process(target=child, args=(end,))
    process.start()
    process.join()
    return process.exitcode

for way in (forked, multiprocessed):
    for end in (leave, close, drop, open_own):
        print(way.__name__, end.__name__, way(end), flush=True)
assert next(stream) is not None and reasoner.ask("first", max_tokens=4).text == expected
print("parent", decoder.extend(cache, np.array([8])).logits.shape == (1, decoder.vocab_size))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_forked_with_onnxruntime_open_ends(bundle: Path, tmp_path: Path) -> None:
    """Whether it leaves the parent's models, closes or drops them, or opens its own; decoder and encoder."""
    ran = _run(REAL_FORK, str(bundle), str(tmp_path))
    assert (ran.returncode, ran.stderr) == (0, "")
    ways = [f"{way} {end} 0" for way in ("forked", "multiprocessed") for end in ENDS]
    assert ran.stdout.splitlines() == [line for way in ways for line in ("child True", way)] + ["parent True"]
