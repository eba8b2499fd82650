"""Weights on disk: external data, block matrices."""
