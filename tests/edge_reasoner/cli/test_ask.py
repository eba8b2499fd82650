"""`ask` and `chat`."""

from __future__ import annotations

import json
import signal

import pytest
from support.hostile_cloud import HEAD, event, hostile_cloud, send

from edge_reasoner import Reasoner

KEYS = {
    "text", "thinking", "source", "model", "confidence", "decision", "usage", "timings", "cost",
    "finish_reason", "note",
}  # fmt: skip
NESTED = {
    "decision": {"route", "score", "threshold", "reasons", "features", "calibrated"},
    "usage": {"prompt_tokens", "completion_tokens", "cached_tokens"},
    "timings": {"queue_ms", "preprocess_ms", "ttft_ms", "total_ms", "prefill_tps", "decode_tps"},
    "cost": {"usd", "joules"},
}
HARD = "Prove step by step: if 12 * 13 + 45 / 9 - 7 equals x, what is x squared?"
#: nothing listens there
DEAD = "http://127.0.0.1:9/v1"


def test_json_shape(run, answering_bundle) -> None:
    """`ask --json` prints exactly one object with the contract's fields."""
    ran = run("ask", answering_bundle, "hello", "--max-tokens", 6, "--json")
    assert (ran.status, ran.err, ran.out.count("\n")) == (0, "", 1)
    answer = json.loads(ran.out)
    assert set(answer) == KEYS
    for name, keys in NESTED.items():
        assert set(answer[name]) == keys
    assert answer["source"] == "local" and answer["usage"]["completion_tokens"] == 6


def test_text_and_footer(run, answering_bundle) -> None:
    """People get the same text on standard output and one line about it on standard error."""
    text = json.loads(run("ask", answering_bundle, "hello", "--max-tokens", 6, "--json").out)["text"]
    ran = run("ask", answering_bundle, "hello", "--max-tokens", 6)
    assert (ran.status, ran.out) == (0, text + "\n")
    assert ran.err.startswith("[local · tiny · confidence 0.") and ran.err.count("\n") == 1


@pytest.mark.parametrize("prompt", [("-",), ()])
def test_standard_input(run, answering_bundle, prompt) -> None:
    """The prompt comes from standard input with - and, if that is no terminal, without PROMPT."""
    piped = run("ask", answering_bundle, *prompt, "--max-tokens", 6, stdin=b"hello\n")
    assert piped.out == run("ask", answering_bundle, "hello", "--max-tokens", 6).out


