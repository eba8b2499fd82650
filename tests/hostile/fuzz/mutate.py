"""Deterministic mutations of files, and the loop that feeds them to a parser.

A fuzzer of a format is a function `fuzz_<format>(data: bytes)` that does with the bytes what the product
does, and a corpus of seeds. `check(fuzz_<format>, seeds, count)` runs it over the seeds and `count`
mutations: only errors of the project's own tree may leave it, each in one line; none may take more than 5 s
of processor time, and all together may not grow the process by more than 1 GB.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import FrameType

from edge_reasoner.errors import EdgeReasonerError

MAX_CPU_S = 5.0
MAX_GROWTH_BYTES = 1 << 30
#: how many inputs the long run feeds to each fuzzer, and a file that gets a line of JSON about each
INPUTS_VARIABLE, ROWS_VARIABLE = "EDGE_REASONER_FUZZ_INPUTS", "EDGE_REASONER_FUZZ_ROWS"
#: mutations of a corpus in `make test`, and in the long run (`make fuzz`, a part of `make test-all`)
FEW, MANY = 300, int(os.environ.get(INPUTS_VARIABLE, "50000"))
#: a recorded run goes on after a finding, to count them
_MOST_FINDINGS = 20

#: what counts and lengths are set to: edges of every width, and small numbers
_NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 100, 127, 128, 255, 256, 1000, 4095, 4096, 65535, 65536),
    *(1 << 20, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
#: what takes the place of a word or number in texts
_WORDS = (
    *(b"null", b"true", b"false", b"{}", b"[]", b'""', b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"Infinity"),
    *(b"4294967295", b"18446744073709551616", b"0.5", b'"\\ud800"', b"\x00", b"\xff\xfe", b"\xef\xbb\xbf"),
    *(b"\r\n", b"../../etc/passwd", b"[" * 3000, b'{"a":' * 3000, b"A" * 70_000, "é你🙂\u202e".encode()),
)


def mutations(
    seeds: Sequence[bytes], count: int, *, seed: int = 0, words: Sequence[bytes] = ()
) -> Iterator[bytes]:
    """`count` damaged copies of the seeds, the same ones for the same arguments.

    Each has one to four edits: bits flipped, bytes set, a length field rewritten, a stretch cut, repeated or
    taken from another seed, a word exchanged (`words` are the format's own, in addition to the usual ones).
    """
    rng = random.Random(seed)
    for number in range(count):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
            rng.choice(_EDITS)(rng, data, (seeds, tuple(words)))
        yield bytes(data)


def check(
    target: Callable[[bytes], object],
    seeds: Sequence[bytes],
    count: int,
    *,
    seed: int = 0,
    words: Sequence[bytes] = (),
    damaged: Iterable[bytes] | None = None,
) -> None:
    """Feeds the seeds, which must pass, and `count` mutations of them to `target`; see the module's text.

    `damaged` are mutations made otherwise, in place of those.
    """
    for whole in seeds:
        target(whole)
    if damaged is None:
        damaged = mutations(seeds, count, seed=seed, words=words)
    rows = os.environ.get(ROWS_VARIABLE) if count >= MANY else None
    tally = Tally()
    for data in islice(damaged, count):
        tally.feed(target, data)
        if len(tally.findings) >= (_MOST_FINDINGS if rows else 1):
            break
    if rows:
        tally.record(Path(rows))
    assert not tally.findings, tally.findings[0]


class Tally:
    """What became of the inputs of one fuzzer: refused by an error of ours, taken, or a finding."""

    def __init__(self) -> None:
        self.inputs = self.refused = self.crashes = self.hangs = self.grown = 0
        self.growth_bytes = 0
        self.findings: list[str] = []
        self._before_bytes = _peak_bytes()

    def feed(self, target: Callable[[bytes], object], data: bytes) -> None:
        """One input."""
        where = f"mutation {self.inputs} of {len(data)} bytes: {data[:300]!r}"
        self.inputs += 1
        try:
            _within_time(target, data)
        except EdgeReasonerError as error:
            self.refused += 1
            if not str(error) or "\n" in str(error):
                self._crashed(f"{where}: not one line: {error!r}")
        except TooSlowError as error:
            self.hangs += 1
            self.findings.append(f"{where}: {error}")
        except BaseException as error:  # also what a panic of native code becomes
            if isinstance(error, KeyboardInterrupt):
                raise
            self._crashed(f"{where}: {''.join(traceback.format_exception(error))}")
        growth_bytes = _peak_bytes() - self._before_bytes
        self.growth_bytes = max(self.growth_bytes, growth_bytes)
        if growth_bytes >= MAX_GROWTH_BYTES:
            self.grown += 1
            self._before_bytes += growth_bytes
            self.findings.append(f"{where}: grew by {growth_bytes:,} bytes")

    def _crashed(self, finding: str) -> None:
        self.crashes += 1
        self.findings.append(finding)

    def record(self, rows: Path) -> None:
        """Adds a line about this fuzzer to the file of the run."""
        test, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")
        row = {
            "fuzzer": test.rpartition("/")[2],
            "inputs": self.inputs,
            "refused": self.refused,
            "crashes": self.crashes,
            "hangs": self.hangs,
            "grown_over_1_gb": self.grown,
            "growth_mb": round(self.growth_bytes / 1e6, 1),
            "findings": [finding[:2000] for finding in self.findings],
        }
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class TooSlowError(BaseException):
    """A call took more processor time than any file may."""


def _within_time(target: Callable[[bytes], object], data: bytes) -> None:
    """Calls `target`; processor time is measured, so that a busy machine changes nothing."""
    previous = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        target(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlowError(f"more than {MAX_CPU_S:g} s of processor time")


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_Material = tuple[Sequence[bytes], tuple[bytes, ...]]


def _place(rng: random.Random, data: bytearray) -> int:
    """A position: anywhere, or (half the time) in the head, where the structure is."""
    limit = len(data) if rng.random() < 0.5 else min(len(data), 256)
    return rng.randrange(limit) if limit else 0


def _stretch(rng: random.Random, data: bytearray) -> slice:
    start = _place(rng, data)
    return slice(start, start + rng.choice((1, 2, 4, 8, 16, 64, rng.randrange(1, len(data) + 2))))


def _flip_bits(rng: random.Random, data: bytearray, _material: _Material) -> None:
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _set_byte(rng: random.Random, data: bytearray, _material: _Material) -> None:
    if data:
        data[_place(rng, data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))


def _set_length(rng: random.Random, data: bytearray, _material: _Material) -> None:
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice(_NUMBERS) % (1 << 8 * width)
    place = _place(rng, data)
    data[place : place + width] = value.to_bytes(width, rng.choice(("little", "little", "little", "big")))


def _truncate(rng: random.Random, data: bytearray, _material: _Material) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _cut(rng: random.Random, data: bytearray, _material: _Material) -> None:
    del data[_stretch(rng, data)]


def _repeat(rng: random.Random, data: bytearray, _material: _Material) -> None:
    stretch = _stretch(rng, data)
    piece = bytes(data[stretch])[:4096]
    data[stretch.start : stretch.start] = piece * rng.choice((1, 1, 2, 16))


def _splice(rng: random.Random, data: bytearray, material: _Material) -> None:
    other = rng.choice(material[0])
    data[_stretch(rng, data)] = other[_stretch(rng, bytearray(other))]


def _exchange_word(rng: random.Random, data: bytearray, material: _Material) -> None:
    """Replaces the run of letters and digits (or the quoted string) at some place by another word."""
    usual = _WORDS if not material[1] or rng.random() < 0.5 else material[1]
    start = stop = _place(rng, data)
    while start > 0 and _in_word(data[start - 1]):
        start -= 1
    while stop < len(data) and _in_word(data[stop]):
        stop += 1
    if rng.random() < 0.5 and start and stop < len(data) and data[start - 1] == data[stop] == 0x22:
        start, stop = start - 1, stop + 1
    data[start:stop] = rng.choice(usual)


def _in_word(byte: int) -> bool:
    return chr(byte).isalnum() or byte in b"_.-+" or byte >= 0x80


_EDITS = (
    _flip_bits,
    _set_byte,
    _set_length,
    _truncate,
    _cut,
    _repeat,
    _splice,
    _exchange_word,
    _exchange_word,
)
