"""`batch`: rows in, rows out, and going on after an interruption."""

from __future__ import annotations

import fcntl
import json
import signal
import socket
import threading
from pathlib import Path

import pytest
from support.hostile_cloud import GOOD, HEAD, HostileCloud, event, send

from edge_reasoner.batch import BatchRow, run_batch
from edge_reasoner.chat.params import SamplingParams

KEYS = {
    "text", "thinking", "source", "model", "confidence", "decision", "usage", "timings", "cost",
    "finish_reason", "note",
}  # fmt: skip
DEAD = "http://127.0.0.1:9/v1"


def _write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_and_summary(run, answering_bundle, tmp_path) -> None:
    """Every row gives what `ask --json` prints, with its id, in the file's order; the summary counts them."""
    source = _write(
        tmp_path / "in.jsonl", [{"prompt": "one"}, {"prompt": "two", "id": "b"}, {"prompt": "six"}]
    )
    ran = run("batch", answering_bundle, source, tmp_path / "out.jsonl", "--max-tokens", 4, "--json")
    summary = json.loads(ran.out)
    assert set(summary) == {
        "rows", "resumed", "failed", "first_failure", "by_source", "usd", "out", "seconds",
    }  # fmt: skip
    assert (ran.status, ran.err, summary["rows"], summary["by_source"]) == (0, "", 3, {"local": 3})
    rows = _read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [0, "b", 2] and all(set(row) == KEYS | {"id"} for row in rows)
    alone = json.loads(run("ask", answering_bundle, "two", "--max-tokens", 4, "--json").out)
    assert rows[1]["text"] == alone["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": ""}', "prompt"),
        ('{"prompt": 7}', "prompt"),
        ('{"id": 1}', "prompt"),
        ('{"prompt": "x", "id": 1.5}', "id"),
        ('{"prompt": "x", "id": 0}', "twice"),
        ('{"prompt": "x", "max_tokens": 3}', "max_tokens"),
        ("[]", "object"),
        ("{", "not JSON"),
        ('{"prompt": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_rows_before_any_work(run, tmp_path, line, expected) -> None:
    """A bad row is one line with its number, before even the bundle is opened; nothing is written."""
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"prompt": "x"}}\n\n{line}\n')
    message = run("batch", "nowhere", source, tmp_path / "out.jsonl").fails_in_one_line(2)
    assert "line 3" in message and expected in message
    assert list(tmp_path.iterdir()) == [source]


def test_bad_files(run, answering_bundle, tmp_path) -> None:
    """Missing, empty and binary input and a missing output folder are one line and status 2."""
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    good = _write(tmp_path / "good", [{"prompt": "x"}])
    for source, target in (
        ("none", "out"),
        ("empty", "out"),
        ("binary", "out"),
        (good, "no/out"),
        (".", "out"),
    ):
        run("batch", answering_bundle, tmp_path / source, tmp_path / target).fails_in_one_line(2)
    assert not (tmp_path / "out").exists()


def test_prompt_that_does_not_fit(run, answering_bundle, tmp_path) -> None:
    """A row that cannot be answered becomes an error row; the others are answered; status 2 at the end."""
    source = _write(tmp_path / "in.jsonl", [{"prompt": "x" * 3000}, {"prompt": "ok"}])
    ran = run("batch", answering_bundle, source, tmp_path / "out.jsonl", "--max-tokens", 2)
    assert ran.status == 2 and "1 of 2 rows failed; line 1:" in ran.err
    first, second = _read(tmp_path / "out.jsonl")
    assert set(first) == {"id", "error"} and "3005" in first["error"] and second["source"] == "local"


