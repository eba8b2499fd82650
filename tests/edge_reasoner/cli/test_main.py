"""The command line's frame: help, exit statuses, one-line errors, signals and pipes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from edge_reasoner import __version__
from edge_reasoner.cli.main import COMMAND_TABLE

NUMBERS = (
    ("--max-tokens", "0"),
    ("--temperature", "-1"),
    ("--top-k", "-1"),
    ("--top-p", "2"),
    ("--min-p", "-1"),
    ("--seed", "-1"),
    ("--threads", "0"),
    ("--context-tokens", "0"),
    ("--context-tokens", "99999999"),
)
COMMANDS = ("ask", "batch", "bench", "bundle", "chat", "cloud", "doctor", "eval", "profiles")


def test_help_is_cheap(spawn) -> None:
    """--help names every command and loads neither onnxruntime nor numpy."""
    program = (
        "import sys\nfrom edge_reasoner.cli.main import main\nassert main(['--help']) == 0\n"
        "assert not {'onnxruntime', 'numpy', 'httpx', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_version_and_subcommand_help(run) -> None:
    """--version, and --help of every command, succeed."""
    assert run("--version").out.split()[-1] == __version__
    for name in COMMANDS:
        assert run(name, "--help").status == 0
    assert "there are: ask, batch," in run("nope").fails_in_one_line(2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nope",),
        ("ask",),
        ("ask", "bundle", "x", "--max-tokens", "many"),
        ("ask", "bundle", "x", "--mode", "sometimes"),
        ("ask", "bundle", "x", "--no-such-option", "f"),
        ("bundle", "nope", "x"),
        ("eval", "bundle"),
    ],
)
def test_bad_usage(run, arguments) -> None:
    """A usage error is one line and status 2."""
    run(*arguments).fails_in_one_line(2)


def test_full_disk_and_debug(spawn) -> None:
    """An error that nobody foresaw is one line and status 1; --debug adds the traceback."""
    with open("/dev/full", "w") as full:  # noqa: PTH123
        _, error = spawn("profiles", "list", "--json", stdout=full).communicate(timeout=60)
        process = spawn("--debug", "profiles", "list", "--json", stdout=full)
        _, traced = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" in traced
    assert "No space left" in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_streams_that_nobody_listens_to(answering_bundle, closed) -> None:
    """A command that was started without a standard stream does its work, and says nothing of it."""
    command = [sys.executable, "-m", "edge_reasoner.cli.main", "ask", str(answering_bundle), "hi"]
    shell = ["sh", "-c", f'"$@" {closed}', "sh", *command, "--max-tokens", "1"]
    done = subprocess.run(shell, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and b"unexpected" not in done.stderr


def test_a_closed_standard_input_is_empty(answering_bundle) -> None:
    """A prompt that is to come from a closed standard input is missing: one line, status 2."""
    command = [sys.executable, "-m", "edge_reasoner.cli.main", "ask", str(answering_bundle), "-"]
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 2 and b"empty" in done.stderr and len(done.stderr.splitlines()) == 1


def test_reader_that_goes_away(spawn) -> None:
    """A closed pipe ends the command without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    process = spawn("profiles", "list", "--json", stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 1


def test_a_new_command_is_one_file_and_one_row(run, monkeypatch, tmp_path) -> None:
    """A row in the table makes a command: in the help, in the list of an unknown name, and when called."""
    (tmp_path / "extra_command.py").write_text(
        "import click\n"
        "from edge_reasoner.errors import InputError\n\n"
        "@click.command()\n@click.option('--max-mb', 'limit_mb', type=int)\n"
        "def extra(limit_mb):\n    '''Do more.'''\n    raise InputError(f'limit_mb={limit_mb}: too much')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMAND_TABLE, "extra", "extra_command:extra")
    assert "Do more." in run("--help").out and "extra" in run("nope").err
    assert run("extra", "--max-mb", 5).fails_in_one_line(2) == "edge-reasoner: --max-mb 5: too much"


@pytest.mark.parametrize("command", [["ask"], ["bench"], ["doctor"], ["bundle", "verify"], ["cloud"]])
def test_a_name_that_no_disk_can_hold(run, command) -> None:
    """Status 2, as for any bundle that is not there."""
    ran = run(*command, "x" * 300, *(["Hi"] if command == ["ask"] else []))
    assert ran.status == 2 and "no such bundle" in ran.err


@pytest.mark.parametrize(
    ("closed", "words", "status"),
    [("<&- >&- 2>&-", "profiles list", 0), ("<&-", "ask no.bundle", 2), ("2>&-", "profiles show nope", 2)],
)
def test_closed_standard_streams(closed: str, words: str, status: int) -> None:
    """A stream that is closed holds nothing, or takes everything: no error of its own."""
    command = f"exec {shlex.quote(sys.executable)} -m edge_reasoner.cli.main {words} {closed}"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.returncode == status and "unexpected" not in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *(("ask", "B", "x", *pair) for pair in NUMBERS),
        *(("batch", "B", "B", "OUT", *pair) for pair in NUMBERS),
        ("bench", "B", "--prompt-tokens", "0"),
        ("bench", "B", "--new-tokens", "0"),
        ("bench", "B", "--concurrency", "2"),
        ("bench", "B", "--repeat", "0"),
        ("bench", "B", "--seed", "-1"),
        ("bench", "B", "--threads", "0"),
        ("chat", "B", "--max-tokens", "0"),
        ("chat", "B", "--threads", "0"),
        ("eval", "B", "--data", "B", "--limit", "0"),
        ("eval", "B", "--data", "B", "--max-tokens", "0"),
        ("cloud", "B", "--port", "70000"),
        ("cloud", "B", "--threads", "0"),
        ("bundle", "verify", "B", "--threads", "0"),
    ],
    ids=" ".join,
)
def test_errors_speak_of_flags(run, arguments, answering_bundle, tmp_path) -> None:
    """A number out of range is refused in one line that names the flag, not the library's parameter."""
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"prompt": "x"}\n')
    places = {"B": str(answering_bundle), "OUT": str(tmp_path / "out.jsonl")}
    if arguments[0] == "batch":
        arguments = ("batch", str(answering_bundle), str(rows), str(tmp_path / "out.jsonl"), *arguments[4:])
    flag, value = arguments[-2:]
    line = run(*(places.get(word, word) for word in arguments)).fails_in_one_line(2)
    assert flag in line and value in line, line
    assert f"{flag.strip('-').replace('-', '_')}=" not in line and "_" not in line.split(flag)[0]
