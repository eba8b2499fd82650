"""The device's side is opened when something needs it: what is broken there never stops mode cloud."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.answering_bundle import write_answering_bundle
from support.hostile_cloud import GOOD, hostile_cloud, send
from support.local_models import scripted_model
from support.tiny_bundle import relist

from edge_reasoner.errors import BackendError, BundleError, EdgeReasonerError, InputError
from edge_reasoner.gate.policy import Policy
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.device import Device, DeviceParts
from edge_reasoner.reasoner import Reasoner

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with nothing wrong."""
    return write_answering_bundle(tmp_path_factory.mktemp("device") / "bundle")


def _graph(root: Path) -> str:
    manifest = json.loads((root / "manifest.json").read_text())
    (reasoner,) = (part for part in manifest["components"] if part["kind"] == "reasoner")
    return str(reasoner["variants"][0]["graph"])


def _forged(relative: str, data: bytes) -> Callable[[Path], None]:
    """A file whose content is `data`, and a manifest that says so."""

    def act(root: Path) -> None:
        (root / relative).write_bytes(data)
        relist(root, relative)

    return act


def _forged_graph(root: Path) -> None:
    _forged(_graph(root), b"\x08\x09no graph at all")(root)


BROKEN: dict[str, Callable[[Path], None]] = {
    "tokenizer": _forged("tokenizer/reasoner/tokenizer.json", b"{"),
    "tokenizer config": _forged("tokenizer/reasoner/tokenizer_config.json", b"[1"),
    "preprocessor's tokenizer": _forged("tokenizer/preprocessor/tokenizer.json", b'{"model": 5}'),
    "golden vectors": _forged("golden/reasoner.json", b"null"),
    "graph": _forged_graph,
    "changed file": lambda root: (root / _graph(root)).write_bytes(b"x"),
    "missing file": lambda root: (root / "tokenizer/reasoner/tokenizer.json").unlink(),
    "manifest": lambda root: (root / "manifest.json").write_text("{}"),
    "empty folder": lambda root: (shutil.rmtree(root), root.mkdir()),
    "a file that is no archive": lambda root: (shutil.rmtree(root), root.write_bytes(b"junk")),
}


@pytest.mark.parametrize("flaw", list(BROKEN))
def test_mode_cloud_needs_nothing_of_the_device(flaw: str, whole: Path, tmp_path: Path) -> None:
    """Opened with mode cloud, a broken bundle's cloud answers, chats and streams; every other mode says what
    is wrong, at its first query or at `open`."""
    root = tmp_path / "bundle"
    shutil.copytree(whole, root)
    BROKEN[flaw](root)
    cache = tmp_path / "cache"
    with hostile_cloud(send(GOOD)) as server:
        options = {"cloud_model": "big", "threads": 1, "cache_dir": cache, "environment": {}}
        with Reasoner.open(root, server.url, mode="cloud", **options) as reasoner:
            answer = reasoner.ask("hello")
            assert (answer.text, answer.source, answer.cost.joules) == ("Hello", "cloud", 0.0)
            assert answer.usage.completion_tokens > 0 and reasoner.activation is None
            assert (reasoner.name, reasoner.context_tokens) == ("big", None)
            assert "".join(reasoner.stream("hello")) == "Hello"
            with reasoner.session() as chat:
                assert [chat.ask("hello").text for _ in range(2)] == ["Hello"] * 2
            with pytest.raises(EdgeReasonerError):
                reasoner.ask("hello", mode="local")
            assert reasoner.ask("hello").text == "Hello"
        with pytest.raises(EdgeReasonerError):
            Reasoner.open(root, server.url, mode="auto", **options)


def test_a_bundle_that_is_not_there_is_a_slip_in_every_mode(tmp_path: Path) -> None:
    """A name that leads nowhere is said at once."""
    with pytest.raises(BundleError, match="no such bundle"):
        Reasoner.open(tmp_path / "nowhere", "http://127.0.0.1:9/v1", mode="cloud")


def test_the_owners_rules_hold_without_the_device(tmp_path: Path) -> None:
    """Private text and `local_only` keep mode cloud from asking, though nothing of the bundle can be read."""
    for policy in (Policy(), Policy(local_only=True)):
        with (
            hostile_cloud(send(GOOD)) as server,
            Reasoner.open(tmp_path, server.url, mode="cloud", cloud_model="m", policy=policy) as reasoner,
        ):
            with pytest.raises(InputError, match="not allowed"):
                reasoner.ask("my password is hunter2")
            assert not server.requests


