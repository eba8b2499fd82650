"""Whatever ends a process, what it leaves is removed by a later run; what others still work on is not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import tiny_graphs as tiny
from support.tiny_bundle import TOKENS, decoder_golden, write_bundle

from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.contract.bundle.tar import STAGING_PREFIX, pack_bundle, unpack_bundle, unpack_bundle_to
from edge_reasoner.files import held, remove_abandoned, write_atomically
from edge_reasoner.machine.interrupts import Interrupts

ROOT = Path(__file__).resolve().parents[3]


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "export"), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE", **more}


def _killed(code: str, *arguments: object, number: int = signal.SIGKILL) -> int:
    """Runs code that kills itself with that signal at some point."""
    command = [sys.executable, "-c", code, str(int(number)), *map(str, arguments)]
    return subprocess.run(command, env=_environment(), timeout=120, check=False).returncode


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle as a .tar."""
    folder = tmp_path_factory.mktemp("sound")
    logits = np.zeros((len(TOKENS), tiny.VOCAB), np.float32)
    root = write_bundle(folder / "bundle", decoder_golden(logits, 0.1), encoder=False)
    return pack_bundle(open_bundle(root), folder / "b.tar")


WRITE = """
import os, sys
from pathlib import Path
from edge_reasoner.files import write_atomically
def parts():
    yield b"half"
    yield b"x" * 100_000
    os.kill(os.getpid(), int(sys.argv[1]))
write_atomically(Path(sys.argv[2]), parts())
"""


def test_a_temporary_file_that_was_left(tmp_path):
    """The next write to the same path removes it; a neighbour's of another name stays."""
    target = tmp_path / "answers.jsonl"
    (tmp_path / ".answers.jsonl.my-notes.tmp").write_text("not ours")
    assert _killed(WRITE, target) == -signal.SIGKILL
    assert len(_names(tmp_path)) == 2 and not target.exists()
    write_atomically(tmp_path / "other", b"1")
    assert len(_names(tmp_path)) == 3
    write_atomically(target, b"2")
    assert _names(tmp_path) == [".answers.jsonl.my-notes.tmp", "answers.jsonl", "other"]


def test_writers_of_one_path_leave_each_other_alone(tmp_path):
    """A write while another is under way: both end, none loses its file."""
    target = tmp_path / "f"

    def parts():
        yield b"slow"
        write_atomically(target, b"quick")
        yield b" and whole"

    write_atomically(target, parts())
    assert target.read_bytes() == b"slow and whole" and _names(tmp_path) == ["f"]


UNPACK = """
import os, sys
from pathlib import Path
from edge_reasoner.contract.bundle import tar
def watch(event, arguments):
    if event == "open" and "golden" in str(arguments[0]):
        os.kill(os.getpid(), int(sys.argv[1]))
sys.addaudithook(watch)
getattr(tar, sys.argv[2])(sys.argv[3], Path(sys.argv[4]))
"""


@pytest.mark.parametrize("unpack", [unpack_bundle, unpack_bundle_to], ids=lambda unpack: unpack.__name__)
def test_unpacking_that_was_killed(unpack, archive, tmp_path):
    """Into the cache or to a folder: what is left is removed by the next unpacking, however young."""
    target = tmp_path / "place"
    assert _killed(UNPACK, unpack.__name__, archive, target) == -signal.SIGKILL
    (left,) = tmp_path.rglob(f"{STAGING_PREFIX}*")
    with held(left):
        unpack(archive, target if unpack is unpack_bundle else tmp_path / "second")
        assert left.is_dir()
    unpack(archive, target if unpack is unpack_bundle else tmp_path / "third")
    if unpack is unpack_bundle:  # a sound copy was there: nothing was unpacked, and nothing looked at
        remove_abandoned(left.parent, STAGING_PREFIX)
    assert not left.exists()


TEMPORARY = """
import os, signal, sys
from edge_reasoner.activation.opening import open_bundle_at
open_bundle_at(sys.argv[2], None)
os.kill(os.getpid(), int(sys.argv[1]))
"""


