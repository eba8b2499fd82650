"""ISA features, and importing native modules where a crash does no harm."""

import platform
import subprocess
import sys

import pytest

from edge_reasoner.contract.profile.schema import ARM_FEATURES, X86_FEATURES
from edge_reasoner.errors import BackendError
from edge_reasoner.machine.isa import isa_features, native_import_is_safe


def test_onnxruntime_imports_in_a_child():
    """The real onnxruntime imports on this machine and reports its version."""
    pytest.importorskip("onnxruntime")
    probe = native_import_is_safe()
    assert probe.safe and probe.conclusive and probe.version and probe.message == ""
    probe.raise_if_unsafe()


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV"])
def test_a_crashing_import_is_reported_not_suffered(tmp_path, name):
    """A module that kills its process while imported is reported in one line, as a BackendError on demand."""
    (tmp_path / "crashing.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    probe = native_import_is_safe("crashing", python=_python_with(tmp_path))
    assert not probe.safe and probe.conclusive
    assert name in probe.message and "\n" not in probe.message
    with pytest.raises(BackendError, match=name):
        probe.raise_if_unsafe()


def test_a_missing_module_and_a_hang_are_told_apart(tmp_path):
    """A missing module and a hanging import each give their own line."""
    assert "cannot be imported" in native_import_is_safe("no_such_module_here").message
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(60)\n")
    probe = native_import_is_safe("hanging", timeout_s=1.0, python=_python_with(tmp_path))
    assert not probe.safe and "did not finish within 1 s" in probe.message


def test_inconclusive_probes_do_not_block():
    """No child process, or one on another architecture, leaves the import unchecked and says so."""
    missing = native_import_is_safe(python=("/nonexistent/python",))
    assert missing.safe and not missing.conclusive and "unchecked" in missing.message

    def foreign(command, **_options):
        return subprocess.CompletedProcess(command, 1, "riscv64\n", "ImportError: no")

    probe = native_import_is_safe(run=foreign)
    assert probe.safe and not probe.conclusive and "riscv64" in probe.message


def test_module_names_are_checked():
    """Only a module name reaches the child's command line."""
    with pytest.raises(ValueError, match="not a module name"):
        native_import_is_safe("os; import sys")


def test_features_of_this_machine_are_in_the_vocabulary():
    """The running machine's features use the profiles' words."""
    expected = ARM_FEATURES if platform.machine() in ("aarch64", "arm64") else X86_FEATURES
    assert isa_features() <= expected
    if platform.machine() in ("aarch64", "x86_64"):
        assert isa_features()


def test_features_from_hwcap_bits():
    """HWCAP words of a Cortex-A72 and a Cortex-A76 decode to their features."""
    a72 = {16: 0x8FF & ~0x100, 26: 0}
    a76 = {16: 0x119FFF, 26: 0}
    assert isa_features(machine="aarch64", getauxval=a72.get) == {"asimd", "aes", "crc32"}
    got = isa_features(machine="aarch64", getauxval=a76.get)
    assert {"asimddp", "fphp", "asimdhp", "lse"} <= got and "i8mm" not in got


def test_features_common_to_all_cores(tmp_path):
    """Of differing cores only the common features count; foreign words are dropped."""
    (tmp_path / "cpuinfo").write_text(
        "processor : 0\nFeatures\t: fp asimd atomics asimddp\n\nprocessor : 1\nFeatures\t: fp asimd atomics\n"
    )
    assert isa_features(tmp_path, "aarch64") == {"asimd", "lse"}
    assert isa_features(tmp_path / "none", "aarch64") == frozenset()


def _python_with(folder):
    """An interpreter that finds modules in `folder`."""
    return ("env", f"PYTHONPATH={folder}", sys.executable)


def test_a_child_that_does_not_speak_utf8(tmp_path):
    """Bytes that are no UTF-8 in what the child says: the import still fails in one line."""
    (tmp_path / "odd_words.py").write_text("import os\nos.write(2, b'\\xff\\xfe broken\\n')\nos._exit(3)\n")
    probe = native_import_is_safe("odd_words", python=_python_with(tmp_path))
    assert not probe.safe and "broken" in probe.message
