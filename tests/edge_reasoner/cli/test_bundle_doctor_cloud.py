"""`bundle`, `doctor` and `cloud` as typed."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import httpx
import pytest
from support.answering_bundle import write_answering_bundle

from edge_reasoner.client import InferenceClient

VERIFY_KEYS = {"path", "bundle_id", "ok", "files", "size_bytes", "golden", "seconds"}
DOCTOR_KEYS = {"machine", "allowance", "versions", "import_probe", "bundle", "cache_dir", "warnings"}


@pytest.fixture(scope="session")
def wrong_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Intact, but no kernel reproduces its golden vectors."""
    return write_answering_bundle(tmp_path_factory.mktemp("wrong") / "bundle", wrong_golden=True)


@pytest.fixture
def corrupt_bundle(answering_bundle: Path, tmp_path: Path) -> Path:
    """One flipped byte in the weights."""
    root = shutil.copytree(answering_bundle, tmp_path / "corrupt")
    data = root / "graphs/int4.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    return root


def test_inspect(run, answering_bundle) -> None:
    """The manifest as an object, whole or one component; a table for people."""
    document = json.loads(run("bundle", "inspect", answering_bundle, "--json").out)
    manifest = json.loads((answering_bundle / "manifest.json").read_bytes())
    assert set(document) == set(manifest) | {"path", "signed", "size_bytes"}
    sizes = [path.stat().st_size for path in answering_bundle.rglob("*") if path.is_file()]
    assert document["size_bytes"] == sum(sizes) - (answering_bundle / "manifest.json").stat().st_size
    part = json.loads(run("bundle", "inspect", answering_bundle, "--component", "preprocessor", "--json").out)
    assert [component["kind"] for component in part["components"]] == ["preprocessor"]
    assert "no component 'draft'" in run("bundle", "inspect", answering_bundle, "--component", "draft").err
    assert "reasoner" in run("bundle", "inspect", answering_bundle).out


def test_tar(run, answering_bundle, tmp_path) -> None:
    """A packed bundle is taken wherever a directory is, answers the same, and unpacks to the same files."""
    archive, again = tmp_path / "my.bundle.tar", tmp_path / "again"
    packed = json.loads(run("bundle", "pack", answering_bundle, archive, "--json").out)
    assert packed["size_bytes"] == archive.stat().st_size and packed["files"] == 12
    assert run("bundle", "unpack", archive, again).status == 0
    assert {path.relative_to(again) for path in again.rglob("*")} == {
        path.relative_to(answering_bundle) for path in answering_bundle.rglob("*")
    }
    assert "exists already" in run("bundle", "pack", answering_bundle, archive).fails_in_one_line(2)
    answers = [run("ask", place, "hi", "--max-tokens", 4).out for place in (answering_bundle, archive)]
    assert answers[0] == answers[1] != ""
    with InferenceClient(endpoint=archive) as client:
        reply = client.infer("hi", {"max_tokens": 4})
    assert f"{reply.choices[0].text}\n" == answers[0]
    inspected = json.loads(run("bundle", "inspect", archive, "--json").out)
    assert inspected["bundle_id"] == packed["bundle_id"]
    assert json.loads(run("bundle", "verify", archive, "--json").out)["ok"] is True
    assert run("doctor", archive).status == 0
    archive.write_bytes(archive.read_bytes()[:2000])
    run("ask", archive, "hi").fails_in_one_line(2)


def test_verify(run, answering_bundle, corrupt_bundle, wrong_bundle) -> None:
    """Intact: 0. A flipped byte: 2, one line with the file. Golden vectors not reproduced: 3."""
    document = json.loads(run("bundle", "verify", answering_bundle, "--json").out)
    assert set(document) == VERIFY_KEYS and document["ok"] is True and document["files"] == 12
    assert [part["variant"] for part in document["golden"]] == ["int4", "encoder"]
    assert "int4.onnx.data" in run("bundle", "verify", corrupt_bundle, "--json").fails_in_one_line(2)
    ran = run("bundle", "verify", wrong_bundle, "--json")
    assert ran.status == 3 and json.loads(ran.out)["ok"] is False and "golden" in ran.err
    assert run("bundle", "verify", wrong_bundle, "--component", "preprocessor").status == 0
    assert json.loads(run("bundle", "verify", wrong_bundle, "--no-run", "--json").out)["golden"] is None


def test_wrong_kernels_never_answer(run, wrong_bundle) -> None:
    """A bundle whose golden vectors are not reproduced is not used: status 3, one line."""
    assert "golden vectors" in run("ask", wrong_bundle, "hello").fails_in_one_line(3)


