"""Inference backends behind the protocols of `backends.base`: one file or package and one row of the table.

Importing this package loads no native library; asking the table for a backend does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_reasoner.backends.base import Backend
from edge_reasoner.errors import BackendError, BundleError, one_line


def _onnxruntime() -> Backend:
    from edge_reasoner.backends.onnxruntime import load

    return load()


#: name in the manifest -> how to load it
BACKENDS: Mapping[str, Callable[[], Backend]] = {"onnxruntime": _onnxruntime}


def load_backend(name: str) -> Backend:
    """Loads the backend's native library. Raises BundleError for a name that the table lacks, BackendError
    where the library cannot be imported."""
    if name not in BACKENDS:
        raise BundleError(f"backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    try:
        return BACKENDS[name]()
    except ImportError as error:
        raise BackendError(f"{name} cannot be imported: {one_line(error)}") from error