def test_a_temporary_folder_that_was_left(archive, tmp_path):
    """Without a cache a bundle is unpacked to a temporary folder, which a later run removes."""
    for run in range(3):
        command = [sys.executable, "-c", TEMPORARY, str(int(signal.SIGKILL)), str(archive)]
        done = subprocess.run(command, env=_environment(TMPDIR=str(tmp_path)), timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL and len(_names(tmp_path)) == 1, run


KEEP = """
import os, sys
from pathlib import Path
from edge_export.storage.stage_cache import StageCache
def watch(event, arguments):
    if event == "os.rename" and "/entries/" in str(arguments[1]) and "/value" not in str(arguments[1]):
        os.kill(os.getpid(), int(sys.argv[1]))
sys.addaudithook(watch)
StageCache(Path(sys.argv[2])).remember("s", lambda: [int(sys.argv[3])], dict, lambda notes: {"a": 1})
"""


def test_a_stage_cache_that_was_killed(tmp_path):
    """An entry that was not finished is removed when the next is kept."""
    for number in (1, 2):
        assert _killed(KEEP, tmp_path, number) == -signal.SIGKILL
        (left,) = (tmp_path / "entries").iterdir()
        assert left.name.startswith(".new-")


def test_only_what_nobody_holds_is_removed(tmp_path):
    """Held, empty and young, of another form, links: they stay; the rest goes."""
    for name in ("held0000", "left0000", "empty000", "oldempty", "toolong00", "UPPER000"):
        (tmp_path / f".p-{name}").mkdir()
    for name in ("held0000", "left0000", "toolong00", "UPPER000"):
        (tmp_path / f".p-{name}/file").write_text("x")
    (tmp_path / ".p-link0000").symlink_to(tmp_path / ".p-toolong00")
    os.mkfifo(tmp_path / ".p-fifo0000")
    os.utime(tmp_path / ".p-oldempty", (1, 1))
    with held(tmp_path / ".p-held0000"):
        remove_abandoned(tmp_path, ".p-")
        assert _names(tmp_path) == [
            f".p-{name}" for name in ("UPPER000", "empty000", "fifo0000", "held0000", "link0000", "toolong00")
        ]
    remove_abandoned(tmp_path / "missing", ".p-")


ASK = """
import os, sys
from edge_reasoner.cli.main import main
def watch(event, arguments):
    if event == "open" and "golden" in str(arguments[0]):
        os.kill(os.getpid(), int(sys.argv[1]))
sys.addaudithook(watch)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143), (1, 129)])
def test_a_command_that_is_stopped(number, status, archive, tmp_path):
    """Status 128 + n, at most one line, and no staging folder stays."""
    command = [sys.executable, "-c", ASK, str(number), "ask", str(archive), "hi"]
    done = subprocess.run(
        command,
        env=_environment(EDGE_REASONER_CACHE=str(tmp_path), TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    said = [] if number == 2 else [f"edge-reasoner: ended by {signal.Signals(number).name}"]
    assert done.stderr.split("\n")[:-1] in (said, ["", *said]) and done.stdout == ""
    assert not list(tmp_path.rglob(f"{STAGING_PREFIX}*"))


def test_nohup_stays_nohup(archive, tmp_path):
    """A closed terminal that the caller has told to ignore ends nothing."""
    command = [sys.executable, "-c", ASK, "1", "bundle", "inspect", str(archive)]
    ignored = (
        f"import os, signal; signal.signal(1, signal.SIG_IGN); os.execv({sys.executable!r}, {command!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", ignored],
        env=_environment(EDGE_REASONER_CACHE=str(tmp_path)),
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_second_signal_of_one_stop_disturbs_no_cleaning_up():
    """A shell and the system both send SIGHUP: the second is not raised; Ctrl-C and a later one are."""
    now = [0.0]
    with Interrupts(lambda: now[0]) as interrupts:
        for wait_s, number, raised in (
            (0, 1, True),
            (0.5, 1, False),
            (0, 15, False),
            (0, 2, True),
            (9, 15, True),
        ):
            now[0] += wait_s
            caught = False
            try:
                with contextlib.suppress(ValueError):
                    signal.raise_signal(number)
                    time.sleep(0)
            except KeyboardInterrupt:
                caught = True
            assert caught is raised, (wait_s, number)
        assert interrupts.seen == signal.SIGHUP and interrupts.exit_status == 129
