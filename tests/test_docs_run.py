"""README's command lines and Python, and the sample, run as they stand, on tiny models.

What they print is shown elsewhere; here each has to exist, to take its arguments and to end well.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_berts import make_bert
from support.tiny_checkpoints import write_checkpoint

from edge_export.cli import main as edge_export
from edge_reasoner.cli.main import main as edge_reasoner

ROOT = Path(__file__).resolve().parents[1]
MODEL, ENCODER = "SmolLM2-135M-Instruct.Q4_1.gguf", "all-MiniLM-L6-v2"
#: a folder in the place of the file
STAND_IN = "stand-in"
CLOUD = "http://127.0.0.1:9000/v1"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    """README's fenced blocks in that language; "": plain ones."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return [body for found, body in FENCE.findall(readme) if found == language]


def command_lines() -> list[list[str]]:
    """Every command line of the two programs, as words, in README's order, but for the one that serves."""
    lines = [line.strip() for body in blocks("") for line in body.splitlines()]
    found = [
        shlex.split(line, comments=True) for line in lines if line.startswith(("edge-export ", "edge-rea"))
    ]
    return [words for words in found if words[:2] != ["edge-reasoner", "cloud"]]


def fitted(text: str) -> str:
    """Names the model that is here; asks of random weights no quality."""
    return "0" if text == "0.8" else text.replace(MODEL, STAND_IN)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what README's commands expect in the current one."""
    folder = tmp_path_factory.mktemp("checkout")
    models = folder / ".cache" / "models"
    write_checkpoint(models / STAND_IN, max_position_embeddings=1024)
    make_bert(models / ENCODER, "even")
    (folder / "questions.jsonl").write_text(
        json.dumps({"question": "Which is red?", "choices": ["blood", "milk"], "answer": 0}) + "\n"
    )
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Name a fruit."}) + "\n")
    return folder


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    """Of the processes, with a cache of their own and no key."""
    kept = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return {**kept, "EDGE_REASONER_CACHE": str(place / "cache")}


@pytest.fixture
def here(place: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as the current one."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("EDGE_REASONER_CACHE", environment["EDGE_REASONER_CACHE"])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return place


@pytest.fixture(scope="module")
def cloud(place: Path, environment: dict[str, str]) -> Iterator[str]:
    """The URL of README's `edge-reasoner cloud`, on a free port."""
    (line,) = (
        line for body in blocks("") for line in body.splitlines() if line.startswith("edge-reasoner cloud")
    )
    words = shlex.split(fitted(line).replace("9000", "0"))[1:]
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_reasoner.cli.main", *words],
        cwd=place,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said = next((line for line in process.stderr if "listening on" in line), "")
        assert said, "it ended without listening"
        yield said.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def bundle(place: Path) -> Path:
    """`demo/bundle`, made by README's first command."""
    (place / "demo").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("EDGE_REASONER_CACHE", str(place / "cache"))
        words = command_lines()[0]
        assert edge_export([fitted(word) for word in words[1:]]) == 0
    return place / "demo" / "bundle"


@pytest.mark.parametrize("words", command_lines()[1:], ids=" ".join)
def test_readme_commands_run(words, here, bundle, cloud, monkeypatch, capfd):
    """A command line of README ends with status 0 and, with `--json`, prints one object."""
    if words[1] == "chat":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello!\n/quit\n")))
    program = {"edge-export": edge_export, "edge-reasoner": edge_reasoner}[words[0]]
    status = program([fitted(word).replace(CLOUD, cloud) for word in words[1:]])
    printed = capfd.readouterr()
    assert status == 0, printed.err
    if "--json" in words:
        assert isinstance(json.loads(printed.out), dict)


def test_readme_python_runs(here, bundle, cloud, capsys):
    """README's Python, as it stands, exports, asks, streams, keeps a chat and calls the client."""
    (body,) = blocks("python")
    exec(compile(fitted(body).replace(CLOUD, cloud), "README.md", "exec"), {})
    assert (here / "my.bundle" / "manifest.json").is_file() and capsys.readouterr().out


def test_the_sample_runs(here, bundle, environment):
    """`samples/demo.py`, as `make demo` calls it: every question shown with its route."""
    sample = ROOT / "samples" / "demo.py"
    command = [sys.executable, str(sample), "demo/bundle", f".cache/models/{STAND_IN}"]
    ran = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\nQ  ") == ran.stdout.count("\n   route ") == 8
    assert "the cloud is switched off" in ran.stdout