def test_resumes_after_an_interrupt(spawn, run, answering_bundle, tmp_path) -> None:
    """Ctrl-C leaves finished rows in OUT.partial only; the same command asks for the others and no more."""
    source = _write(tmp_path / "in.jsonl", [{"prompt": f"say {i}"} for i in range(8)])
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    asked, go_on = threading.Semaphore(0), threading.Event()

    def act(connection: socket.socket) -> None:
        asked.release()
        if len(server.requests) > 3:
            go_on.wait(60)
        connection.sendall(GOOD)

    server = HostileCloud(act)
    try:
        command = ("batch", answering_bundle, source, out, "--mode", "cloud", "--cloud", server.url)
        command += ("--cloud-model", "m", "--max-tokens", 40)
        process = spawn(*command)
        assert all(asked.acquire(timeout=60) for _ in range(4))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in error and not out.exists()
        kept = partial.read_bytes()
        assert kept.endswith(b"\n") and kept.count(b"\n") == 4  # the run's name and three rows
        partial.write_bytes(kept + b'{"id": 7, "text": "to')  # a crash in mid-write
        refused = run(*command[:-1], 41).fails_in_one_line(2)
        assert "another run" in refused
        go_on.set()
        summary = json.loads(run(*command, "--json").out)
    finally:
        go_on.set()
        server.close()
    assert summary["resumed"] == 3 and not partial.exists() and len(server.requests) == 4 + 5
    assert [(row["id"], row["text"]) for row in _read(out)] == [(i, "Hello") for i in range(8)]


def test_cloud_failure_keeps_what_is_done(run, answering_bundle, cloud_url, tmp_path) -> None:
    """A cloud that is down in mode cloud is status 4, without an output file; nothing finished is lost."""
    source = _write(tmp_path / "in.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    out = tmp_path / "out.jsonl"
    given = ("batch", answering_bundle, source, out, "--mode", "cloud", "--max-tokens", 4)
    run(*given, "--cloud", DEAD).fails_in_one_line(4)
    assert not out.exists() and (tmp_path / "out.jsonl.partial").exists()
    (tmp_path / "out.jsonl.partial").unlink()
    ran = run(*given, "--cloud", cloud_url, "--json")
    summary = json.loads(ran.out)
    assert summary["by_source"] == {"cloud": 2} and summary["usd"] is None


def test_the_questions_are_never_overwritten(run, answering_bundle, tmp_path) -> None:
    """The same file as IN and OUT, also through a link, is refused before any work; it stays as it was."""
    source = _write(tmp_path / "in.jsonl", [{"prompt": "one"}])
    (tmp_path / "link.jsonl").symlink_to(source)
    for target in (source, tmp_path / "link.jsonl"):
        ran = run("batch", answering_bundle, source, target, "--max-tokens", 2)
        assert ran.status == 2 and "IN.jsonl itself" in ran.err
    assert _read(source) == [{"prompt": "one"}]


def test_a_cloud_that_only_thinks_costs_its_row(run, answering_bundle, tmp_path) -> None:
    """The others are answered; the row says what was wrong, and the status is 2."""
    source, out = (
        _write(tmp_path / "in.jsonl", [{"prompt": "one"}, {"prompt": "two"}]),
        tmp_path / "out.jsonl",
    )
    only = HEAD + event("<think>hm") + event(None, "length") + b"data: [DONE]\n\n"
    server = HostileCloud(send(only), send(GOOD))
    try:
        options = ("--mode", "cloud", "--cloud", server.url, "--cloud-model", "m")
        ran = run("batch", answering_bundle, source, out, *options)
    finally:
        server.close()
    first, second = _read(out)
    assert ran.status == 2 and "gave no answer" in first["error"] and second["text"] == "Hello"


def test_two_runs_of_one_output(run, answering_bundle, tmp_path) -> None:
    """While a run writes OUT.partial, a second one is refused in one line; later it is not."""
    source = _write(tmp_path / "in.jsonl", [{"prompt": "one"}])
    partial = tmp_path / "out.jsonl.partial"
    command = ("batch", answering_bundle, source, tmp_path / "out.jsonl", "--max-tokens", 2)
    with partial.open("a+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another run is writing it" in run(*command).fails_in_one_line(2)
        assert partial.read_bytes() == b""
    assert run(*command).status == 0 and not partial.exists()


def test_an_error_of_the_model_is_none_of_writing(tmp_path) -> None:
    """An OSError while answering is not said to be the output's; the partial file keeps what is done."""

    class Broken:
        def ask(self, prompt, *, params):
            raise OSError(5, "Input/output error", "weights.data")

    rows = [BatchRow(1, 0, "x")]
    with pytest.raises(OSError, match="weights"):
        run_batch(
            Broken(),
            rows,
            tmp_path / "out.jsonl",
            name="n",
            params=SamplingParams(),
            advance=lambda done: None,
        )
