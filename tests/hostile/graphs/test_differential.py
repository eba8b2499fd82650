"""Whatever our reader of graphs accepts, onnx's own reader and the runtimes see as we do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime
import pytest
from support.graph_mutations import graph_mutations
from support.graph_runtimes import pythons, runtime_agrees
from support.hostile_graphs import Sound
from support.run_graphs import SIZES, feed

from edge_reasoner.contract.bundle.graph_check import check_graph
from edge_reasoner.contract.bundle.onnx_scan import Declared, OnnxModel, scan_graph
from edge_reasoner.contract.bundle.onnx_wiring import check_wiring
from edge_reasoner.errors import BundleError


def value_of(attribute: onnx.AttributeProto) -> object:
    """An attribute's value as onnx reads it."""
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Numbers and symbols of a declared value's shape."""
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def same(ours: OnnxModel, data: bytes) -> None:
    """Files, operators, attributes, types and shapes; and nothing in the bytes but that."""
    model = onnx.load_from_string(data)
    assert model.SerializeToString(deterministic=True) == data
    graph = model.graph
    assert {e.domain: e.version for e in model.opset_import} == ours.opsets
    assert len(graph.node) == len(ours.nodes)
    for node, mine in zip(graph.node, ours.nodes, strict=True):
        assert (node.op_type, node.domain, node.name) == (mine.op_type, mine.domain, mine.name)
        assert (tuple(node.input), tuple(node.output)) == (mine.inputs, mine.outputs)
        theirs = {item.name: value_of(item) for item in node.attribute}
        # through repr: not-a-number is never equal to itself
        assert repr(sorted(theirs.items())) == repr(sorted(mine.attributes.items()))
    for tensor, own in zip(graph.initializer, ours.initializers, strict=True):
        assert (tensor.name, tensor.data_type, tuple(tensor.dims)) == (own.name, own.type, own.shape)
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert bool(place) == (own.external is not None) and tensor.raw_data == own.data
        if own.external is not None:
            assert place == {
                "location": own.external.location,
                "offset": str(own.external.offset),
                "length": str(own.external.size_bytes),
            }
    for theirs_, declared in (
        (graph.input, ours.inputs),
        (graph.output, ours.outputs),
        (graph.value_info, ours.declared),
    ):
        found = [Declared(v.name, v.type.tensor_type.elem_type, shape_of(v)) for v in theirs_]
        assert tuple(found) == declared
    rest = [graph.sparse_initializer, model.functions, model.training_info, model.metadata_props]
    assert not any(rest)


def accepted_of(sound: Mapping[str, Sound], count: int, folder: Path) -> list[str]:
    """Mutations that pass the whole check, written beside their weights: their paths.

    Those that only the reader accepts are compared with onnx's too.
    """
    accepted: list[str] = []
    read = 0
    for base, graph in sound.items():
        at = folder / base
        at.mkdir(parents=True)
        for name in graph.files:
            if not name.endswith(".onnx"):
                shutil.copyfile(graph.path.with_name(name), at / name)
        share = count // len(sound)
        for number, data in enumerate(graph_mutations([graph.data], share, seed=len(base))):
            try:
                model = scan_graph(data, "g.onnx")
            except BundleError as error:
                assert str(error).isprintable()
                continue
            read += 1
            same(model, data)
            try:
                check_graph(data, "g.onnx", graph.spec, graph.files)
            except BundleError as error:
                assert str(error).isprintable()
                continue
            path = at / f"{number}.onnx"
            path.write_bytes(data)
            accepted.append(str(path))
    assert read > len(accepted) > count // 100  # or nothing has been shown
    return accepted


@pytest.mark.parametrize("base", ["packed", "normed", "encoder"])
def test_shapes_are_the_runtimes(sound, base, tmp_path):
    """Type and shape of every value inside a graph, as we work them out, are those of a run."""
    graph = sound[base]
    values = check_wiring(scan_graph(graph.data, "g.onnx"), graph.spec)
    model = onnx.load(graph.path)
    given = {value.name for value in model.graph.output}
    inner = [name for node in model.graph.node for name in node.output if name and name not in given]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(inner, {v.name: feed(v.name, v.type, v.shape) for v in session.get_inputs()})
    assert len(found) > 30
    for name, array in zip(inner, found, strict=True):
        shape = tuple(SIZES.get(dim, dim) for dim in values[name].shape)
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        assert (name, kind, array.shape) == (name, values[name].type, shape)


def test_some_graphs(sound, tmp_path):
    """Three hundred mutations."""
    accepted = accepted_of(sound, 300, tmp_path)
    for python in pythons():
        runtime_agrees(python, accepted)


@pytest.mark.slow
def test_ten_thousand_graphs(sound, tmp_path):
    """Ten thousand mutations."""
    accepted = accepted_of(sound, 10_002, tmp_path)
    for python in pythons():
        runtime_agrees(python, accepted)
