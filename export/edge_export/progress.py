"""How a long step tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

#: (what is being done, steps done, steps in all). Opening a bundle counts bytes instead: the contract's
#: `ByteProgress`, which knows no steps.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
