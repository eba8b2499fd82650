"""A disk without room is the user's to mend: one line, not a fault of the program."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from edge_reasoner.errors import InputError

#: a disk that is full, a quota or a limit that is reached
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk_named(doing: str) -> Iterator[None]:
    """Turns the system's refusal to write more into an InputError that says what was being done."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise InputError(
            f"{doing}: cannot write the bundle: {error.strerror}; nothing is left of it"
        ) from error
