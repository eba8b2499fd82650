"""Fake /proc and /sys trees of boards we do not have."""

import pytest

A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


def write(root, path, text):
    """One file of the tree."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def arm_tree(root, *, model, cores, memory_kb, features=A76):
    """cores: (MIDR part, capacity or None, kHz or None) per CPU."""
    write(root, "proc/device-tree/model", model + "\0")
    write(root, "proc/meminfo", f"MemTotal:  {memory_kb} kB\nMemFree: 1 kB\n")
    write(root, "etc/os-release", 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n')
    write(root, "sys/devices/system/cpu/online", f"0-{len(cores) - 1}\n")
    blocks = []
    for number, (part, capacity, khz) in enumerate(cores):
        blocks.append(
            f"processor\t: {number}\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part:#x}\n"
        )
        folder = f"sys/devices/system/cpu/cpu{number}"
        if capacity is not None:
            write(root, f"{folder}/cpu_capacity", f"{capacity}\n")
        if khz is not None:
            write(root, f"{folder}/cpufreq/cpuinfo_max_freq", f"{khz}\n")
    write(root, "proc/cpuinfo", "\n".join(blocks))
    return root


@pytest.fixture
def pi5_tree(tmp_path):
    """A Raspberry Pi 5, 8 GB, with a firmware tool and a thermal zone."""
    root = arm_tree(
        tmp_path,
        model="Raspberry Pi 5 Model B Rev 1.0",
        cores=[(0xD0B, 1024, 2_400_000)] * 4,
        memory_kb=8_259_000,
    )
    write(root, "sys/class/thermal/thermal_zone0/temp", "61750\n")
    write(root, "sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    write(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "ondemand\n")
    write(root, "usr/bin/vcgencmd", "")
    return root


@pytest.fixture
def rk3588_tree(tmp_path):
    """A Rock 5B: four A55, then two pairs of A76 with slightly different clocks."""
    little, big, big2 = (0xD05, 530, 1_800_000), (0xD0B, 1024, 2_400_000), (0xD0B, 1007, 2_352_000)
    return arm_tree(
        tmp_path, model="Radxa ROCK 5B", cores=[little] * 4 + [big] * 2 + [big2] * 2, memory_kb=16_000_000
    )


@pytest.fixture
def orin_tree(tmp_path):
    """A Jetson Orin Nano in 15 W mode."""
    root = arm_tree(
        tmp_path,
        model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        cores=[(0xD42, 1024, 1_510_400)] * 6,
        memory_kb=7_800_000,
    )
    write(root, "var/lib/nvpmodel/status", "pmode:0001 fmode:fanNull")
    write(root, "etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=7W >\n< POWER_MODEL ID=1 NAME=15W >\n")
    write(root, "sys/class/thermal/thermal_zone0/temp", "48000")
    write(root, "sys/class/thermal/thermal_zone0/type", "gpu-thermal")
    write(root, "sys/class/thermal/thermal_zone1/temp", "51500")
    write(root, "sys/class/thermal/thermal_zone1/type", "cpu-thermal")
    write(root, "sys/class/thermal/thermal_zone2/temp", "-256000")  # an absent sensor
    return root


@pytest.fixture
def x86_tree(tmp_path):
    """A small x86 virtual machine: no cpufreq, no capacity, a memory limit set by a container."""
    block = (
        "processor\t: {}\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD  EPYC\ncpu MHz\t\t: 2596.1{}\n"
        "flags\t\t: fpu aes sse4_2 avx avx2 fma f16c avx512f avx512_vnni\n"
    )
    write(tmp_path, "proc/cpuinfo", "\n".join(block.format(n, n) for n in range(2)))
    write(tmp_path, "proc/meminfo", "MemTotal:  24000000 kB\n")
    write(tmp_path, "sys/devices/system/cpu/online", "0-1")
    write(tmp_path, "sys/fs/cgroup/memory.max", "4294967296\n")
    return tmp_path
