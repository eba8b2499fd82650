"""Answers a file of prompts. Long work resumes: finished rows are kept in `OUT.partial` until all are done.

The partial file starts with a line that names the run (bundle, options, input); a run that differs in any of
them does not continue it. Each row is on the disk before the next is begun; a torn last line is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.errors import InputError, NoAnswerError
from edge_reasoner.files import exists, read_rows, write_atomically
from edge_reasoner.reasoner import Reasoner

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FIELDS = ("prompt", "id")
_RUN = "batch_run"
_MAX_PARTIAL_LINE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class BatchRow:
    """One prompt; `id` is its own or its number among the rows, from 0."""

    line: int
    id: str | int
    prompt: str


@dataclass(frozen=True)
class BatchReport:
    """What became of a batch. `resumed`: rows that an earlier run had finished. `usd` None: price unknown."""

    rows: int
    resumed: int
    failed: int
    first_failure: str | None
    by_source: dict[str, int]
    usd: float | None


def read_batch(path: Path) -> list[BatchRow]:
    """All rows of a batch file, checked. Raises InputError naming the line."""
    rows: list[BatchRow] = []
    seen: set[str | int] = set()
    for line, row in read_rows(path):
        where = f"{path} line {line}"
        if unknown := sorted(set(row) - set(_FIELDS)):
            raise InputError(f"{where}: unknown field {unknown[0]!r}; allowed are {', '.join(_FIELDS)}")
        prompt, name = row.get("prompt"), row.get("id", len(rows))
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{where}: prompt: a text that is not empty is needed")
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise InputError(f"{where}: id: a string or an integer is needed")
        if name in seen:
            raise InputError(f"{where}: id {name!r} appears twice")
        seen.add(name)
        rows.append(BatchRow(line, name, prompt))
    return rows


def run_name(
    bundle_id: str, rows: Sequence[BatchRow], params: SamplingParams, other: Mapping[str, Any]
) -> str:
    """A digest of all that decides a batch's answers: two runs of one name may continue each other."""
    content = [bundle_id, [[row.id, row.prompt] for row in rows], asdict(params), dict(other)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run_batch(
    reasoner: Reasoner,
    rows: Sequence[BatchRow],
    out: Path,
    *,
    name: str,
    params: SamplingParams,
    advance: Callable[[int], None],
) -> BatchReport:
    """Answers the rows that `OUT.partial` does not hold yet, then writes `out` in the rows' order.

    A prompt that cannot be answered (too long for the context, say, or the cloud thought and gave no answer)
    becomes a row with `error`. Raises CloudError and BackendError: what is finished stays in the partial
    file. `advance` gets the number of rows done. Raises InputError when the files cannot be written or belong
    to another run.
    """
    partial = out.with_name(f"{out.name}.partial")
    with _writing(partial):
        file = _open_partial(partial, name)
    with file:
        with _writing(partial):
            done = _finished(file, partial)
        resumed = sum(row.id in done for row in rows)
        for number, row in enumerate(rows):
            if row.id not in done:
                done[row.id] = _answer(reasoner, row, params)
                with _writing(partial):
                    _append(file, done[row.id])
            advance(number + 1)
    with _writing(out):
        write_atomically(out, (_line(done[row.id]) for row in rows))
        partial.unlink(missing_ok=True)
    return _report(rows, done, resumed)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Around what touches the files alone: an OSError of the model's is none of writing."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot write: {error.strerror or error}") from error


def _answer(reasoner: Reasoner, row: BatchRow, params: SamplingParams) -> dict[str, Any]:
    try:
        return {"id": row.id, **reasoner.ask(row.prompt, params=params).to_dict()}
    except (InputError, NoAnswerError) as error:
        return {"id": row.id, "error": f"line {row.line}: {error}"}


def _open_partial(partial: Path, name: str) -> BinaryIO:
    """The partial file, positioned after its first line, which names this run; no other run writes it as long
    as it is open. Raises InputError."""
    file = _open_alone(partial)
    file.seek(0)
    first = file.readline(_MAX_PARTIAL_LINE_BYTES)
    if not first.endswith(b"\n"):  # new, or torn within its first line
        file.truncate(0)
        _append(file, {_RUN: name})
    elif _parsed(first).get(_RUN) != name:
        file.close()
        raise InputError(
            f"{partial}: holds answers of another run (bundle, options or prompts differ);"
            " delete it to start anew"
        )
    return file


def _open_alone(partial: Path) -> BinaryIO:
    while True:
        file = partial.open("a+b")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise InputError(
                f"{partial}: another run is writing it; wait until that has ended, or give another OUT"
            ) from error
        except OSError:
            return file  # a file system without locks
        if exists(partial) and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            return file
        file.close()  # the run that wrote it has just ended, and removed it


def _finished(file: BinaryIO, partial: Path) -> dict[str | int, dict[str, Any]]:
    """Rows by id; the file is cut after the last whole one and stands at its end."""
    done: dict[str | int, dict[str, Any]] = {}
    end = file.tell()
    while line := file.readline(_MAX_PARTIAL_LINE_BYTES):
        row = _parsed(line) if line.endswith(b"\n") else {}
        if not isinstance(row.get("id"), (str, int)):
            break
        done[row["id"]] = row
        end = file.tell()
    file.seek(end)
    file.truncate()
    return done


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _append(file: BinaryIO, row: Mapping[str, Any]) -> None:
    file.write(_line(row))
    file.flush()
    os.fsync(file.fileno())


def _report(
    rows: Sequence[BatchRow], done: Mapping[str | int, Mapping[str, Any]], resumed: int
) -> BatchReport:
    answers = [done[row.id] for row in rows]
    errors = [str(answer["error"]) for answer in answers if "error" in answer]
    good = [answer for answer in answers if "error" not in answer]
    sources = [str(answer["source"]) for answer in good]
    costs = [answer["cost"]["usd"] for answer in good]
    return BatchReport(
        rows=len(answers),
        resumed=resumed,
        failed=len(errors),
        first_failure=errors[0] if errors else None,
        by_source={source: sources.count(source) for source in sorted(set(sources))},
        usd=None if None in costs else sum(costs),
    )
