"""Runs commands in this one process, with bounded memory; tells status, output and time of each.

python run_commands.py BYTES < [["edge-reasoner", ARGUMENT…], …]      prints a JSON list
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import resource
import sys
from pathlib import Path
from typing import Any

#: for one command; one that waits for something is found, with what it waits for
_MOST_S = 20


def _run(program: str, arguments: list[str]) -> dict[str, Any]:
    if program == "edge-export":
        from edge_export.cli import main
    else:
        from edge_reasoner.cli.main import main
    print(program, *arguments, file=sys.__stderr__, flush=True)
    said, errors = io.StringIO(), io.StringIO()
    faulthandler.dump_traceback_later(_MOST_S, exit=True, file=sys.__stderr__)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        status = main(arguments)
    faulthandler.cancel_dump_traceback_later()
    return {
        "status": status,
        "stdout": said.getvalue(),
        "stderr": errors.getvalue(),
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """Most memory since this program began: getrusage would count what its parent held before."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    if int(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    print(json.dumps([_run(program, arguments) for program, *arguments in json.load(sys.stdin)]))
