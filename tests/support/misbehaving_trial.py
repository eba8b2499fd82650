"""The child of a self-test, as a hostile graph might make it: started in place of the interpreter.

    misbehaving_trial.py HOW VARIANT -c CODE REQUEST

Confined as the real one; for another variant than VARIANT ("any": none) it becomes the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

HOW, VARIANT, _, CODE, REQUEST = sys.argv[1:]
if VARIANT not in ("any", json.loads(REQUEST)["candidate"]["variant_id"]):
    os.execv(sys.executable, [sys.executable, "-c", CODE, REQUEST])
if HOW == "no python":
    sys.exit("cannot open -c")
found = re.search(r"main\((\d+), (\d+),", CODE)
assert found is not None
ANSWER, PARENT = int(found[1]), int(found[2])
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import msgspec  # noqa: E402

from edge_reasoner.activation.child import TrialRequest  # noqa: E402
from edge_reasoner.machine.confined import enter  # noqa: E402

enter(msgspec.json.decode(REQUEST, type=TrialRequest).limits, ANSWER, PARENT)
if HOW == "hangs":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
elif HOW == "spins":
    while True:
        pass
elif HOW == "eats memory":
    eaten = []
    while True:
        eaten.append(bytearray(os.urandom(1 << 10) * (1 << 14)))
elif HOW == "asks for all memory":
    sys.stderr.write(f"got {len(bytearray(1 << 42))}\n")
elif HOW == "floods":
    while True:
        os.write(ANSWER, b"x" * 4096)
elif HOW == "talks":
    sys.stdout.write("on standard output\n" * 10_000)
    sys.stderr.write("\x1b]0;title\x07 many words " * 100_000 + "\n")
    sys.exit(3)
elif HOW == "writes a file":
    Path(os.environ["MISBEHAVING_FILE"]).write_bytes(b"x" * (8 << 20))
elif HOW.startswith("says "):
    os.write(ANSWER, HOW.removeprefix("says ").encode())
else:
    os.kill(os.getpid(), getattr(signal, HOW))
    time.sleep(600)
