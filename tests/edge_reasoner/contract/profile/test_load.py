"""Device profiles: every built-in loads, files round-trip, malformed ones give one clear line."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_reasoner.contract.profile.load import (
    MAX_PROFILE_BYTES,
    dump_profile_toml,
    list_profiles,
    load_profile,
    parse_profile,
    profile_sha256,
)
from edge_reasoner.contract.profile.schema import DeviceProfile, Figure
from edge_reasoner.errors import ProfileError

HOSTILE = Path(__file__).parents[3] / "hostile" / "profiles"
BOARDS = {
    "raspberry-pi-4b", "raspberry-pi-5", "raspberry-pi-zero-2w", "raspberry-pi-5-ai-hat-plus",
    "raspberry-pi-5-ai-hat-plus-2", "jetson-nano", "jetson-orin-nano-super", "jetson-orin-nx",
    "jetson-agx-orin", "rk3588", "qcs6490-rb3gen2", "imx8mp", "imx93", "coral", "generic-arm64",
    "generic-x86", "jetson-orin",
}  # fmt: skip


def test_every_board_is_there():
    """The boards of the issue, and the contract's jetson-orin, are built in."""
    assert set(list_profiles()) >= BOARDS


@pytest.mark.parametrize("name", list_profiles())
def test_builtin_profile_loads(name):
    """Each built-in profile parses, carries its file's name, and round-trips through TOML."""
    profile = load_profile(name)
    assert profile.name == name
    assert parse_profile(dump_profile_toml(profile).encode(), "dump") == profile
    assert profile.max_opset <= 21
    assert profile.default_threads >= 1
    assert 0 < profile.memory_budget_bytes < profile.memory.capacity_gib.value * 2**30
    assert "int4" in profile.weights_for("causal-lm")


@pytest.mark.parametrize("name", [n for n in list_profiles() if n.startswith("jetson-")])
def test_jetsons_stay_within_python_310(name):
    """A jetson-* plan never asks for more than onnxruntime 1.23.2 and opset 21."""
    profile = load_profile(name)
    assert (profile.runtime("onnxruntime").newest_version, profile.max_opset) == ("1.23.2", 21)


@pytest.mark.parametrize("name", list_profiles())
def test_accelerators_without_decoders_say_why(name):
    """A board whose accelerator cannot generate says so, with the reason and what works instead."""
    profile = load_profile(name)
    for accelerator in profile.accelerators:
        if not accelerator.runs_decoder_lm:
            assert not profile.weights_for("causal-lm", accelerator.name)
            assert any(limit.about("causal-lm", accelerator.name) for limit in profile.cannot)


def test_a_library_that_nobody_knows_is_a_row_like_any_other():
    """A board may have libraries that no list names; what is no name at all is refused."""
    tree = msgspec.to_builtins(load_profile("coral"))
    tree["runtimes"] += ({**tree["runtimes"][-1], "backend": "next-years-library"},)
    text = dump_profile_toml(msgspec.convert(tree, DeviceProfile)).encode()
    assert parse_profile(text, "p").runtime("next-years-library") is not None
    with pytest.raises(ProfileError, match=r"runtimes\[\d\]\.backend"):
        parse_profile(text.replace(b"next-years-library", b"../lib"), "p")


@pytest.mark.parametrize(
    ("board", "change", "words"),
    [
        ("coral", {"precisions": [("causal-lm", "edge-tpu", "int8")]}, "whose runs_decoder_lm is false"),
        ("coral", {"precisions": [("module", "edge-tpu", "fp16")]}, r"weights: 'fp16'; allowed: int8"),
        ("coral", {"cannot": {"features": ["asimd"]}}, "features: 'asimd' is in a cluster's isa"),
        ("coral", {"cannot": {"processor": "gpu"}}, r"processor: 'gpu'; allowed: cpu, edge-tpu"),
        (
            "coral",
            {"cannot": {"backend": "edgetpuu"}},
            r"backend: 'edgetpuu'; allowed: edgetpu, litert",
        ),
        ("coral", {"cannot": {"task": "encoder", "processor": "cpu"}}, r"which \[\[precisions\]\] allows"),
    ],
)
def test_profiles_do_not_contradict_themselves(board, change, words):
    """What a row rules out, no other row of the profile may claim."""
    tree = msgspec.to_builtins(load_profile(board))
    for task, processor, weights in change.get("precisions", ()):
        tree["precisions"] += ({"task": task, "processor": processor, "weights": [weights]},)
    if "cannot" in change:
        tree["cannot"] += ({"what": "do it", "why": "so", "instead": "this", **change["cannot"]},)
    with pytest.raises(ProfileError, match=words):
        msgspec.convert(tree, DeviceProfile, strict=False).check("test")


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("*.toml")), ids=lambda p: p.stem)
def test_hostile_profile_gives_one_line(path):
    """Every malformed file yields one ProfileError of one line that names the file."""
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message and len(message) < 700
    assert caught.value.exit_status == 2


