"""A candidate that hangs, crashes or takes all memory in its self-test fails there; nothing else does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import tiny_graphs
from support.sequences import OneSequence
from support.tiny_bundle import TOKENS, decoder_golden, write_bundle

from edge_reasoner.activation.activate import activate
from edge_reasoner.activation.trials import Confinement
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import VerificationError
from edge_reasoner.machine.confined import python_command

pytestmark = pytest.mark.skipif(not python_command(), reason="no child process can be started here")

CHILD = Path(__file__).resolve().parents[2] / "support/misbehaving_trial.py"
GUARD_S = 120


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A sound bundle: int4, and fp32 as the reference."""
    folder = tmp_path_factory.mktemp("selftest")
    path = tiny_graphs.save(tiny_graphs.decoder_model(tiny_graphs.weights()), folder / "g.onnx")
    sequence = OneSequence(OrtDecoder(path, tiny_graphs.decoder_spec()))
    logits = sequence.extend(np.array(TOKENS), len(TOKENS)).copy()
    return write_bundle(folder / "bundle", decoder_golden(logits, 0.15), encoder=False)


def confined(how: str, variant: str, **limits) -> Confinement:
    """Self-tests in which that variant's child misbehaves so."""
    return Confinement(python=(sys.executable, str(CHILD), how, variant), **limits)


def start(root: Path, confinement: Confinement):
    """Activates without a cache."""
    return activate(open_bundle(root), "reasoner", threads=1, cache_dir=None, confinement=confinement)


FAILURES = {
    "hangs": "took longer than 10 s",
    "eats memory": "took more than the 200 MB",
    "asks for all memory": "MemoryError",
    "floods": "said more than was asked for",
    "talks": "many words",
    "SIGSEGV": "ended by SIGSEGV",
    "SIGILL": "ended by SIGILL",
    "SIGABRT": "ended by SIGABRT",
    "SIGBUS": "ended by SIGBUS",
    "SIGKILL": "ended by SIGKILL",
    "says": "",
    "says {}": "",
    "says [1]": "an answer that is none",
    "says nonsense \udcff": "",
    'says {"step_ms": 1e400}': "an answer that is none",
    'says {"step_ms": -1}': "an answer that is none",
    'says {"evil": 1}': "an answer that is none",
    'says {"failure": "\\u001b[2J broken"}': "[2J broken",
}


@pytest.mark.parametrize("how", [how for how, reason in FAILURES.items() if reason])
def test_one_candidate_fails_and_the_other_is_taken(root, how):
    """Whatever its child does: its report says how it failed, in one printable line; the next one serves."""
    limits = {"candidate_s": 10.0, "total_s": float(GUARD_S)} if how == "hangs" else {}
    if how == "eats memory":
        limits["memory_bytes"] = 200_000_000
    result = start(root, confined(how, "int4", **limits))
    try:
        assert result.activation.variant_id == "fp32"
        reports = [report for report in result.activation.reports if report.variant_id == "int4"]
        for report in reports:
            assert not report.passed and report.step_ms is None
            assert FAILURES[how] in report.reason and report.reason.isprintable() and len(report.reason) < 400
        assert reports
    finally:
        result.model.close()


@pytest.mark.parametrize("how", ["hangs", "spins"])
def test_when_all_fail_the_total_time_is_heeded(root, how):
    """However many candidates hang, the whole test ends, and names each with its reason."""
    begun_s = time.monotonic()
    with pytest.raises(VerificationError, match="took longer than") as error:
        start(root, confined(how, "any", candidate_s=1.0, total_s=1.5))
    assert "not tried: the time for all tests is over" in str(error.value)
    assert time.monotonic() - begun_s < GUARD_S


def test_an_answer_without_content_is_no_pass(root):
    """`{}` passes no test: no step time, no choice."""
    with pytest.raises(VerificationError):
        start(root, confined("says {}", "any"))


def test_a_child_fills_no_disk(root, tmp_path, monkeypatch):
    """At most a megabyte, wherever a graph would make the library write."""
    target = tmp_path / "written"
    monkeypatch.setenv("MISBEHAVING_FILE", str(target))
    with pytest.raises(VerificationError, match="File too large"):
        start(root, confined("writes a file", "any"))
    assert not target.exists() or target.stat().st_size <= 1 << 20


@pytest.mark.parametrize(
    "python", [(), ("/nonexistent/python",), (sys.executable, str(CHILD), "no python", "any")]
)
def test_without_child_processes_the_test_runs_here(root, python):
    """Embedded in another program, or where no process can be started: the choice is made all the same."""
    result = start(root, Confinement(python=python))
    assert result.activation.variant_id == "int4"
    result.model.close()


def test_the_real_child_is_ended_too(root):
    """The limits on time and memory hold for the real graph and runtime."""
    with pytest.raises(VerificationError, match=r"took longer than 0\.001 s"):
        start(root, Confinement(candidate_s=0.001, total_s=GUARD_S))
    with pytest.raises(VerificationError, match="took more than the 1 MB"):
        start(root, Confinement(memory_bytes=1_000_000))


def test_nothing_is_left(root):
    """Neither descriptors nor processes, after failures of every kind."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no /proc here")
    before, others = len(list(folder.iterdir())), set(children(os.getpid()))
    for how in ("SIGSEGV", "hangs", "floods"):
        with pytest.raises(VerificationError):
            start(root, confined(how, "any", candidate_s=1.0, total_s=1.0))
    assert len(list(folder.iterdir())) <= before
    assert not set(children(os.getpid())) - others


def children(pid: int) -> list[int]:
    """Processes of which that one is the parent."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


PROGRAM = """
import sys
from edge_reasoner.activation.activate import activate
from edge_reasoner.activation.trials import Confinement
from edge_reasoner.contract.bundle.open import open_bundle

confinement = Confinement(python=(sys.executable, *sys.argv[2:]))
print("open", flush=True)
activate(open_bundle(sys.argv[1]), "reasoner", threads=1, cache_dir=None, confinement=confinement)
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL", "SIGTERM"])
def test_a_stop_ends_the_child_as_well(root, how):
    """Ctrl-C while a candidate hangs ends the test at once; a killed application leaves no child behind."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
    command = [sys.executable, "-c", PROGRAM, root, CHILD, "hangs", "any"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            hanging = wait_for(lambda: [c for c in children(process.pid) if ignores_interrupts(c)])
            process.send_signal(getattr(signal, how))
            _, errors = process.communicate(timeout=GUARD_S)
        finally:
            process.kill()
    assert process.returncode == -getattr(signal, how), errors
    assert wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in hanging))


def ignores_interrupts(pid: int) -> bool:
    """Whether the child has come to where it hangs."""
    try:
        found = re.search(r"^SigIgn:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and bool(int(found[1], 16) >> (signal.SIGINT - 1) & 1)


def wait_for(condition):
    """The first true value of `condition()`."""
    for _ in range(GUARD_S * 20):
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come")
