"""The stages of an export; their order stands in `pipeline`."""
