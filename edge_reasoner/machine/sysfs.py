"""Bounded reads from /proc and /sys: small text files that may be missing, binary or unreadable."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path, limit_bytes: int = 64 * 1024) -> str | None:
    """At most `limit_bytes` of a file as stripped text (NULs dropped), or None where it cannot be read."""
    try:
        with path.open("rb") as stream:
            data = stream.read(limit_bytes)
    except OSError:
        return None
    return data.decode("utf-8", "replace").replace("\x00", "").strip()


def read_int(path: Path) -> int | None:
    """The file's one integer (decimal or 0x…), or None."""
    text = read_text(path, limit_bytes=256)
    try:
        return int(text, 0) if text else None
    except ValueError:
        return None


def parse_cpu_list(text: str, most: int = 4096) -> tuple[int, ...]:
    """CPU numbers of a list such as `0-3,6`; malformed parts are skipped."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal() and (not last or last.isdecimal()):
            begin, end = int(first), int(last or first)
            if begin <= end < most:
                cpus.update(range(begin, end + 1))
    return tuple(sorted(cpus))
