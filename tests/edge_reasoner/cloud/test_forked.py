"""A cloud client in a forked child has connections of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudOptions

cloud = connect(CloudOptions(sys.argv[1], model="m", environment={}))

def ask(text):
    return cloud.submit(ChatRequest(({"role": "user", "content": text},))).result().text

print(ask("before"), ask("still before"), flush=True)
child = os.fork()
if child == 0:
    signal.alarm(60)
    print(ask("child"), ask("child again"), flush=True)
    cloud.close()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ask("after"))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_parent_and_child_do_not_share_connections() -> None:
    """The server sees the parent on its one kept connection, also afterwards, and the child on another."""
    ports: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = body["messages"][-1]["content"]
            ports[said] = self.client_address[1]
            choice = {"message": {"role": "assistant", "content": f"[{said}]"}, "finish_reason": "stop"}
            reply = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ran = subprocess.run(
            [sys.executable, "-c", SCRIPT, f"http://127.0.0.1:{server.server_port}/v1"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        server.shutdown()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == ["[before] [still before]", "[child] [child again]", "0 [after]"]
    assert ports["before"] == ports["still before"] == ports["after"]
    assert ports["child"] == ports["child again"] != ports["before"]
