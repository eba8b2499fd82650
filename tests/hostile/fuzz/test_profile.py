"""A fuzzer of device profiles, which come from strangers as TOML files."""

from __future__ import annotations

import importlib.resources

import pytest
from hostile.fuzz.mutate import FEW, MANY, check

from edge_reasoner.contract.profile.load import BUILTIN_PACKAGE, dump_profile_toml, parse_profile

#: the plainest board, one with little cores, one with accelerators and limits
BOARDS = ("generic-x86", "rk3588", "jetson-orin", "raspberry-pi-5-ai-hat-plus")
WORDS = (
    *(b"inf", b"-inf", b"nan", b"1979-05-27T07:32:00Z", b"07:32:00", b"0x7fffffffffffffff", b"9" * 5000),
    *(
        b"[[clusters]]",
        b"[memory]",
        b"= [",
        b"= {",
        b"a.b.c.d = 1",
        b'"""',
        b"'''",
        b'"measured"',
        b"onnxruntime",
    ),
    *(b"a" + b".a" * 3000 + b"=1\n", b"[" + b"a." * 3000 + b"a]\n", b"x=" + b"[" * 3000, b"1e400", b"-0.0"),
)


def fuzz_profile(data: bytes) -> None:
    """Reads a profile as `--profile FILE` does, works with it, and writes it as `profiles probe` does."""
    profile = parse_profile(data, "fuzzed.toml")
    assert profile.memory_budget_bytes > 0 and profile.clusters
    profile.isa  # noqa: B018 - computed
    assert parse_profile(dump_profile_toml(profile).encode(), "written.toml") == profile


def seeds() -> list[bytes]:
    """Built-in profiles as their files, comments and all."""
    folder = importlib.resources.files(BUILTIN_PACKAGE)
    return [folder.joinpath(f"{name}.toml").read_bytes() for name in BOARDS]


def test_profile() -> None:
    """A few hundred mutations of built-in profiles."""
    check(fuzz_profile, seeds(), FEW, words=WORDS)


@pytest.mark.slow
def test_profile_many() -> None:
    """20,000 mutations, others than the few."""
    check(fuzz_profile, seeds(), MANY, seed=1, words=WORDS)
