"""Runs an exported reasoning model on an edge device and escalates to the cloud when a gate says so.

    from edge_reasoner import Reasoner
    reasoner = Reasoner.open("bundle/", cloud="http://127.0.0.1:9000/v1")
    answer = reasoner.ask("How far is it from A to B if …?")

Importing this package loads nothing else: each name below is looked up when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edge_reasoner._version import __version__

if TYPE_CHECKING:
    from edge_reasoner import errors
    from edge_reasoner.client import InferenceClient
    from edge_reasoner.gate.policy import Policy
    from edge_reasoner.query.answer import Answer
    from edge_reasoner.reasoner import Reasoner

_HOMES = {
    "Answer": "edge_reasoner.query.answer",
    "InferenceClient": "edge_reasoner.client",
    "Policy": "edge_reasoner.gate.policy",
    "Reasoner": "edge_reasoner.reasoner",
}

__all__ = ["__version__", "Reasoner", "Answer", "Policy", "InferenceClient", "errors"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("edge_reasoner.errors")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
