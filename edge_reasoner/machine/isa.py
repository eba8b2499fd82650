"""What the running CPU can execute, found without importing native code.

A wheel built for newer cores kills the process with SIGILL while it is imported (onnxruntime issue 23957),
so native modules are first imported in a child process: `native_import_is_safe`. The answer does not change
while the machine and the wheel stay the same; callers cache it.
"""

from __future__ import annotations

import ctypes
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from edge_reasoner.contract.profile.schema import ARM_FEATURES, X86_FEATURES, Record
from edge_reasoner.errors import BackendError
from edge_reasoner.machine.quiet import QUIET_VARIABLES
from edge_reasoner.machine.sysfs import read_text

_AT_HWCAP, _AT_HWCAP2 = 16, 26
#: bits of Linux's arch/arm64/include/uapi/asm/hwcap.h
_HWCAP_BITS = {1: "asimd", 3: "aes", 7: "crc32", 8: "lse", 9: "fphp", 10: "asimdhp", 12: "asimdrdm",
               20: "asimddp", 22: "sve"}  # fmt: skip
_HWCAP2_BITS = {1: "sve2", 9: "svei8mm", 13: "i8mm", 14: "bf16", 23: "sme"}
#: spellings of /proc/cpuinfo that differ from the profiles' vocabulary
_CPUINFO_NAMES = {"atomics": "lse", "avx512_vnni": "avx512vnni"}
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_CHILD = """import os, platform
os.environ.update({1!r})
print(platform.machine(), flush=True)
import {0} as module
print(getattr(module, "__version__", ""))
"""


class RunProcess(Protocol):
    """`subprocess.run`, as far as it is used here."""

    def __call__(
        self,
        command: Sequence[str],
        /,
        *,
        capture_output: bool,
        text: Literal[True],
        errors: str,
        timeout: float,
        check: bool,
    ) -> subprocess.CompletedProcess[str]: ...


class ImportProbe(Record, frozen=True, kw_only=True):
    """Whether a native module can be imported on this machine.

    `conclusive` is False when no child process could tell (none may be started, or it ran on another
    architecture, as under user-mode emulation): then `safe` is True and `message` says why.
    """

    module: str
    safe: bool
    conclusive: bool
    version: str = ""
    #: one clear line, empty where the import succeeded
    message: str = ""

    def raise_if_unsafe(self) -> None:
        """Raises BackendError with `message` unless the import is safe."""
        if not self.safe:
            raise BackendError(self.message)


def native_import_is_safe(
    module: str = "onnxruntime",
    timeout_s: float = 60.0,
    run: RunProcess = subprocess.run,
    python: Sequence[str] = (sys.executable,),
) -> ImportProbe:
    """Imports `module` in a child process and reports a crash as one line instead of dying with it.

    `python` is the command that starts the interpreter. Never raises for a failing import; raises ValueError
    if `module` is not a module name.
    """
    if not _MODULE.fullmatch(module):
        raise ValueError(f"not a module name: {module!r}")
    command = [*python, "-c", _CHILD.format(module, QUIET_VARIABLES)]
    try:
        done = run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        message = f"importing {module} did not finish within {timeout_s:g} s; it hangs on this machine"
        return ImportProbe(module=module, safe=False, conclusive=True, message=message)
    except OSError as error:
        message = f"no child process to try {module} in ({error.strerror or error}); imported unchecked"
        return ImportProbe(module=module, safe=True, conclusive=False, message=message)
    lines = done.stdout.split("\n")
    if lines[0] and lines[0] != platform.machine():
        message = (
            f"the child process ran on {lines[0]}, not {platform.machine()}; {module} imported unchecked"
        )
        return ImportProbe(module=module, safe=True, conclusive=False, message=message)
    if done.returncode == 0:
        version = lines[1].strip() if len(lines) > 1 else ""
        return ImportProbe(module=module, safe=True, conclusive=True, version=version)
    return ImportProbe(module=module, safe=False, conclusive=True, message=_failure(module, done))


def _failure(module: str, done: subprocess.CompletedProcess[str]) -> str:
    """One line for a child that died or raised."""
    if done.returncode < 0:
        number = -done.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        if number == signal.SIGILL:
            return (
                f"importing {module} dies with SIGILL: the installed wheel uses instructions this CPU lacks "
                f"(it has: {' '.join(sorted(isa_features())) or 'unknown'}); install a wheel built for it"
            )
        return f"importing {module} crashes with {name}; reinstall it or install another version"
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    return f"{module} cannot be imported: {last.strip()[:300]}"


def isa_features(
    proc: Path = Path("/proc"),
    machine: str | None = None,
    getauxval: Callable[[int], int] | None = None,
) -> frozenset[str]:
    """CPU features in the profiles' vocabulary (ARM_FEATURES or X86_FEATURES) that every core has.

    On 64-bit ARM from the kernel's HWCAP (`getauxval`, by default the C library's when `proc` is the real
    one), else from `/proc/cpuinfo`; empty where neither tells.
    """
    machine = machine or platform.machine()
    if machine in ("aarch64", "arm64"):
        if getauxval is None and proc == Path("/proc") and machine == platform.machine():
            getauxval = _libc_getauxval()
        if getauxval is not None and (hwcap := getauxval(_AT_HWCAP)):
            return _from_hwcap(hwcap, getauxval(_AT_HWCAP2))
    return _from_cpuinfo(read_text(proc / "cpuinfo", limit_bytes=1 << 20) or "")


def _from_hwcap(hwcap: int, hwcap2: int) -> frozenset[str]:
    low = {name for bit, name in _HWCAP_BITS.items() if hwcap >> bit & 1}
    high = {name for bit, name in _HWCAP2_BITS.items() if hwcap2 >> bit & 1}
    return frozenset(low | high)


def _from_cpuinfo(text: str) -> frozenset[str]:
    """Features of every core's `Features` (ARM) or `flags` (x86) line, those of the vocabulary."""
    vocabulary = {"Features": ARM_FEATURES, "flags": X86_FEATURES}
    per_cpu = [
        frozenset(_CPUINFO_NAMES.get(word, word) for word in words.split()) & vocabulary[key]
        for key, words in re.findall(r"^(Features|flags)[ \t]*:(.*)$", text, flags=re.MULTILINE)
    ]
    return frozenset.intersection(*per_cpu) if per_cpu else frozenset()


def _libc_getauxval() -> Callable[[int], int] | None:
    """The C library's `getauxval`, or None where there is none (not Linux)."""
    try:
        function = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_ulong
    function.argtypes = [ctypes.c_ulong]
    return lambda key: int(function(key))
