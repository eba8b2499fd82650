"""An export that is killed (SIGKILL) when its progress reaches a given point: in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from edge_export.options import ExportOptions
from edge_export.pipeline import export


def export_until(
    model: str, out: str, cache: str, options: ExportOptions, what: str, count: int, log: str
) -> None:
    """Exports; dies when `what` is reported for the `count`-th time. Writes what was reported to `log`."""
    import torch

    torch.set_num_threads(1)
    seen: list[str] = []
    with Path(log).open("w") as file:

        def hook(name: str, done: int, total: int) -> None:
            seen.append(name)
            file.write(f"{name}\n")
            file.flush()
            if seen.count(what) == count:
                os.kill(os.getpid(), signal.SIGKILL)

        export(model, "generic-x86", out, options, hook, cache=Path(cache))


def killed(*arguments: object) -> tuple[int, list[str]]:
    """Runs `export_until`: exit status of the process, and what it had reported."""
    # A fork of a process that has imported everything and started no thread: quick, and as good as a new one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.killed_export"])
    process = context.Process(target=export_until, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode, Path(str(arguments[-1])).read_text().splitlines()
