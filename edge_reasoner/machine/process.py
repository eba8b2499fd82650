"""Is this still the process that made something? A forked child has its parent's objects, not its threads."""

from __future__ import annotations

import os

from edge_reasoner.errors import BackendError


def check_same_process(pid: int, what: str = "the model was opened") -> None:
    """Raises BackendError if this process is not `pid`, in which `what` happened, but a forked child of it.

    Locks that another thread held at the fork are held in the child for ever, and native threads are gone, so
    whoever has either asks here before it waits for them.
    """
    if pid != os.getpid():
        raise BackendError(f"{what} before this process was forked; open it again in the child process")
