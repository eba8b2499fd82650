"""Device profiles: the boards' vocabulary (`schema`), files (`load`), cost model (`cost`) and probes."""

from edge_reasoner.contract.profile.load import (
    dump_profile_toml,
    list_profiles,
    load_profile,
    parse_profile,
    profile_sha256,
)
from edge_reasoner.contract.profile.schema import DeviceProfile, Figure

__all__ = [
    "DeviceProfile",
    "Figure",
    "dump_profile_toml",
    "list_profiles",
    "load_profile",
    "parse_profile",
    "profile_sha256",
]
