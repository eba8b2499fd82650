"""`--json` is lossless whatever the locale: names and texts come back byte for byte, in plain ASCII."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_checkpoints import write_checkpoint

ROOT = Path(__file__).parents[3]
#: no character set, no help from Python; a terminal of another alphabet; as most machines are
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "Latin-1 output": {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    "UTF-8": {"PYTHONUTF8": "1"},
}
NAME = "bündel-☃-🙂".encode()
#: a byte that is no UTF-8 at all: Python makes a lone surrogate of it
ODD_NAME = NAME + b"-\xff"


#: what the terminal of each can show
CHARACTERS = {"C": "ascii", "Latin-1 output": "latin-1", "UTF-8": "utf-8"}


def spoken(
    locale: str,
    *arguments: bytes | str | Path,
    module: str = "edge_reasoner.cli.main",
    characters: str = "ascii",
):
    """Runs a command in that locale: exit status, standard output (of those characters), standard error."""
    dropped = ("LC_ALL", "LANG", "LC_CTYPE", "PYTHONUTF8", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "export")))
    done = subprocess.run(
        [sys.executable, "-m", module, *map(os.fsencode, arguments)],
        env=kept | LOCALES[locale] | {"PYTHONPATH": path},
        capture_output=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout.decode(characters), done.stderr.decode("latin-1")


def name_bytes(text: str) -> bytes:
    """The bytes of a file name as JSON gives it, whether the locale understood them or not."""
    return text.encode("utf-8", "surrogateescape")


@pytest.fixture(scope="module")
def odd_bundle(answering_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The path of a bundle in a folder with an odd name, as bytes."""
    path = os.fsencode(tmp_path_factory.mktemp("odd")) + b"/" + NAME
    shutil.copytree(os.fsencode(answering_bundle), path)
    return path


@pytest.mark.parametrize("locale", LOCALES)
def test_doctor(locale: str, odd_bundle: bytes) -> None:
    """The bundle's path comes back; the table for people is printed in whatever characters there are."""
    status, out, err = spoken(locale, "doctor", odd_bundle, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert name_bytes(found["bundle"]["path"]) == odd_bundle
    status, table, err = spoken(locale, "doctor", odd_bundle, characters=CHARACTERS[locale])
    assert status == 0, err
    assert found["versions"]["onnxruntime"] in table
    assert all(part["variant"] in table for part in found["bundle"]["components"])


@pytest.mark.parametrize("locale", LOCALES)
def test_ask_and_batch(locale: str, odd_bundle: bytes, tmp_path: Path) -> None:
    """A question beyond ASCII is the same one in every locale, and so are ids and file names."""
    status, out, err = spoken(locale, "ask", odd_bundle, "grüße ☃ 🙂", "--max-tokens", "2", "--json")
    assert status == 0, err
    usual = spoken("UTF-8", "ask", odd_bundle, "grüße ☃ 🙂", "--max-tokens", "2", "--json")[1]
    assert json.loads(out)["text"] == json.loads(usual)["text"]
    assert json.loads(out)["usage"] == json.loads(usual)["usage"]
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "grüße ☃", "id": "ключ 🙂"}\n', "utf-8")
    target = os.fsencode(tmp_path) + b"/" + ODD_NAME + b".jsonl"
    status, out, err = spoken(locale, "batch", odd_bundle, source, target, "--max-tokens", "2", "--json")
    assert status == 0, err
    assert name_bytes(json.loads(out)["out"]) == target
    row = Path(os.fsdecode(target)).read_text("utf-8")
    assert json.loads(row)["id"] == "ключ 🙂"


@pytest.mark.parametrize("locale", LOCALES)
def test_profiles(locale: str, tmp_path: Path) -> None:
    """A profile's title in any alphabet, from a file with an odd name."""
    built_in = json.loads(spoken("UTF-8", "profiles", "show", "generic-x86", "--json")[1])
    toml = (ROOT / "device_profiles" / "generic-x86.toml").read_text("utf-8")
    path = os.fsencode(tmp_path) + b"/" + ODD_NAME + b".toml"
    Path(os.fsdecode(path)).write_bytes(toml.replace(built_in["profile"]["title"], "Доска ☃ 🙂").encode())
    status, out, err = spoken(locale, "profiles", "show", path, "--json")
    assert status == 0, err
    assert json.loads(out)["profile"]["title"] == "Доска ☃ 🙂"


@pytest.mark.parametrize("locale", LOCALES)
def test_edge_export(locale: str, tmp_path: Path) -> None:
    """A checkpoint and a bundle with odd names."""
    source, out_path = (os.fsencode(tmp_path) + b"/" + part + NAME for part in (b"in-", b"out-"))
    write_checkpoint(tmp_path / "plain")
    (tmp_path / "plain").rename(os.fsdecode(source))
    options = ("--profile", "generic-x86", "--threads", "1", "--recipe", "fp32", "--json", "--out", out_path)
    status, out, err = spoken(locale, source, *options, module="edge_export.cli")
    assert status == 0, err
    assert name_bytes(json.loads(out)["bundle"]) == out_path


@pytest.mark.parametrize("locale", LOCALES)
def test_a_name_that_is_not_utf8_is_named(locale: str, odd_bundle: bytes, tmp_path: Path) -> None:
    """The library that reads checkpoints takes UTF-8 names only: one line says so, not "corrupt".

    A bundle is opened below its held folder, where there is /proc: its own name does not matter then.
    """
    bundle, checkpoint = (os.fsencode(tmp_path) + b"/" + part + ODD_NAME for part in (b"b-", b"c-"))
    shutil.copytree(odd_bundle, bundle)
    write_checkpoint(tmp_path / "plain")
    (tmp_path / "plain").rename(os.fsdecode(checkpoint))
    asked = spoken(locale, "ask", bundle, "hi", "--json")
    exported = spoken(locale, checkpoint, "--profile", "generic-x86", "--json", module="edge_export.cli")
    if Path("/proc/self/fd").is_dir():
        assert asked[0] == 0 and json.loads(asked[1])["source"] == "local", asked[2]
        asked = exported
    for status, out, err in (asked, exported):
        assert status and not out and len(err.splitlines()) == 1
        assert "the name is not UTF-8" in err
