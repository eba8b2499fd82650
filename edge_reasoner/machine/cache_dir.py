"""Where this machine keeps what can be made again. No place for it is no error, only slower."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "EDGE_REASONER_CACHE"
_FOLDER = "edge_reasoner"


def default_cache_dir(environment: Mapping[str, str]) -> Path | None:
    """The cache folder, absolute, perhaps not made yet: `EDGE_REASONER_CACHE`, else `edge_reasoner` in
    `XDG_CACHE_HOME`, else the platform's own for this user.

    None where there is no place for it (no HOME and no passwd entry, a folder that cannot be made or read):
    then nothing is cached. Never raises. A folder that can be read but not written is returned: what an
    image brought along is used. Whoever writes into it must take a failure for "not cached".
    """
    found = _chosen(environment)
    return found if found is not None and _usable(found) else None


def _chosen(environment: Mapping[str, str]) -> Path | None:
    try:
        if chosen := environment.get(CACHE_VARIABLE, "").strip():
            return Path(chosen).expanduser().absolute()
        # a relative XDG path is to be ignored, its specification says
        if Path(base := environment.get("XDG_CACHE_HOME", "").strip()).is_absolute():
            return Path(base) / _FOLDER
        if os.name == "posix" and not Path.home().is_absolute():
            return None
        own = platformdirs.user_cache_path(_FOLDER, appauthor=False)
    except (RuntimeError, OSError, ValueError):  # no home folder; a NUL in a path
        return None
    return own if own.is_absolute() else None


def _usable(folder: Path) -> bool:
    """Whether it can be read or made, judged without making it."""
    if "\0" in str(folder):
        return False
    try:
        for place in (folder, *folder.parents):
            if place.exists():
                wanted = os.R_OK | os.X_OK if place == folder else os.W_OK | os.X_OK
                return place.is_dir() and os.access(place, wanted)
    except (OSError, ValueError):
        pass
    return False
