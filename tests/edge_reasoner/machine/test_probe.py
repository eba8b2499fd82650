"""The probe on fake trees of four machines, and on the real one."""

import subprocess

import pytest

from edge_reasoner.contract.profile.load import dump_profile_toml, parse_profile
from edge_reasoner.errors import ProfileError
from edge_reasoner.machine.probe import Speed, measure_speed, probe_machine
from edge_reasoner.machine.state import read_state
from edge_reasoner.machine.sysfs import parse_cpu_list


def fixed_speed(threads, _memory_bytes):
    """A measurement that takes no time."""
    return Speed(read_gbps=12.0, copy_gbps=5.0, threads=threads, float_gmacs=30.0)


def probe(root, machine="aarch64"):
    """Probes a fake tree; whatever it finds must also survive its own file format."""
    profile = probe_machine(root=root, machine=machine, measure=fixed_speed, onnxruntime_version="1.31.1")
    assert parse_profile(dump_profile_toml(profile).encode(), "probe") == profile
    return profile


def test_pi5(pi5_tree):
    """A Pi 5 is recognized: one big cluster of A76, measured bandwidth, the board's own power figures."""
    profile = probe(pi5_tree)
    assert [(c.cores, c.microarchitecture, c.big) for c in profile.clusters] == [(4, "cortex-a76", True)]
    assert {"asimddp", "lse", "fphp"} <= profile.isa and "i8mm" not in profile.isa
    assert profile.clusters[0].clock_ghz.value == 2.4 and profile.clusters[0].clock_ghz.basis == "measured"
    assert profile.memory.effective_decode_gbps.value == pytest.approx(0.85 * 12.0)
    assert profile.memory.capacity_gib.value == pytest.approx(7.88, abs=0.01)
    assert profile.power.stress_w.value == 9.7
    assert "Raspberry Pi 5" in profile.title and profile.os.startswith("Debian GNU/Linux 12")


def test_rk3588_big_little(rk3588_tree):
    """On big.LITTLE the A76 pairs are big, the A55 are not, and threads follow the big cores."""
    profile = probe(rk3588_tree)
    found = [(c.cores, c.microarchitecture, c.big) for c in profile.clusters]
    assert found == [(2, "cortex-a76", True), (2, "cortex-a76", True), (4, "cortex-a55", False)]
    assert profile.big_cores == 4 and profile.default_threads == 4
    assert profile.accelerator("rknpu2") is not None


def test_orin(orin_tree):
    """An Orin Nano is recognized with its GPU and stays at opset 21."""
    profile = probe(orin_tree)
    assert profile.big_cores == 6 and profile.accelerator("ampere-gpu") is not None
    assert profile.max_opset == 21
    assert profile.clusters[0].microarchitecture == "cortex-a78ae"


def test_x86_container(x86_tree):
    """An x86 VM: clock from cpuinfo (estimated), memory from the container's limit, generic base."""
    profile = probe(x86_tree, "x86_64")
    assert profile.clusters[0].cores == 2 and profile.clusters[0].microarchitecture == "AMD EPYC"
    assert profile.clusters[0].clock_ghz.value == 2.6 and profile.clusters[0].clock_ghz.basis == "estimated"
    assert "avx512vnni" in profile.isa
    assert profile.memory.capacity_gib.value == 4.0
    assert profile.memory.theoretical_gbps is None


def test_an_empty_tree_gives_a_conservative_profile(tmp_path):
    """Where nothing can be read, the generic profile's figures stand."""
    profile = probe(tmp_path)
    assert profile.big_cores == 1 and profile.clusters[0].microarchitecture == "unknown"
    assert profile.memory.capacity_gib.value == 4.0


def test_other_architectures_are_refused(tmp_path):
    """A 32-bit or foreign machine is refused with the allowed architectures."""
    with pytest.raises(ProfileError, match="allowed: aarch64, x86_64"):
        probe_machine(root=tmp_path, machine="armv7l", measure=fixed_speed)


def test_the_real_machine():
    """This machine can be probed for real: measured figures, progress lines, a valid profile."""
    lines = []
    profile = probe_machine(
        measure=lambda threads, size: measure_speed(threads, size, seconds=0.05), progress=lines.append
    )
    assert profile.memory.copy_gbps.basis == "measured" and profile.memory.copy_gbps.value > 0
    assert profile.memory_budget_bytes > 0 and profile.isa
    assert len(lines) >= 3


def test_measurement_is_bounded():
    """However slow the clock says a step is, the measurement ends after three runs of each step."""
    ticks = iter(range(10**6))
    speed = measure_speed(1, 1 << 26, clock=lambda: float(next(ticks)))
    assert speed.read_gbps > 0
    assert next(ticks) < 40


def test_state_of_a_pi(pi5_tree):
    """Temperature, governor and the firmware's throttling bits are read."""

    def vcgencmd(command, **_options):
        return subprocess.CompletedProcess(command, 0, "throttled=0x50005\n", "")

    state = read_state(pi5_tree, run=vcgencmd)
    assert (state.temperature_c, state.temperature_zone, state.governor) == (61.75, "cpu-thermal", "ondemand")
    assert state.throttling == (
        "under-voltage now", "throttled now", "under-voltage since boot", "throttled since boot",
    )  # fmt: skip


def test_state_of_an_orin(orin_tree):
    """The power mode's name comes from nvpmodel's files; an absent sensor is skipped."""
    state = read_state(orin_tree)
    assert state.power_mode == "15W" and state.temperature_c == 51.5 and state.throttling is None


def test_a_hanging_or_garbled_firmware_tool_is_no_error(pi5_tree):
    """A firmware tool that hangs, fails or talks nonsense leaves throttling unknown."""

    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    def garble(command, **_options):
        return subprocess.CompletedProcess(command, 0, "\x00nonsense", "")

    assert read_state(pi5_tree, run=hang).throttling is None
    assert read_state(pi5_tree, run=garble).throttling is None


def test_cpu_lists():
    """Kernel CPU lists parse; malformed or huge parts are skipped."""
    assert parse_cpu_list("0-3,6") == (0, 1, 2, 3, 6)
    assert parse_cpu_list("x,3-1,0-99999999,2") == (2,)
