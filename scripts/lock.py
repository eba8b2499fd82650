"""Writes `requirements/`: the exact releases, with SHA-256 digests, that development and CI install.

    python scripts/lock.py      after setup.cfg has changed; needs `uv` (pip install uv) and an index

One set of files serves Python 3.10 and newer on Linux, macOS and Windows. `torch-cpu.txt` is the CPU
build, where pip is told of a place that has it; `torch.txt` is the index's own, for which `cuda.txt` is
what its CUDA build alone needs.
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
EXTRAS = ("export", "server", "dev")
#: needed by the build itself, which is not isolated, so that nothing comes without a digest
BUILD = ("setuptools>=77",)
#: CPU builds of the pinned torch that are not on the index: release → digests of its wheels
CPU_BUILDS = {
    "2.13.0": ("6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",),  # cp311, x86-64 Linux
}
_CUDA_ONLY = re.compile(r"(nvidia|cuda|triton)[-_a-z0-9]*==")
_HEAD = "# Made by scripts/lock.py from setup.cfg and constraints.txt; do not edit.\n"


def main() -> int:
    """Resolves and writes; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.in"
        wanted.write_text("\n".join([*requirements(), *BUILD]) + "\n", encoding="utf-8")
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10"]
        command += ["--generate-hashes", "--no-annotate", "--no-header", "-c", "constraints.txt"]
        done = subprocess.run(
            [*command, str(wanted)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
    FOLDER.mkdir(exist_ok=True)
    for name, blocks in split(done.stdout).items():
        (FOLDER / name).write_text(_HEAD + "".join(blocks), encoding="utf-8")
    return 0


def requirements() -> list[str]:
    """What setup.cfg asks for, with the extras of a development install."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    parts = [config["options"]["install_requires"]]
    parts += [config["options.extras_require"][extra] for extra in EXTRAS]
    lines = (line.strip() for part in parts for line in part.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "edge-reasoner["))]


def split(lock: str) -> dict[str, list[str]]:
    """The lock's requirements, each with its digests, by the file that they belong to."""
    files: dict[str, list[str]] = {
        name: [] for name in ("lock.txt", "torch.txt", "torch-cpu.txt", "cuda.txt")
    }
    for block in re.findall(r"^[A-Za-z0-9].*\n(?:[ \t].*\n)*", lock, re.MULTILINE):
        if found := re.match(r"torch==(\S+)", block):
            files["torch.txt"].append(block)
            for digest in CPU_BUILDS.get(found[1], ()):
                files["torch-cpu.txt"].append(f"torch=={found[1]}+cpu --hash=sha256:{digest}\n")
        else:
            files["cuda.txt" if _CUDA_ONLY.match(block) else "lock.txt"].append(block)
    return files


if __name__ == "__main__":
    sys.exit(main())
