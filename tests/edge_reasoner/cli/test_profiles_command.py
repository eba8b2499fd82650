"""`profiles list | show | validate | probe` as a user types them."""

import json
from pathlib import Path

from click.testing import CliRunner

from edge_reasoner.cli.profiles import profiles
from edge_reasoner.contract.profile.load import list_profiles, load_profile, profile_sha256
from edge_reasoner.errors import InputError, ProfileError

HOSTILE = Path(__file__).parents[2] / "hostile" / "profiles"


def run(*arguments):
    """Runs the group; standard output and standard error apart."""
    return CliRunner().invoke(profiles, list(arguments))


def test_list():
    """Every name appears whole in the table, and in the JSON object."""
    table = run("list")
    assert table.exit_code == 0 and all(name in table.stdout for name in list_profiles())
    document = json.loads(run("list", "--json").stdout)
    assert [p["name"] for p in document["profiles"]] == list(list_profiles())


def test_show():
    """A profile is shown with its figures' provenance and limits; as JSON it carries its hash."""
    text = run("show", "rk3588").stdout
    assert "datasheet" in text and "RKNPU" in text
    for word in ("causal-lm", "rknpu2", "npu", "int8"):
        assert word in text
    assert "two CPU cores" in run("show", "jetson-nano").stdout
    document = json.loads(run("show", "rk3588", "--json").stdout)
    assert document["sha256"] == profile_sha256(load_profile("rk3588"))
    assert document["derived"]["max_opset"] == 21


def test_show_unknown():
    """An unknown name raises the error that the command line prints as one line with status 2."""
    result = run("show", "jetson-orim")
    assert isinstance(result.exception, ProfileError) and "jetson-orin" in str(result.exception)


def test_validate():
    """A good file is valid; a bad one is one ProfileError."""
    good = Path(__file__).parents[3] / "device_profiles" / "raspberry-pi-5.toml"
    assert json.loads(run("validate", str(good), "--json").stdout)["valid"] is True
    assert isinstance(run("validate", str(HOSTILE / "nan.toml")).exception, ProfileError)


def test_probe_writes_a_profile(tmp_path):
    """probe measures this machine, writes a valid profile named after its file, and leaves nothing else."""
    out = tmp_path / "my-board.toml"
    result = run("probe", "--out", str(out), "--json")
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    profile = load_profile(out)
    assert profile.name == "my-board" and document["sha256"] == profile_sha256(profile)
    assert "temperature_c" in document["state"]
    assert [p.name for p in tmp_path.iterdir()] == ["my-board.toml"]


def test_probe_checks_before_it_measures(tmp_path):
    """A bad name or an unwritable folder is refused in one line."""
    assert isinstance(run("probe", "--name", "No Name").exception, InputError)