def test_doctor(run, answering_bundle, wrong_bundle, corrupt_bundle) -> None:
    """The machine alone, or with a bundle the kernels tried and chosen; 3 where none is right."""
    document = json.loads(run("doctor", "--json").out)
    assert set(document) == DOCTOR_KEYS and document["bundle"] is None
    assert document["import_probe"]["safe"] and document["versions"]["onnxruntime"]
    run("ask", answering_bundle, "x", "--max-tokens", 1)
    document = json.loads(run("doctor", answering_bundle, "--json").out)
    reasoner = document["bundle"]["components"][0]
    assert (reasoner["origin"], reasoner["variant"]) == ("cache", "int4")
    assert {row["variant_id"] for row in reasoner["candidates"]} >= {"int4"}
    assert all(row["step_ms"] > 0 for row in reasoner["candidates"] if row["passed"])
    again = json.loads(run("doctor", answering_bundle, "--retest", "--json").out)
    assert again["bundle"]["components"][0]["origin"] == "run"
    assert "chosen" in run("doctor", answering_bundle).out
    ran = run("doctor", wrong_bundle, "--json")
    assert ran.status == 3 and json.loads(ran.out)["bundle"]["components"][0]["problem"]
    run("doctor", corrupt_bundle).fails_in_one_line(2)


def _serve(spawn, *arguments: object) -> tuple[object, str]:
    process = spawn("cloud", *arguments, "--port", 0)
    heard = []
    for line in process.stderr:
        heard.append(line)
        if found := re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+/v1)\n", line):
            return process, found[1]
    raise AssertionError(f"ended without listening: {heard}")


def test_cloud_serves_a_bundle(spawn, run, answering_bundle, monkeypatch) -> None:
    """It says where it listens, demands the token, answers `ask --cloud`, and Ctrl-C ends it cleanly."""
    monkeypatch.setenv("TOKEN", "secret")
    process, url = _serve(spawn, answering_bundle, "--name", "big", "--auth-token-env", "TOKEN")
    assert httpx.get(f"{url}/models").status_code == 401
    ran = run("ask", answering_bundle, "hi", "--cloud", url, "--mode", "cloud", "--api-key-env", "TOKEN",
              "--max-tokens", 4, "--json")  # fmt: skip
    assert (json.loads(ran.out)["source"], json.loads(ran.out)["model"]) == ("cloud", "big")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error


def test_cloud_exports_a_checkpoint_once(spawn, tmp_path, monkeypatch) -> None:
    """A checkpoint goes through the installed exporter's entry point; the second time its bundle is there."""
    from support.tiny_checkpoints import write_checkpoint

    monkeypatch.setenv("EDGE_REASONER_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    write_checkpoint(model)
    process, url = _serve(spawn, model)
    assert httpx.get(f"{url}/models").json()["data"][0]["id"]
    process.kill()
    (bundle,) = (tmp_path / "cache/reference").iterdir()
    written_ns = (bundle / "manifest.json").stat().st_mtime_ns
    _serve(spawn, model)
    assert list((tmp_path / "cache/reference").iterdir()) == [bundle]
    assert (bundle / "manifest.json").stat().st_mtime_ns == written_ns


def test_cloud_refusals(run, answering_bundle, corrupt_bundle, tmp_path) -> None:
    """No such model, a corrupt bundle, a bad port or address, an unset token: one line and status 2."""
    assert "no such bundle" in run("cloud", tmp_path / "none").fails_in_one_line(2)
    assert "SHA-256" in run("cloud", corrupt_bundle).fails_in_one_line(2)
    assert "--port" in run("cloud", answering_bundle, "--port", 70000).fails_in_one_line(2)
    assert "listen" in run("cloud", answering_bundle, "--host", "no.such.host.invalid").fails_in_one_line(2)
    assert "UNSET" in run("cloud", answering_bundle, "--auth-token-env", "UNSET").fails_in_one_line(2)


def test_cloud_without_its_extras(spawn, answering_bundle, tmp_path, monkeypatch) -> None:
    """Without starlette or an exporter installed it says what to install."""
    (tmp_path / "starlette").mkdir()
    (tmp_path / "starlette/__init__.py").write_text("raise ModuleNotFoundError('none', name='starlette')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = spawn("cloud", answering_bundle)
    assert "install edge-reasoner[server]" in process.communicate(timeout=60)[1] and process.returncode == 2
