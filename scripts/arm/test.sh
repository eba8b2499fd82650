#!/usr/bin/env bash
# Runs the device runtime on emulated ARM cores: `make test-arm`.
#
#   scripts/arm/test.sh [--unit] [CPU…]     CPUs: cortex-a72 cortex-a76 (both unless named); --unit: no bundle needed
#
# The bundle is EDGE_REASONER_DEMO_BUNDLE, else demo/bundle. What it computes is recorded on this machine first and
# compared with what the emulated core computes from the same files. Limits: 15 minutes each for unit and bundle
# tests for each CPU.
#
# Unit tests left out, as they say nothing about ARM or are too slow under emulation: cloud/, server/, cli/ (sockets
# and text; their time limits are those of a real machine), contract/ (pure Python), machine/ but for the ISA probe (a
# bandwidth probe that takes a minute), engine/test_sampling.py's statistics, test_reasoner.py (fakes and
# loopback servers). Tests that need torch or transformers skip themselves.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$here/../.." && pwd)
unit_time_out_s=900
bundle_time_out_s=900
unit_tests=(tests/edge_reasoner/backends tests/edge_reasoner/activation tests/edge_reasoner/preprocess
  tests/edge_reasoner/machine/test_isa.py tests/edge_reasoner/engine/test_tokens.py
  tests/edge_reasoner/engine/test_generate.py)

fail() {
  echo "scripts/arm/test.sh: $1" >&2
  exit 1
}

unit_only=
if [ "${1:-}" = --unit ]; then
  unit_only=yes
  shift
fi
cpus=("$@")
[ ${#cpus[@]} -gt 0 ] || cpus=(cortex-a72 cortex-a76)
for cpu in "${cpus[@]}"; do
  [[ "$cpu" =~ ^cortex-a(72|76)$ ]] || fail "unknown CPU '$cpu' (allowed: cortex-a72 cortex-a76)"
done
cd "$checkout"
bundle=${EDGE_REASONER_DEMO_BUNDLE:-demo/bundle}
[ -n "$unit_only" ] || [ -f "$bundle/manifest.json" ] ||
  fail "no bundle in '$bundle': make one with edge-export, or set EDGE_REASONER_DEMO_BUNDLE, or give --unit"

"$here/setup.sh"
export ARM_PYTHONPATH="$checkout/tests/arm"
export PYTEST_ADDOPTS=

# run_pytest CPU SECONDS ARGUMENT…
run_pytest() {
  local cpu=$1 seconds=$2 status=0
  shift 2
  timeout "$seconds" "$here/run.sh" "$cpu" python3.11 -m pytest -o pythonpath=tests -o addopts= -p no:cacheprovider \
    -p arm_plugin -q --durations=5 "$@" || status=$?
  [ $status -ne 124 ] || fail "$cpu: not finished within $seconds s"
  [ $status -eq 0 ] || fail "$cpu: tests failed (pytest's status $status)"
}

if [ -z "$unit_only" ]; then
  export EDGE_REASONER_DEMO_BUNDLE="$bundle" EDGE_REASONER_ARM_EXPECTED="$checkout/.cache/arm/expected.json"
  python=$checkout/.venv/bin/python
  [ -x "$python" ] || python=python3
  timeout "$bundle_time_out_s" "$python" tests/arm/replay.py "$bundle" "$EDGE_REASONER_ARM_EXPECTED" ||
    fail "recording the bundle on this machine failed, see the lines above"
fi
for cpu in "${cpus[@]}"; do
  echo "== $cpu: unit tests" >&2
  run_pytest "$cpu" "$unit_time_out_s" "${unit_tests[@]}"
  [ -z "$unit_only" ] || continue
  echo "== $cpu: bundle" >&2
  EDGE_REASONER_ARM_CPU=$cpu run_pytest "$cpu" "$bundle_time_out_s" -s tests/arm/test_bundle_on_arm.py
done
