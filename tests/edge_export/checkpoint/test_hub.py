"""MODEL → path: local paths, and Hub ids against real servers on loopback that refuse in every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_export.checkpoint.hub import resolve_model
from edge_reasoner.errors import CheckpointError

#: the Hub library reads its endpoint when it is imported, so each endpoint needs a process
_SCRIPT = """
import json, sys
from edge_export.checkpoint.hub import resolve_model
from edge_reasoner.errors import CheckpointError
for model in sys.argv[1:]:
    try:
        print(json.dumps(["path", str(resolve_model(model))]))
    except CheckpointError as error:
        print(json.dumps(["error", str(error)]))
"""
COMMIT = "0" * 40
CONFIG = b'{"model_type": "llama"}'


def resolve_at(endpoint: str, home: Path, *models: str) -> list[list[str]]:
    """What `resolve_model` says for each model when the Hub is at `endpoint`."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", _SCRIPT, *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


class _Hub(BaseHTTPRequestHandler):
    """A Hub with one model, `good/model`; other owners' names say how it refuses."""

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        if "gated/" in self.path:
            self._answer(403, b"{}", X_Error_Code="GatedRepo")
        elif "garbage/" in self.path:
            self._answer(200, b"<html>")
        elif "good/model" not in self.path:
            self._answer(404, b"{}", X_Error_Code="RepoNotFound")
        elif "/tree/" in self.path:
            files = [{"type": "file", "path": "config.json", "size": len(CONFIG), "oid": "1" * 40}]
            self._answer(200, json.dumps(files).encode(), Content_Type="application/json")
        elif "/api/" in self.path:
            info = {"id": "good/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
            self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            self._answer(200, CONFIG, ETag='"' + "1" * 40 + '"', X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The endpoint of a running `_Hub`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_existing_paths_win(tmp_path):
    """What exists is opened as it is."""
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "model", ["nope", "../a/b", "a/b/c", "a b/c", "a/b/../c.bin", "missing.gguf", "x" * 5000, "~nobody9/x"]
)
def test_neither_path_nor_id(model, tmp_path, monkeypatch):
    """What is neither a path nor a Hub id says what is allowed, without asking anybody."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"owner/name or owner/name/file\.gguf"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["", "  "])
def test_an_empty_name_is_not_this_folder(model):
    """An unset variable of a script does not export what lies in the current folder."""
    with pytest.raises(CheckpointError, match="the model is an empty name"):
        resolve_model(model)


def test_unreachable_hub(tmp_path):
    """Nobody listens: one clear line for a repository and for a file of one."""
    for kind, text in resolve_at("http://127.0.0.1:9", tmp_path, "a/b", "a/b/c.gguf"):
        assert kind == "error" and "the Hub cannot be reached" in text and "\n" not in text


def test_hub_answers(hub, tmp_path):
    """A model is downloaded; unknown, gated and garbled ones, and a missing file, are one clear line each."""
    models = ["good/model", "no/such", "gated/model", "garbage/model", "good/model/x.gguf"]
    good, unknown, gated, garbage, missing = resolve_at(hub, tmp_path, *models)
    assert good[0] == "path" and (Path(good[1]) / "config.json").read_bytes() == CONFIG
    assert unknown == ["error", "no/such: not a local path, and the Hub has no such public model"]
    assert gated == ["error", "gated/model: the Hub wants its licence accepted first; then set HF_TOKEN"]
    assert garbage[0] == "error" and garbage[1].startswith("garbage/model: ") and "\n" not in garbage[1]
    assert missing == ["error", "good/model: the Hub's repository has no file 'x.gguf'"]


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-that-name/m.gguf", "a\0b"])
def test_names_that_cannot_be_paths(name):
    """Too long, of a user that is not there, with a NUL: a line of our own."""
    with pytest.raises(CheckpointError, match="no such file or directory"):
        resolve_model(name)
