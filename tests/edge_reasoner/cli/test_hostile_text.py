"""Nothing that a model, an endpoint, a bundle or a file says reaches a terminal as a command to it."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hostile_cloud import HEAD, HostileCloud, event, send, status

from edge_reasoner.errors import one_line, printable

#: a clipboard write (OSC 52), a title, colours, a cursor move, C1's CSI, a device string, a bell, overwriting
EVIL = (
    "\x1b]52;c;QUJD\x07a\x1b]0;title\x1b\\b\x1b[31mc\x1b[2Jd\x9b31me\x90q\x9cf\x08\x7f\rg"
    "\u202ehidden\u2066x\u2069[red]markup[/red] \\[bold]y :skull: \u2028line"
)
#: what rich itself sends: colours, and the spinner's hiding, moving and clearing (of EVIL: red)
_OWN = re.compile(r"\x1b\[[0-9;]*m|\x1b\[(\?25[lh]|1A|2K)|\r")
_HARMFUL = re.compile("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


@pytest.fixture
def terminal(
    spawn: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs a command with both outputs on a real pseudo-terminal; what arrived there, as text."""

    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "300"), ("PYTHONIOENCODING", "utf-8")):
        monkeypatch.setenv(name, value)

    def run(*arguments: object) -> str:
        master, slave = pty.openpty()
        process = spawn(*arguments, stdout=slave, stderr=slave)
        os.close(slave)
        data = b""
        try:
            while chunk := os.read(master, 65536):
                data += chunk
        except OSError:  # Linux: the other end is closed
            pass
        os.close(master)
        process.wait(timeout=60)
        return data.decode()

    return run


@pytest.fixture
def evil_cloud() -> Iterator[HostileCloud]:
    """Answers with EVIL, one character in each piece, as model name and reason too."""
    pieces = [event(char, model=f"m{EVIL}") for char in EVIL]
    server = HostileCloud(send(b"".join((HEAD, *pieces, event(finish=f"x{EVIL}"), b"data: [DONE]\n\n"))))
    yield server
    server.close()


def _harmless(shown: str) -> str:
    """Asserts that only text, line ends and what is our own arrived; returns it without that."""
    text = _OWN.sub("", shown)
    assert not _HARMFUL.search(text), ascii(text)
    return text


def test_answer_of_a_hostile_cloud(terminal, evil_cloud, answering_bundle) -> None:
    """Text, model name and reason of an answer arrive as text; none of it is taken for markup."""
    options = ("--mode", "cloud", "--cloud", evil_cloud.url, "--cloud-model", "m")
    text = _harmless(terminal("ask", answering_bundle, "hi", *options))
    assert "[red]markup[/red]" in text and ":skull:" in text and text.count("\ufffd") >= 10


def test_thinking_of_a_hostile_cloud(terminal, answering_bundle) -> None:
    """What is thought is dimmed, and as harmless as an answer."""
    pieces = [event(char).replace(b'"content"', b'"reasoning_content"') for char in EVIL]
    server = HostileCloud(
        send(b"".join((HEAD, *pieces, event("fine"), event(finish="stop"), b"data: [DONE]\n\n")))
    )
    try:
        options = ("--mode", "cloud", "--cloud", server.url, "--cloud-model", "m", "--show-thinking")
        shown = terminal("ask", answering_bundle, "hi", *options)
    finally:
        server.close()
    assert "\x1b[2m" in shown
    text = _harmless(shown)
    assert "[red]markup[/red]" in text and text.count("\ufffd") >= 10 and "\nfine\n" in text


def test_json_keeps_every_character(run, evil_cloud, answering_bundle) -> None:
    """--json is lossless: the characters are escaped, not replaced."""
    options = ("--mode", "cloud", "--cloud", evil_cloud.url, "--cloud-model", "m", "--json")
    ran = run("ask", answering_bundle, "hi", *options)
    assert json.loads(ran.out)["text"] == EVIL and ran.out.isascii() and "\x1b" not in ran.out


def test_error_of_a_hostile_cloud(terminal, answering_bundle) -> None:
    """An endpoint's refusal is one harmless line."""
    body = json.dumps({"error": {"message": EVIL}}).encode()
    server = HostileCloud(send(status(403, body=body)))
    try:
        shown = terminal("ask", answering_bundle, "hi", "--mode", "cloud", "--cloud", server.url)
    finally:
        server.close()
    assert "[red]markup" in _harmless(shown).strip().splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [("bundle", "inspect"), ("bundle", "verify", "--no-run"), ("doctor",), ("ask", "hi")],
    ids=lambda words: " ".join(words),
)
def test_hostile_file_names(terminal, answering_bundle, tmp_path, command) -> None:
    """A folder's name, printed as a title, a path or beside a spinner, or in an error."""
    evil = tmp_path / EVIL.replace("/", "").replace("\x00", "")
    shutil.copytree(answering_bundle, evil)
    verb, rest = (command[:2], command[2:]) if command[0] == "bundle" else (command[:1], command[1:])
    _harmless(terminal(*verb, evil, *rest))
    assert "absent" in _harmless(terminal(*verb, f"{evil}absent", *rest))


def test_hostile_profile(terminal, tmp_path) -> None:
    """Every text of a profile file is text when it is shown."""
    known = Path(__file__).parents[3] / "device_profiles" / "raspberry-pi-5.toml"
    evil = r"[red]r[/red] [/] :skull: \u001b]0;t\u0007 \u202e \u009b31m"
    text = re.sub(
        r'^(title|summary|source|why|instead) = ".*"$',
        lambda found: f'{found[1]} = "{evil}"',
        known.read_text(),
        flags=re.MULTILINE,
    )
    path = tmp_path / "evil.toml"
    path.write_text(text)
    shown = terminal("profiles", "show", path)
    assert "[red]r[/red] [/] :skull:" in _harmless(shown)


def test_pieces_and_whole_are_one(run) -> None:
    """Cleaning text piece by piece gives what cleaning the whole gives; plain text stays as it is."""
    assert "".join(map(printable, EVIL)) == printable(EVIL)
    fine = "Ünï, 漢字, עברית, हिन्दी\u200d, 👩\u200d💻\n\ttab"
    assert printable(fine) == fine


def test_one_line() -> None:
    """One bounded line; an exception without words gives its type."""
    assert one_line(ValueError("a\n\x1b[31mb\r\n c\u2028d\x85e")) == "a [31mb c d e"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt" and one_line("") == ""
    assert one_line("x" * 999, 10) == "x" * 9 + "…" and len(one_line("x " * 10**6)) <= 300
