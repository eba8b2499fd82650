#!/usr/bin/env bash
# Sets up an aarch64 userland under .cache/arm/ so that the device runtime runs on an x86-64 Debian without a board.
#
#   scripts/arm/setup.sh           install what is missing (idempotent; an interrupted run is resumed)
#   scripts/arm/setup.sh --check   install nothing; exit 0 only if the prerequisites are there or can be installed
#
# Three stages, each stamped with a digest of what it depends on:
#   qemu    qemu-user of trixie, static (bookworm's 7.2 crashes while importing onnxruntime >= 1.31)
#   root    Debian bookworm arm64 packages of Python 3.11, unpacked, never chrooted into
#   wheels  the project's device dependencies and test tools as aarch64 wheels, at the versions this machine's venv has
# Debian's signatures are checked by apt itself, in a private configuration: the host's apt sources, lists and dpkg
# database are read for the mirror's address and never changed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$here/../.." && pwd)
arm="$checkout/.cache/arm"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
apt_time_out_s=240
pip_time_out_s=400
python_packages=(python3.11 libpython3.11-stdlib libstdc++6 libgomp1 ca-certificates)
qemu_packages=(qemu-user)
wheel_platforms=(manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24
  manylinux_2_17 manylinux2014)
test_tools=(pytest pytest-timeout hypothesis onnx)

fail() {
  echo "scripts/arm/setup.sh: $1" >&2
  exit 1
}

# Address of the Debian mirror that this host already uses for its main archive.
mirror() {
  local found
  # shellcheck disable=SC2016  # apt expands these, not the shell
  found=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(ORIGIN)' 'Created-By: Packages' 2>/dev/null |
    awk '$1 ~ /\/debian\/?$/ {print $1; exit}')
  if [ -z "$found" ]; then # before the first `apt-get update` some images list no targets: read the sources
    found=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
      grep -v '^ *#' | grep -oE '(https?|file)://[^ ]+/debian/?( |$)' | tr -d ' ' | head -1) || true
  fi
  [ -n "$found" ] || fail "no Debian mirror in this host's apt sources (looked for an address that ends in /debian)"
  echo "$found"
}

# The Python whose pip fetches the wheels: the checkout's venv, else the system's.
host_python() {
  if [ -x "$checkout/.venv/bin/python" ]; then echo "$checkout/.venv/bin/python"; else command -v python3; fi
}

