"""One TOML file per board, named as the profile. Read by `edge_reasoner.contract.profile.load`."""
