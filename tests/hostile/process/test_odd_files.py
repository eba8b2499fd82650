"""Whatever a command is given in the place of a file: one line, exit status 2, no hang, bounded memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.answering_bundle import write_answering_bundle
from support.tiny_checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
HUGE_BYTES = 100_000_000_000
#: of address space: what the libraries reserve, and little more; of memory in use
MOST_RESERVED_BYTES, MOST_USED_BYTES = 8 << 30, 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Things that are no useful files, under their names; a bundle and a model beside them."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "empty").write_bytes(b"")
    for name in ("huge", "huge.tar", "huge.gguf", "huge.jsonl", "huge.toml"):
        with (folder / name).open("wb") as file:
            file.write(b"GGUF\x03\0\0\0" if name.endswith("gguf") else b"")
            file.truncate(HUGE_BYTES)
    for name, target in (("zero", "/dev/zero"), ("null", "/dev/null"), ("random", "/dev/urandom")):
        for end in ("", ".tar", ".gguf", ".jsonl", ".toml"):
            (folder / f"{name}{end}").symlink_to(target)
    write_answering_bundle(folder / "bundle", exact=True)
    write_checkpoint(folder / "model", num_hidden_layers=1)
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(folder)  # a socket's path must be short
        listener.bind("socket")
        yield folder
    os.chdir(ROOT)


ODD = ("zero", "null", "random", "fifo", "folder", "socket", "empty", "huge", "missing", "endless")
#: a command, FILE in the place of the odd one; the suffixed link is taken where a suffix decides
COMMANDS = {
    "ask": ["edge-reasoner", "ask", "FILE.tar", "hi"],
    "cloud": ["edge-reasoner", "cloud", "FILE.gguf", "--port", "0"],
    "batch": ["edge-reasoner", "batch", "bundle", "FILE.jsonl", "out.jsonl"],
    "eval": ["edge-reasoner", "eval", "bundle", "--data", "FILE.jsonl"],
    "validate": ["edge-reasoner", "profiles", "validate", "FILE.toml"],
    "inspect": ["edge-reasoner", "bundle", "inspect", "FILE.tar"],
    "unpack": ["edge-reasoner", "bundle", "unpack", "FILE.tar", "unpacked"],
    "pack": ["edge-reasoner", "bundle", "pack", "FILE", "packed.tar"],
    "model": ["edge-export", "FILE.gguf", "--profile", "generic-x86", "--dry-run"],
    "profile": ["edge-export", "model", "--profile", "FILE.toml", "--dry-run"],
    "calibration": [
        *("edge-export", "model", "--profile", "generic-x86", "--calibration", "FILE.jsonl"),
        *("--recipe", "int4", "--dry-run"),
    ],
    "quality": ["edge-export", "model", "--profile", "generic-x86", "--eval", "FILE", "--out", "o"],
    "preprocessor": [
        *("edge-export", "model", "--profile", "generic-x86", "--preprocessor", "FILE.gguf", "--dry-run"),
    ],
}


def _with(command: list[str], odd: str, folder: Path) -> list[str]:
    def place(word: str) -> str:
        if not word.startswith("FILE"):
            return word
        suffixed = odd + word.removeprefix("FILE")
        return suffixed if os.path.lexists(folder / suffixed) else odd

    return [place(word) for word in command]


def _pour(path: Path, stop: threading.Event) -> None:
    """Writes into a pipe for whoever opens it, for ever."""
    while not stop.is_set():
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            stop.wait(0.001)
            continue
        os.set_blocking(descriptor, True)
        try:
            while not stop.is_set():
                os.write(descriptor, b'{"prompt": "x"}\n' * 4000)
        except OSError:
            pass
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("program", ["edge-reasoner", "edge-export"])
def test_every_file_argument(program, folder, tmp_path):
    """Devices, pipes with and without an end, folders, sockets, 100 GB of nothing: status 2 and one line."""
    os.mkfifo(tmp_path / "endless")
    runs = [
        (name, odd, _with(command, odd if odd != "endless" else str(tmp_path / "endless"), folder))
        for name, command in COMMANDS.items()
        for odd in ODD
        # the reference cloud reads a model to its end before it exports it: 100 GB take their time
        if command[0] == program and (name, odd) != ("cloud", "huge")
    ]
    stop = threading.Event()
    writer = threading.Thread(target=_pour, args=(tmp_path / "endless", stop), daemon=True)
    writer.start()
    path = os.pathsep.join([str(ROOT), str(ROOT / "export")])
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/support/run_commands.py"), str(MOST_RESERVED_BYTES)],
            input=json.dumps([command for _, _, command in runs]),
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "EDGE_REASONER_CACHE": str(tmp_path / "cache"),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    finally:
        stop.set()
        writer.join(10)
    assert done.returncode == 0, done.stderr[-1500:]
    for (name, odd, _), result in zip(runs, json.loads(done.stdout), strict=True):
        assert result["status"] == 2, (name, odd, result)
        # `cloud` says before each slow step that it comes
        lines = [x for x in result["stderr"].split("\n") if x and not x.startswith(("reading", "exporting"))]
        assert len(lines) == 1 and result["stdout"] == "", (name, odd, result)
        assert result["peak_bytes"] < MOST_USED_BYTES, (name, odd, result)
    assert not (folder / "out.jsonl").exists() and not (folder / "unpacked").exists()
