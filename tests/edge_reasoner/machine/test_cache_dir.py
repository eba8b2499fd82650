"""Where the cache is, and that no place for it is no error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_reasoner.machine.cache_dir import default_cache_dir

_ASK = """import os
from edge_reasoner.machine.cache_dir import default_cache_dir
print(default_cache_dir(os.environ))
"""


def test_the_variable_wins_then_xdg(tmp_path: Path):
    """EDGE_REASONER_CACHE names the folder itself, XDG_CACHE_HOME the one around it; neither is made."""
    own, xdg = tmp_path / "own", tmp_path / "xdg"
    both = {"EDGE_REASONER_CACHE": str(own), "XDG_CACHE_HOME": str(xdg)}
    assert default_cache_dir(both) == own
    assert default_cache_dir({"XDG_CACHE_HOME": str(xdg)}) == xdg / "edge_reasoner"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["EDGE_REASONER_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/cache", "/proc/self/cache", "/x\0y"])
def test_no_place_is_none(name: str, place: str):
    """A file in the way, a folder of the kernel, a name that cannot be: uncached, never an error."""
    assert default_cache_dir({name: place}) is None


def test_a_relative_xdg_path_is_ignored():
    """As the XDG specification asks: what counts is the platform's folder."""
    found = default_cache_dir({"XDG_CACHE_HOME": "cache"})
    assert found is None or (found.is_absolute() and found != Path("cache").absolute() / "edge_reasoner")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_used_for_reading(tmp_path: Path):
    """What an image brought along is found although nothing can be added; a new one cannot be made."""
    tmp_path.chmod(0o555)
    assert default_cache_dir({"EDGE_REASONER_CACHE": str(tmp_path)}) == tmp_path
    assert default_cache_dir({"EDGE_REASONER_CACHE": str(tmp_path / "new")}) is None


def test_neither_home_nor_passwd_entry():
    """An unknown user without HOME (a container's arbitrary uid) is uncached; with HOME he is cached."""
    user = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    try:
        able = subprocess.run([*user, "true"], capture_output=True, timeout=30, check=False).returncode == 0
    except OSError:
        able = False
    if not able:
        pytest.skip("user namespaces are not available here")
    drop = ("HOME", "EDGE_REASONER_CACHE", "XDG_CACHE_HOME")
    bare = {key: value for key, value in os.environ.items() if key not in drop}

    def ask(environment: dict[str, str]) -> str:
        command = [*user, sys.executable, "-c", _ASK]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    assert ask(bare) == "None"
    assert ask({**bare, "HOME": "relative"}) == "None"
