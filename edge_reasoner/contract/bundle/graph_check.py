"""What is checked of a graph before any runtime sees it: its bytes, its wiring, and where its weights lie."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping

from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec
from edge_reasoner.contract.bundle.onnx_scan import Known, OnnxModel, scan_graph
from edge_reasoner.contract.bundle.onnx_values import RuleError
from edge_reasoner.contract.bundle.onnx_wiring import check_wiring
from edge_reasoner.errors import BundleError


def check_graph(
    data: bytes | memoryview,
    graph: str,
    spec: DecoderSpec | EncoderSpec,
    listed: Mapping[str, int],
    known: Known | None = None,
) -> tuple[str, ...]:
    """The files of the graph's weights, sorted, by their paths in the bundle.

    `graph` is the graph's own path, `listed` the size in bytes of each file of its component; `known` as for
    `scan_graph`. Raises BundleError unless the graph is what the exporter writes of `spec` and all of its
    weights lie in listed files.
    """
    model = scan_graph(data, graph, known)
    files = {location: _file(graph, location, listed) for location in model.locations}
    try:
        _check_regions(model, {location: listed[path] for location, path in files.items()})
        check_wiring(model, spec)
    except RuleError as error:
        raise BundleError(f"{graph}: {error}") from error
    return tuple(sorted(set(files.values())))


def _file(graph: str, location: str, listed: Mapping[str, int]) -> str:
    path = posixpath.normpath(posixpath.join(posixpath.dirname(graph), location))
    if posixpath.isabs(location) or {"", ".", ".."} & set(location.split("/")) or path not in listed:
        raise BundleError(
            f"{graph}: refers to external data {location[:200]!r}, which the manifest does not list"
        )
    return path


def _check_regions(model: OnnxModel, sizes_bytes: Mapping[str, int]) -> None:
    """Regions lie inside their file and apart from each other; one may be read under two shapes, not more.

    So weights take at most twice the files' size, whatever the runtime copies. Raises RuleError.
    """
    regions = Counter(tensor.external for tensor in model.initializers if tensor.external is not None)
    ends = dict.fromkeys(sizes_bytes, 0)
    for region in sorted(regions, key=lambda region: (region.location, region.offset)):
        where = f"external data at {region.offset} of {region.location!r}"
        end = region.offset + region.size_bytes
        if end > sizes_bytes[region.location]:
            raise RuleError(f"{where}: {region.size_bytes} bytes, which the file does not have")
        if region.offset < ends[region.location] or regions[region] > 2:
            raise RuleError(f"{where}: overlaps with that of another initializer")
        ends[region.location] = end