def test_oversized_and_missing_files(tmp_path):
    """A file over the bound, a directory and a missing file are refused in one line."""
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * (MAX_PROFILE_BYTES + 1))
    for path, words in (
        (big, "bytes"),
        (tmp_path, "cannot be read"),
        (tmp_path / "no.toml", "cannot be read"),
    ):
        with pytest.raises(ProfileError, match=words):
            load_profile(path)


@pytest.mark.parametrize(
    ("asked", "named"),
    [("jetson-orim", "jetson-orin"), ("raspberrypi5", "raspberry-pi-5"), ("RK3588", "rk3588")],
)
def test_unknown_profile_names_the_nearest(asked, named):
    """An unknown name is answered with the nearest built-in names."""
    with pytest.raises(ProfileError, match=named):
        load_profile(asked)


def test_unknown_profile_without_neighbours_lists_all():
    """A name near nothing is answered with the whole list."""
    with pytest.raises(ProfileError, match="allowed: coral, generic-arm64"):
        load_profile("zzzzzzzz")


def test_errors_name_allowed_values():
    """A closed field's error lists what is allowed."""
    with pytest.raises(ProfileError, match="allowed: measured, datasheet, estimated"):
        load_profile(HOSTILE / "unknown_basis.toml")
    with pytest.raises(ProfileError, match=r"allowed: .*asimddp"):
        load_profile(HOSTILE / "unknown_feature.toml")


def test_sha256_ignores_layout_only():
    """Comments do not change a profile's hash, a figure does."""
    profile = load_profile("raspberry-pi-5")
    commented = "# a comment\n" + dump_profile_toml(profile)
    assert profile_sha256(parse_profile(commented.encode(), "x")) == profile_sha256(profile)
    power = msgspec.structs.replace(profile.power, idle_w=Figure(value=3, basis="measured", source="meter"))
    assert profile_sha256(msgspec.structs.replace(profile, power=power)) != profile_sha256(profile)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
figures = st.builds(
    Figure,
    value=st.floats(0.001, 1e9),
    basis=st.sampled_from(["measured", "datasheet", "estimated"]),
    source=texts,
)


@settings(max_examples=150, deadline=None)
@given(title=texts, summary=texts, idle=figures, capacity=figures, big=st.booleans())
def test_round_trip_of_any_text_and_figure(title, summary, idle, capacity, big):
    """Whatever text and figures a profile holds, dump and parse give it back."""
    base = load_profile("rk3588")
    profile: DeviceProfile = msgspec.structs.replace(
        base,
        title=title,
        summary=summary,
        power=msgspec.structs.replace(base.power, idle_w=idle),
        memory=msgspec.structs.replace(base.memory, capacity_gib=capacity),
        clusters=tuple(msgspec.structs.replace(c, big=big) for c in base.clusters),
    )
    assert parse_profile(dump_profile_toml(profile).encode(), "dump") == profile


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_only_raise_profile_error(data):
    """Bytes that are no profile raise ProfileError and nothing else."""
    with pytest.raises(ProfileError):
        parse_profile(data, "random")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_profile_never_crashes(data):
    """A good profile with bytes replaced either parses or raises ProfileError."""
    good = bytearray(dump_profile_toml(load_profile("generic-x86")).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_profile(bytes(good), "mutated")
    except ProfileError as error:
        assert "\n" not in str(error)


def test_documented_minimal_profile_parses():
    """The example in docs/profiles.md is a valid profile."""
    page = (Path(__file__).parents[4] / "docs" / "profiles.md").read_text(encoding="utf-8")
    example = page.split("```toml\n")[1].split("```")[0]
    assert parse_profile(example.encode(), "docs/profiles.md").name == "my-board"
