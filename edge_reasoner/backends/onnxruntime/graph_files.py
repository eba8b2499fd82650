"""The files behind an open session: have they changed, and what tells two models apart?"""

from __future__ import annotations

import hashlib
from pathlib import Path

from edge_reasoner.backends.base import Graph
from edge_reasoner.contract.bundle.onnx_scan import scan_graph
from edge_reasoner.errors import BackendError, BundleError

#: Of each weight file, so many blocks of this size tell two models with the same graph apart.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class GraphFiles:
    """A graph and its weights. The runtime maps what it has not repacked: a file that is cut while it is open
    would end the process at the next read, and one that is written to would change the answers."""

    def __init__(self, graph: Graph) -> None:
        self.where = graph.name if isinstance(graph, Path) else graph.path.name
        self._path = graph if isinstance(graph, Path) else None
        self._weights = () if isinstance(graph, Path) else graph.weights
        self._digest = None if isinstance(graph, Path) else hashlib.sha256(graph.data)

    def check(self) -> None:
        """Raises BackendError if a file of weights was written to or cut since it was checked."""
        try:
            for file in self._weights:
                file.check()
        except BundleError as error:
            raise BackendError(str(error)) from error

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the graph and samples of its weights: keeps two models' caches apart."""
        if self._digest is None:
            return self._fingerprint_by_path()
        digest = self._digest.copy()
        for file in self._weights:
            digest.update(f"{Path(file.name).name}:{file.size_bytes}\n".encode())
            for number in range(_SAMPLES):
                digest.update(file.read_at(file.size_bytes * number // _SAMPLES, _SAMPLE_BYTES))
        return digest.hexdigest()

    def _fingerprint_by_path(self) -> str:
        assert self._path is not None, "a graph is held or has a path"
        try:
            graph = self._path.read_bytes()
            digest = hashlib.sha256(graph)
            for location in scan_graph(memoryview(graph), self.where).locations:
                path = self._path.parent / location
                size_bytes = path.stat().st_size
                digest.update(f"{location}:{size_bytes}\n".encode())
                with path.open("rb") as file:
                    for number in range(_SAMPLES):
                        file.seek(size_bytes * number // _SAMPLES)
                        digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise BackendError(f"{self.where}: cannot be read any more: {error.strerror}") from error
        return digest.hexdigest()
