#!/usr/bin/env bash
# Installs the project with what tests and demo need into a virtual environment, every download checked by its digest.
#
#   scripts/install.sh PYTHON      LOCKED=no: whatever releases suit constraints.txt, without digests
#
# Nothing comes in that requirements/ does not list: dependencies are not resolved again (--no-deps), and the build of
# the project itself uses the setuptools that is listed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1
pip() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

if [ "${LOCKED:-yes}" = no ]; then
  # torch first and alone: its pin decides which build the other packages find installed
  pip -c constraints.txt torch==2.13.0
  pip -c constraints.txt -e '.[dev]'
  exit
fi
checked() { pip --no-deps --require-hashes -r "requirements/$1"; }
# The CPU build, where pip knows a place that has it (`pip config set global.find-links …`); else what the index has,
# which on Linux asks for CUDA's libraries.
checked torch-cpu.txt 2>/dev/null || checked torch.txt
if "$python" -c '
import importlib.metadata as metadata
raise SystemExit(not any(name.startswith(("nvidia", "cuda", "triton")) for name in metadata.requires("torch") or ()))
'; then checked cuda.txt; fi
checked lock.txt
pip --no-deps --no-build-isolation -e .