check_prerequisites() {
  [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "needs Linux on x86-64, this is $(uname -s) on $(uname -m)"
  local tool
  for tool in apt-get dpkg dpkg-deb timeout sha256sum awk; do
    command -v "$tool" >/dev/null || fail "needs the command '$tool' (a Debian system)"
  done
  [ -r "$keyring" ] || fail "needs Debian's keys in $keyring (package debian-archive-keyring)"
  mirror >/dev/null
  local python
  python=$(host_python) && [ -n "$python" ] || fail "needs python3 with pip (or run 'make setup' first)"
  "$python" -m pip --version >/dev/null 2>&1 || fail "'$python -m pip' does not work (run 'make setup' first)"
}

# private_apt NAME SUITE ARCHITECTURE: an apt configuration of its own below .cache/arm/apt-NAME.
private_apt() {
  local base="$arm/apt-$1" suite=$2 architecture=$3
  mkdir -p "$base"/{state/lists/partial,cache/archives/partial,etc}
  : >"$base/state/status"
  echo "deb [arch=$architecture signed-by=$keyring] $(mirror) $suite main" >"$base/etc/sources.list"
  cat >"$base/apt.conf" <<CONF
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
APT::Architecture "$architecture";
#clear APT::Architectures;
APT::Architectures { "$architecture"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
APT::Update::Error-Mode "any";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Dir::Etc::sourcelist "$base/etc/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "$base/state";
Dir::State::status "$base/state/status";
Dir::Cache "$base/cache";
Debug::NoLocking "true";
CONF
}

# first_error LOG: the line to show of a log that ends in a failure.
first_error() { grep -m1 -iE '^(e:|err:|error|w:)' "$1" || echo "see $1"; }

# fetch_and_unpack NAME KEEP PACKAGE…: downloads the packages with their dependencies, unpacks them and puts the part
# of them below KEEP (a path inside the packages, . for all) at .cache/arm/NAME.
fetch_and_unpack() {
  local name=$1 keep=$2 target="$arm/$1" log="$arm/$1.log"
  shift 2
  local apt=(timeout "$apt_time_out_s" apt-get -q -y -c "$arm/apt-$name/apt.conf")
  "${apt[@]}" update >"$log" 2>&1 || fail "apt refused the $name index: $(first_error "$log")"
  "${apt[@]}" --download-only install "$@" >>"$log" 2>&1 ||
    fail "apt refused the $name packages: $(first_error "$log")"
  rm -rf "$target.part" && mkdir -p "$target.part"
  local deb
  for deb in "$arm/apt-$name/cache/archives/"*.deb; do
    dpkg-deb -x "$deb" "$target.part" >>"$log" 2>&1 || fail "cannot unpack $(basename "$deb"), see $log"
  done
  [ -e "$target.part/$keep" ] || fail "the $name packages have no $keep, see $log"
  rm -rf "$target"
  if [ "$keep" = . ]; then
    mv "$target.part" "$target"
  else
    mkdir "$target" && mv "$target.part/$keep" "$target/"
  fi
  rm -rf "$target.part" "$arm/apt-$name"
}

# done_before STAGE DIGEST: whether the stage was finished for these very inputs.
done_before() { [ -f "$arm/$1.stamp" ] && [ "$(cat "$arm/$1.stamp")" = "$2" ]; }

digest() { printf '%s\n' "$@" | sha256sum | cut -d' ' -f1; }

stage_qemu() {
  local wanted
  wanted=$(digest trixie "${qemu_packages[@]}")
  if done_before qemu "$wanted" && qemu --version >/dev/null 2>&1; then return; fi
  echo "arm: fetching qemu-user (trixie)" >&2
  private_apt qemu trixie amd64
  fetch_and_unpack qemu usr/bin/qemu-aarch64 "${qemu_packages[@]}"
  qemu --version >/dev/null 2>&1 || fail "the unpacked qemu-aarch64 does not start, see $arm/qemu.log"
  echo "$wanted" >"$arm/qemu.stamp"
}

qemu() { timeout 60 "$arm/qemu/qemu-aarch64" "$@"; }

stage_root() {
  local wanted
  wanted=$(digest bookworm "${python_packages[@]}")
  if done_before root "$wanted" && [ -x "$arm/root/usr/bin/python3.11" ]; then return; fi
  echo "arm: fetching Python 3.11 for arm64 (bookworm)" >&2
  private_apt root bookworm arm64
  fetch_and_unpack root . "${python_packages[@]}"
  echo "$wanted" >"$arm/root.stamp"
}

# Requirements of the device (setup.cfg: install_requires and the extra `server`), one a line.
requirements() {
  "$(host_python)" - "$checkout/setup.cfg" <<'PY'
import configparser, sys

config = configparser.ConfigParser()
config.read(sys.argv[1], encoding="utf-8")
lines = config["options"]["install_requires"].split("\n") + config["options.extras_require"]["server"].split("\n")
print("\n".join(line for line in lines if line.strip()))
PY
}

# The host's own versions as pip constraints, so that both architectures run the same releases.
constraints() {
  "$(host_python)" -m pip list --format=freeze 2>/dev/null |
    grep -E '^(onnx|onnxruntime|numpy|tokenizers|msgspec|[Jj]inja2|pytest|hypothesis|starlette|h11|httpx)==' || true
}

stage_wheels() {
  local wanted required constrained
  required=$(requirements)
  constrained=$(constraints)
  wanted=$(digest "$required" "$constrained" "${test_tools[@]}" "${wheel_platforms[@]}")
  if done_before wheels "$wanted" && [ -d "$arm/wheels/onnxruntime" ]; then return; fi
  echo "arm: fetching aarch64 wheels" >&2
  echo "$required" >"$arm/requirements.txt"
  echo "$constrained" >"$arm/constraints.txt"
  local platforms=() platform
  for platform in "${wheel_platforms[@]}"; do platforms+=(--platform "${platform}_aarch64"); done
  rm -rf "$arm/wheels.part"
  timeout "$pip_time_out_s" "$(host_python)" -m pip install --quiet --target "$arm/wheels.part" "${platforms[@]}" \
    --python-version 3.11 --implementation cp --only-binary=:all: --no-compile \
    -c "$arm/constraints.txt" -r "$arm/requirements.txt" "${test_tools[@]}" >"$arm/wheels.log" 2>&1 ||
    fail "pip refused the aarch64 wheels: $(first_error "$arm/wheels.log")"
  rm -rf "$arm/wheels" && mv "$arm/wheels.part" "$arm/wheels"
  echo "$wanted" >"$arm/wheels.stamp"
}

smoke() {
  timeout 120 "$here/run.sh" cortex-a72 python3.11 >&2 -c '
import platform, onnxruntime
print("arm: onnxruntime", onnxruntime.__version__, "on", platform.machine())
raise SystemExit(platform.machine() != "aarch64")
' || fail "the aarch64 Python does not import onnxruntime, see the lines above"
}

# Asks the registries, for whatever is not installed yet, whether they serve it; installs nothing.
check() {
  local log="$arm/check.log" name suite architecture
  mkdir -p "$arm"
  while read -r name suite architecture; do
    [ ! -f "$arm/$name.stamp" ] || continue
    private_apt "$name" "$suite" "$architecture"
    timeout "$apt_time_out_s" apt-get -q -c "$arm/apt-$name/apt.conf" update >"$log" 2>&1 ||
      fail "the Debian mirror does not serve $suite for $architecture: $(first_error "$log")"
  done <<<$'qemu trixie amd64\nroot bookworm arm64'
  if [ ! -f "$arm/wheels.stamp" ]; then
    timeout "$pip_time_out_s" "$(host_python)" -m pip install --dry-run --quiet --no-deps --target "$arm/wheels.part" \
      --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --python-version 3.11 \
      --implementation cp --only-binary=:all: onnxruntime >"$log" 2>&1 ||
      fail "the Python registry serves no aarch64 onnxruntime: $(first_error "$log")"
  fi
  echo "arm: the prerequisites are there" >&2
}

check_prerequisites
[ $# -le 1 ] && [ "${1:---check}" = --check ] || fail "unknown argument '$*' (allowed: --check)"
if [ $# -eq 1 ]; then
  check
  exit 0
fi
mkdir -p "$arm"
exec 9>"$arm/lock"
command -v flock >/dev/null && { flock -w 600 9 || fail "another set-up has been running for 10 minutes"; }
stage_qemu
stage_root
stage_wheels
smoke
