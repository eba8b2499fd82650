"""The commands are no way around the owner's rules: nothing leaves, and what is printed is clean."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import pytest
from hostile.privacy.planting import compact, readings, secrets
from support.hostile_cloud import GOOD, hostile_cloud, send

from edge_reasoner.cli.main import main

QUESTION = "Why is the sky blue?"
SECRETS = [secret for secret, _ in zip(secrets(random.Random(9)), range(12), strict=False)]


def _arguments(command: str, folder: Path, prompt: str) -> tuple[list[str], bytes]:
    """A command that asks `prompt`, and its standard input."""
    bundle = folder / "bundle"
    bundle.mkdir(exist_ok=True)
    rows = folder / "in.jsonl"
    if command == "eval":
        rows.write_text(json.dumps({"question": prompt, "answer": "5"}) + "\n", encoding="utf-8")
        return ["eval", str(bundle), "--data", str(rows)], b""
    if command == "batch":
        rows.write_text(json.dumps({"prompt": prompt}) + "\n", encoding="utf-8")
        return ["batch", str(bundle), str(rows), str(folder / "out.jsonl")], b""
    if command == "ask":
        return ["ask", str(bundle), prompt], b""
    return [command, str(bundle)], prompt.replace("\n", " ").encode() + b"\n"


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Runs a command in mode cloud, which needs nothing of the bundle; status and all that was printed."""
    monkeypatch.setenv("EDGE_REASONER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(command: str, url: str, prompt: str) -> tuple[int, str]:
        arguments, stdin = _arguments(command, tmp_path, prompt)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = main(["--debug", *arguments, "--cloud", url, "--cloud-model", "m", "--mode", "cloud"])
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.mark.parametrize("command", ["ask", "chat", "batch", "eval"])
def test_commands_send_no_secret(run, command: str) -> None:
    """Each ends with status 2 and a reason; a harmless question passes."""
    with hostile_cloud(send(GOOD)) as server:
        for secret in SECRETS:
            status, printed = run(command, server.url, f"{QUESTION} {secret.text}")
            assert status == 2 and "private: the prompt holds a" in printed, secret
            assert secret.core not in compact(printed), secret
        assert not server.requests
        assert run(command, server.url, QUESTION)[0] == 0
        assert any("sky blue" in text for text in readings(server.requests[0]))
