"""Nothing leaves the device by itself: nothing is written outside the cache, nobody asked, in any command."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import network_trap
from support.answering_bundle import write_answering_bundle
from support.tiny_checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
PROXY_PORT = 18080
NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--mount")
REASONER = (sys.executable, "-m", "edge_reasoner.cli.main")
EXPORT = (sys.executable, "-m", "edge_export.cli")
#: names a host and talks through the proxy, as a library that reports home would
CONTROL = """
import socket, urllib.request
for ask in (lambda: socket.getaddrinfo("telemetry.example", 443),
            lambda: urllib.request.urlopen("http://telemetry.example/", timeout=5)):
    try:
        ask()
    except OSError:
        pass
"""
#: long enough for an event to be stored; the library has nothing to say when it is done
BARE_IMPORT = "import onnxruntime, time; time.sleep(1)"


def trapped(home: Path, *commands: tuple[object, ...]) -> dict:
    """Runs the commands with `home` as an empty HOME, in the trap; skips where this system cannot lay one."""
    home.mkdir()
    proxy = f"http://127.0.0.1:{PROXY_PORT}"
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
    } | {
        name: proxy
        for upper in ("HTTP", "HTTPS", "ALL")
        for name in (f"{upper}_PROXY", f"{upper.lower()}_proxy")
    }
    (home / "tmp").mkdir()
    texts = [[str(part) for part in command] for command in commands]
    command = [*NAMESPACES, sys.executable, network_trap.__file__, str(PROXY_PORT)]
    try:
        subprocess.run([*NAMESPACES, "true"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no user, network and mount namespace here: {error}")
    done = subprocess.run(
        [*command, json.dumps(environment), json.dumps(texts)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def files_in(home: Path) -> list[str]:
    """Every file and folder below, but for the empty folder for temporary files."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path != home / "tmp")


def test_nothing_is_written_outside_the_cache_and_nobody_is_asked(tmp_path):
    """Answering offline, doctor, a dry-run and a real export: no name looked up, no connection, no file but
    the cache's own."""
    bundle = write_answering_bundle(tmp_path / "bundle")
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)
    home, out = tmp_path / "home", tmp_path / "out"
    found = trapped(
        home,
        (*REASONER, "ask", bundle, "hello", "--mode", "offline", "--max-tokens", "4", "--json"),
        (*REASONER, "doctor", bundle, "--json"),
        (*EXPORT, checkpoint, "--profile", "generic-x86", "--threads", "1", "--dry-run", "--json"),
        (*EXPORT, checkpoint, "--profile", "generic-x86", "--threads", "1", "--recipe", "fp32", "--out", out),
    )
    assert [one["status"] for one in found["ran"]] == [0, 0, 0, 0], found["ran"]
    assert (found["asked"], found["proxied"]) == ([], [])
    outside = [
        name
        for name in files_in(home)
        if name != ".cache" and not f"{name}/".startswith(".cache/edge_reasoner/")
    ]
    assert outside == []
    assert json.loads(found["ran"][0]["out"])["source"] in ("local", "degraded")


def test_the_trap_catches(tmp_path):
    """The control: a name that is looked up and a request through the proxy are both seen."""
    found = trapped(tmp_path / "home", (sys.executable, "-c", CONTROL))
    assert "telemetry.example" in found["asked"]
    assert found["proxied"] == ["GET http://telemetry.example/ HTTP/1.1"]


def test_without_the_variable_the_library_leaves_traces(tmp_path):
    """A bare import of onnxruntime writes into HOME (since 1.29), one behind our seam does not."""
    bare, ours = tmp_path / "bare", tmp_path / "ours"
    trapped(bare, (sys.executable, "-c", BARE_IMPORT))
    if not files_in(bare):
        pytest.skip("this onnxruntime writes nothing by itself")
    seam = f"import edge_reasoner.backends.onnxruntime.session; {BARE_IMPORT}"
    found = trapped(ours, (sys.executable, "-c", seam))
    assert found["ran"][0]["status"] == 0, found["ran"]
    assert (files_in(ours), found["asked"], found["proxied"]) == ([], [], [])


def imports() -> dict[str, set[str]]:
    """Top-level package → the product's files that import it, wherever in the file."""
    found: dict[str, set[str]] = {}
    for package in ("edge_reasoner", "export/edge_export"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                for name in names:
                    found.setdefault(name.split(".")[0], set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_one_file_imports_each_library_that_reports_home():
    """onnxruntime and huggingface_hub come in at one place each, where telemetry is turned off; transformers
    not at all, torch not on the device."""
    found = imports()
    assert found["onnxruntime"] == {"edge_reasoner/backends/onnxruntime/session.py"}
    assert found["huggingface_hub"] == {"export/edge_export/checkpoint/hub.py"}
    assert not {"transformers", "optimum", "datasets"} & set(found)
    assert not [path for path in found["torch"] if path.startswith("edge_reasoner/")]


@pytest.mark.parametrize(
    ("seam", "variable", "library"),
    [
        ("edge_reasoner.backends.onnxruntime.session", "ORT_DISABLE_TELEMETRY", "onnxruntime"),
        ("edge_export.checkpoint.hub", "HF_HUB_DISABLE_TELEMETRY", "huggingface_hub"),
    ],
)
def test_telemetry_is_off_before_the_library_is_looked_for(seam, variable, library):
    """An import hook sees the variable set when the library's import begins, whatever it was before."""
    program = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == {library!r}:
            print(os.environ.get({variable!r}))
sys.meta_path.insert(0, Watch())
import {seam}
"""
    environment = {
        **os.environ,
        variable: "0",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "export"))),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr[-2000:]
