"""No room for a bundle: status 2, one line, and nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.tiny_checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
EXPORT = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from edge_export.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(main(sys.argv[1:]))
"""


def test_no_room_for_a_bundle(tmp_path):
    """As on a full disk, a write fails in the middle of the export."""
    write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    command = [sys.executable, "-c", EXPORT, str(tmp_path / "model"), "--profile", "generic-x86"]
    done = subprocess.run(
        [*command, "--recipe", "fp32", "--cache", "off", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "export")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "cannot write the bundle" in done.stderr, done.stderr
    assert not list(out.parent.iterdir())