def test_sampling_options(run, answering_bundle) -> None:
    """Sampling, system message, stop string and context limit reach the engine."""
    options = (
        "--temperature",
        "2",
        "--top-k",
        "40",
        "--top-p",
        "0.9",
        "--min-p",
        "0.01",
        "--max-tokens",
        "12",
    )
    seeded = [run("ask", answering_bundle, "hello", *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    whole = run("ask", answering_bundle, "hello", "--max-tokens", 12).out.strip()
    stopped = json.loads(
        run("ask", answering_bundle, "hello", "--max-tokens", 12, "--stop", whole[4:6], "--json").out
    )
    assert stopped["finish_reason"] == "stop" and stopped["text"] == whole[: whole.index(whole[4:6])]
    limited = run("ask", answering_bundle, "hello", "--context-tokens", 64, "--system", "s", "--json",
                  "--max-tokens", 200)  # fmt: skip
    assert json.loads(limited.out)["finish_reason"] in ("context", "stop")
    assert json.loads(limited.out)["usage"]["prompt_tokens"] == len("s:s/u:hello/a:")


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (("BUNDLE", ""), b"", "PROMPT: empty"),
        (("BUNDLE", " \n "), b"", "PROMPT: empty"),
        (("BUNDLE", "-"), b"", "standard input: empty"),
        (("BUNDLE", "-"), b"ab\xff\xfe\x00", "not UTF-8 at byte 2"),
        (("BUNDLE", "a\udcffb"), b"", "not valid UTF-8"),
        (("BUNDLE", "-"), b"x" * 5000, "context"),
        (("BUNDLE", "-"), b"x" * (16 * 1024 * 1024 + 1), "bytes"),
        (("nowhere", "x"), b"", "nowhere: no such bundle"),
        (("BUNDLE", "x", "--max-tokens", "0"), b"", "--max-tokens 0 "),
        (("BUNDLE", "x", "--temperature", "-1"), b"", "temperature"),
        (("BUNDLE", "x", "--temperature", "nan"), b"", "temperature"),
        (("BUNDLE", "x", "--threads", "0"), b"", "threads"),
        (("BUNDLE", "x", "--context-tokens", "9999999"), b"", "context"),
        (("BUNDLE", "x", "--cloud", "ftp://x"), b"", "cloud"),
        (("BUNDLE", "x", "--mode", "cloud"), b"", "--cloud URL"),
        (("BUNDLE", "x", "--stop", ""), b"", "stop"),
        (("BUNDLE", "x", "--usd-per-mtok-in", "-1"), b"", "--usd-per-mtok"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_hostile_input(run, answering_bundle, arguments, stdin, expected, as_json) -> None:
    """Bad input is one line that names it, status 2 and nothing on standard output."""
    given = [answering_bundle if argument == "BUNDLE" else argument for argument in arguments]
    line = run("ask", *given, *(["--json"] if as_json else []), stdin=stdin).fails_in_one_line(2)
    assert expected in line


def test_cloud_answers(run, answering_bundle, cloud_url) -> None:
    """Mode cloud asks the cloud, at the price given; mode auto hands a hard question over."""
    given = ("ask", answering_bundle, "--cloud", cloud_url, "--max-tokens", 6, "--json")
    priced = run(*given, "hello", "--mode", "cloud", "--usd-per-mtok-in", 1, "--usd-per-mtok-out", 2)
    answer = json.loads(priced.out)
    usage = answer["usage"]
    assert answer["source"] == "cloud" and answer["confidence"] is None
    assert answer["cost"]["usd"] * 1e6 == pytest.approx(
        usage["prompt_tokens"] + 2 * usage["completion_tokens"]
    )
    assert json.loads(run(*given, HARD).out)["source"] == "cloud"
    assert json.loads(run(*given, HARD, "--mode", "local").out)["source"] == "local"
    assert json.loads(run(*given, HARD, "--mode", "offline").out)["source"] == "degraded"


def test_cloud_that_is_down(run, answering_bundle) -> None:
    """Needed, it is status 4; in mode auto the device answers, marked degraded, and that is no failure."""
    line = run("ask", answering_bundle, "hello", "--cloud", DEAD, "--mode", "cloud").fails_in_one_line(4)
    assert DEAD in line
    ran = run("ask", answering_bundle, HARD, "--cloud", DEAD, "--max-tokens", 6)
    assert ran.status == 0 and ran.err.startswith("[degraded") and "the cloud failed" in ran.err


def test_chat_remembers(run, answering_bundle, cache_dir) -> None:
    """Each line is a turn of one conversation; blank lines are skipped and /quit ends it."""
    ran = run("chat", answering_bundle, "--max-tokens", 5, stdin=b"one\n\ntwo\r\n/quit\nthree\n")
    with Reasoner.open(answering_bundle, cache_dir=cache_dir) as reasoner, reasoner.session() as session:
        expected = ["".join(session.stream(line, max_tokens=5)) for line in ("one", "two")]
    assert ran.status == 0 and ran.out == "".join(f"{text}\n" for text in expected)
    assert ran.err.count("[local") == 2


#: a whole reply of an endpoint whose model thinks
_THINKS = HEAD + b"".join(
    (
        event("so\x1b[2J ").replace(b'"content"', b'"reasoning_content"'),
        event("it is").replace(b'"content"', b'"reasoning_content"'),
        event("42"),
        event(None, "stop"),
        b"data: [DONE]\n\n",
    )
)


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_thinking_is_shown_on_request(run, answering_bundle, command) -> None:
    """On standard error before the line about the answer, made printable; never on standard output."""
    with hostile_cloud(send(_THINKS)) as server:
        options = ("--mode", "cloud", "--cloud", server.url, "--cloud-model", "m")
        asked = (command, answering_bundle, *(["hi"] if command == "ask" else []), *options)
        shown = run(*asked, "--show-thinking", stdin=b"hi\n")
        hidden = run(*asked, stdin=b"hi\n")
    assert shown.out == hidden.out == "42\n"
    assert shown.err.startswith("so\ufffd[2J it is\n[cloud · ") and hidden.err.startswith("[cloud · ")


def test_json_has_the_thinking(run, answering_bundle) -> None:
    """With or without --show-thinking, and nothing beside the object."""
    with hostile_cloud(send(_THINKS)) as server:
        options = ("--mode", "cloud", "--cloud", server.url, "--cloud-model", "m", "--json")
        for more in ((), ("--show-thinking",)):
            ran = run("ask", answering_bundle, "hi", *options, *more)
            assert (json.loads(ran.out)["thinking"], ran.err) == ("so\x1b[2J it is", "")
    assert json.loads(run("ask", answering_bundle, "hi", "--max-tokens", 2, "--json").out)["thinking"] is None


def test_thinking_alone_is_an_error_of_the_cloud(run, answering_bundle) -> None:
    """Status 4 and a line that says what helps."""
    only = HEAD + event("<think>hm") + event(None, "length") + b"data: [DONE]\n\n"
    with hostile_cloud(send(only)) as server:
        options = ("--mode", "cloud", "--cloud", server.url, "--cloud-model", "m")
        line = run("ask", answering_bundle, "hi", *options).fails_in_one_line(4)
    assert "gave no answer" in line and "more tokens" in line


def test_chat_ends(run, answering_bundle) -> None:
    """The end of input ends a chat; what is not text is one line and status 2."""
    assert run("chat", answering_bundle, stdin=b"").status == 0
    assert "not UTF-8" in run("chat", answering_bundle, stdin=b"\xff\n").fails_in_one_line(2)
    assert "context" in run("chat", answering_bundle, stdin=b"x" * 5000).fails_in_one_line(2)


@pytest.mark.parametrize("command", ["chat", "ask"])
def test_interrupt_is_clean(spawn, answering_bundle, command) -> None:
    """Ctrl-C while waiting for input or answering: status 130, no traceback."""
    process = spawn(command, answering_bundle, "--max-tokens", 100000, *(["-"] if command == "ask" else []))
    if command == "chat":
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.read(1)
    else:
        process.stdin.write("x" * 300_000)  # more than a pipe holds: it returns when the command reads
        process.stdin.flush()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error