def test_a_healthy_bundle_is_opened_by_the_first_other_mode(whole: Path, tmp_path: Path) -> None:
    """Mode cloud opens nothing; `mode="local"` then does, once."""
    with (
        hostile_cloud(send(GOOD)) as server,
        Reasoner.open(
            whole, server.url, mode="cloud", cloud_model="m", threads=1, cache_dir=tmp_path
        ) as reasoner,
    ):
        assert reasoner.ask("hello").source == "cloud" and reasoner.activation is None
        assert not list(tmp_path.iterdir())
        assert reasoner.ask("hello", mode="local", max_tokens=2).source == "local"
        assert reasoner.activation is not None


NO_RUNTIME = """
import sys
sys.modules["onnxruntime"] = None  # as where it is not installed: an import fails
from edge_reasoner.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_without_a_runtime(whole: Path, tmp_path: Path) -> None:
    """`ask`, `batch` and `eval` with --mode cloud work where onnxruntime is not installed; auto says so."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "questions.jsonl").write_text('{"question": "hello?", "answer": "Hello"}\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EDGE_REASONER_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", NO_RUNTIME, *arguments, "--cloud", server.url, "--cloud-model", "m"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=100, env=environment, check=False
        )

    with hostile_cloud(send(GOOD)) as server:
        asked = run("ask", str(whole), "hello", "--mode", "cloud", "--json")
        assert (asked.returncode, json.loads(asked.stdout)["text"]) == (0, "Hello"), asked.stderr
        rows = run("batch", str(whole), *(str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")),
                   "--mode", "cloud")  # fmt: skip
        assert rows.returncode == 0 and "Hello" in (tmp_path / "out.jsonl").read_text(), rows.stderr
        scored = run(
            "eval", str(whole), "--data", str(tmp_path / "questions.jsonl"), "--mode", "cloud", "--json"
        )
        assert (scored.returncode, json.loads(scored.stdout)["accuracy"]) == (0, 1.0), scored.stderr
        auto = run("ask", str(whole), "hello", "--mode", "auto")
        assert auto.returncode == 1 and "onnxruntime cannot be imported" in auto.stderr, auto.stderr


def test_eval_of_the_cloud_with_a_bundle_that_cannot_be_opened(tmp_path: Path) -> None:
    """The figures are the cloud's; the bundle's name is unknown."""
    (tmp_path / "questions.jsonl").write_text('{"question": "hello?", "answer": "Hello"}\n')
    with hostile_cloud(send(GOOD)) as server:
        command = [
            sys.executable,
            "-c",
            "import sys; from edge_reasoner.cli.main import main; sys.exit(main())",
            "eval",
        ]
        command += [str(tmp_path), "--mode", "cloud", "--data", str(tmp_path / "questions.jsonl")]
        command += ["--cloud", server.url, "--cloud-model", "m", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=100, env=environment, check=False
        )
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert (document["accuracy"], document["bundle_id"]) == (1.0, None)


def _parts() -> DeviceParts:
    return DeviceParts(scripted_model({}), Preprocessor(None, None, clock=time.perf_counter))


def test_it_opens_once_and_again_after_a_failure() -> None:
    """Many threads share one opening; an error is the caller's, and the next one tries again."""
    opened, failures = [], [BackendError("busy")]

    def open_parts() -> DeviceParts:
        if failures:
            raise failures.pop()
        opened.append(_parts())
        return opened[-1]

    device = Device(open_parts)
    with pytest.raises(BackendError, match="busy"):
        _ = device.parts
    assert device.opened is None
    got: list[DeviceParts] = []
    threads = [threading.Thread(target=lambda: got.append(device.parts)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(opened) == 1 and got == opened * 8 == [device.opened] * 8
    device.close()


def test_a_closed_device_is_not_opened() -> None:
    """After `close` nothing is opened any more, and closing twice is fine."""
    device = Device(_parts)
    device.close()
    device.close()
    with pytest.raises(BackendError, match="closed"):
        _ = device.parts
