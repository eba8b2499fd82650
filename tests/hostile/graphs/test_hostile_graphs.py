"""Graphs that crash, hang or deceive a runtime are refused before any runtime sees them, in one line each."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import tiny_graphs as tiny
from support.hostile_graphs import (
    MS,
    added,
    attribute,
    constant_input,
    edited,
    external,
    field,
    in_graph,
    in_tensor,
    node,
    read,
    reshaped,
    rewired,
    tensor,
    varint,
)
from support.tiny_bundle import TOKENS, decoder_golden, relist, write_bundle

from edge_reasoner.contract.bundle.graph_check import check_graph
from edge_reasoner.contract.bundle.onnx_scan import scan_graph
from edge_reasoner.errors import BundleError

GQA, MHA, NBITS, ROWS = "GroupQueryAttention", "MultiHeadAttention", "MatMulNBits", "GatherBlockQuantized"
SKIP = "SkipSimplifiedLayerNormalization"
EVIL_LOCATION = field(1, b"location") + field(2, b"../../../../etc/passwd")


def inner_graph() -> onnx.GraphProto:
    """A body for a loop or a branch."""
    return helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])],
        "body",
        [],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, [])],
    )


def chain(count: int) -> list[onnx.NodeProto]:
    """So many nodes, each of the one before."""
    return [helper.make_node("Tanh", [f"c{i}" if i else "norm:0"], [f"c{i + 1}"]) for i in range(count)]


def window_operand(model: onnx.ModelProto) -> None:
    """Counts to 2^62 instead of to the number of tokens."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2**62), "far"))
    node(model, "Range").input[1] = "far"


def sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))


def function(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Identity", ["a"], ["b"])]
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("evil", "Add", ["a"], ["b"], body, opsets))


def renamed(model: onnx.ModelProto) -> None:
    node(model, GQA).name = "\x1b]0;owned\x07"


def same_region(model: onnx.ModelProto) -> None:
    """One region under three names: memory that the files do not account for."""
    original = read(model, NBITS, 0, 1)
    for number in range(2):
        model.graph.initializer.add().CopyFrom(original)
        model.graph.initializer[-1].name = f"again{number}"


def shifted(model: onnx.ModelProto) -> None:
    """A region that begins inside another."""
    original = read(model, NBITS, 0, 1)
    entry = next(entry for entry in original.external_data if entry.key == "offset")
    entry.value = str(int(entry.value) + 1)


def cast_twice(model: onnx.ModelProto) -> None:
    weight = node(model, "Cast").input[0]
    model.graph.node.append(helper.make_node("Cast", [weight], ["second"], to=TensorProto.FLOAT))


def one_for_two(model: onnx.ModelProto) -> None:
    node(model, NBITS, 2).input[1:4] = node(model, NBITS, 3).input[1:4]


def cut_table(model: onnx.ModelProto) -> None:
    """Copies of a table that its file does not account for."""
    table = node(model, "Cast").output[0]
    for name, number in (("from", 0), ("to", 8), ("axis", -1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), f"cut_{name}"))
    names = [table, "cut_from", "cut_to", "cut_axis"]
    model.graph.node.append(helper.make_node("Slice", names, ["cut"]))


def swapped_caches(model: onnx.ModelProto) -> None:
    first, second = node(model, GQA, 0), node(model, GQA, 1)
    first.input[3], second.input[3] = second.input[3], first.input[3]
    first.input[4], second.input[4] = second.input[4], first.input[4]


def shared_cache(model: onnx.ModelProto) -> None:
    node(model, GQA, 1).input[3:5] = node(model, GQA, 0).input[3:5]


def input_and_initializer(model: onnx.ModelProto) -> None:
    name = read(model, NBITS, 0, 1).name
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.UINT8, [1]))


def few_positions(model: onnx.ModelProto) -> None:
    """Fewer rows than the encoder has tokens of context."""
    table = tensor(model, "embed.position.weight")
    table.dims[0] = 2
    entry = next(entry for entry in table.external_data if entry.key == "length")
    entry.value = str(int(np.prod(table.dims)) * (2 if table.data_type == TensorProto.FLOAT16 else 4))
    for value in model.graph.value_info:
        if value.name == table.name:
            value.type.tensor_type.shape.dim[0].dim_value = 2


def half_cache(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if ".key" in value.name or ".value" in value.name:
            value.type.tensor_type.shape.dim[2].dim_value = 8


#: name -> (graph it starts from, attack, what the refusal says)
ATTACKS = {
    # two readers that may disagree
    "tag beyond 32 bits": (
        "packed",
        in_tensor(13, lambda p: field(13, p) + field(13, EVIL_LOCATION, key=varint(1 << 35 | 13 << 3 | 2))),
        "field number",
    ),
    "tag longer than need be": (
        "packed",
        in_tensor(13, lambda p: field(13, p, key=varint(13 << 3 | 2, 5))),
        "longer than need be",
    ),
    "length longer than need be": (
        "packed",
        in_tensor(13, lambda p: field(13, p, length=varint(len(p), 4))),
        "longer than need be",
    ),
    "number longer than need be": (
        "packed",
        in_tensor(2, lambda p: p[:1] + varint(p[1], 3)),
        "longer than need be",
    ),
    "location twice": (
        "packed",
        in_tensor(13, lambda p: field(13, p) + field(13, EVIL_LOCATION)),
        "must be location, offset and length",
    ),
    "value twice": (
        "packed",
        in_tensor(13, lambda p: field(13, p + field(2, b"../../etc/passwd"))),
        "twice",
    ),
    "fields out of order": ("packed", in_tensor(1, lambda p: field(8, b"name") + p), "canonical order"),
    "a graph merged from two": (
        "packed",
        lambda data: data + field(7, field(5, field(13, EVIL_LOCATION))),
        "canonical order",
    ),
    "packed dimensions": ("packed", in_tensor(1, lambda p: field(1, p[1:])), "field 1 (wire type 2)"),
    "a group": ("packed", in_tensor(2, lambda p: b"\x0b\x0c" + p), "wire type 3"),
    "field number 0": ("packed", in_tensor(2, lambda p: b"\x02\x00" + p), "field number 0"),
    "unknown field": ("packed", in_tensor(14, lambda p: p + field(200, b"x")), "field 200"),
    "wrong wire type": ("packed", lambda data: b"\x09" + bytes(8) + data[2:], "field 1 (wire type 1)"),
    "bytes after the end": ("packed", lambda data: data + b"\x00", "field number 0"),
    "cut": ("packed", lambda data: data[:-1], "truncated"),
    "a name of the terminal's": ("packed", edited(renamed), "a name of"),
    "a name beside ASCII": (
        "packed",
        in_graph(2, lambda p: field(2, "bücher".encode())),
        "not plain ASCII",
    ),
    # what files it opens
    "a file outside": ("packed", external("location", "../../../../etc/passwd"), "does not list"),
    "a file by its full path": ("packed", external("location", "/etc/passwd"), "does not list"),
    "memory of the process": ("packed", external("location", "*/_ORT_MEM_ADDR_/*"), "does not list"),
    "this folder": ("packed", external("location", "."), "does not list"),
    "another base": ("packed", external("basepath", "/etc"), "must be location, offset and length"),
    "a checksum": ("packed", external("checksum", "0" * 40), "must be location, offset and length"),
    "offset below 0": ("packed", external("offset", "-1"), "plain decimal"),
    "offset in another spelling": ("packed", external("offset", " 0"), "plain decimal"),
    "offset in hexadecimal": ("packed", external("offset", "0x10"), "plain decimal"),
    "offset of 64 bits": ("packed", external("offset", str(2**64)), "plain decimal"),
    "offset behind the end": ("packed", external("offset", str(2**40)), "does not have"),
    "length of nothing": ("packed", external("length", "0"), "ask for"),
    "a shape that overflows": ("packed", reshaped(NBITS, 1, [2**33, 2**33, 16], fit=False), "ask for"),
    "a shape below 0": ("packed", reshaped(NBITS, 1, [-1, 1, 16], fit=False), "shape is not allowed"),
    "one region three times": ("packed", edited(same_region), "overlaps"),
    "regions that overlap": ("packed", edited(shifted), "overlaps"),
    "a weight converted twice": ("normed", edited(cast_twice), "converted twice"),
    "an initializer that is an input": ("packed", edited(input_and_initializer), "unexpected"),
    # parts that no exported graph has
    "a function": ("packed", edited(function), "field 25"),
    "training": ("packed", edited(lambda m: m.training_info.add()), "field 20"),
    "sparse weights": ("packed", edited(sparse), "field 15"),
    "metadata": ("packed", edited(lambda m: m.metadata_props.add(key="a", value="b")), "field 14"),
    "a document": ("packed", edited(lambda m: setattr(m.graph, "doc_string", "x")), "field 10"),
    "another domain": (
        "packed",
        edited(lambda m: m.opset_import.add(domain="ai.onnx.ml", version=3)),
        "not allowed",
    ),
    "an unknown version": ("packed", edited(lambda m: setattr(m.opset_import[0], "version", 99)), "99"),
    "weights as text": (
        "packed",
        edited(lambda m: m.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], ["x"]))),
        "initializer: field 6",
    ),
    # work without end, memory without bound
    "a loop of 2^62 rounds": (
        "packed",
        added(helper.make_node("Loop", ["n", "c"], ["d"], body=inner_graph())),
        "attribute: field 6",
    ),
    "a branch": (
        "packed",
        added(helper.make_node("If", ["c"], ["d"], then_branch=inner_graph(), else_branch=inner_graph())),
        "attribute: field 6",
    ),
    "a scan": (
        "packed",
        added(helper.make_node("Scan", ["c"], ["d"], body=inner_graph(), num_scan_inputs=1)),
        "attribute: field 6",
    ),
    "a tensor of 3 GB": (
        "packed",
        added(helper.make_node("ConstantOfShape", ["shape"], ["large"])),
        "'ConstantOfShape' is not allowed",
    ),
    "a tensor that an attribute holds": (
        "packed",
        added(helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 1, [1], [1.0]))),
        "attribute: field 5",
    ),
    "counting to 2^62": ("packed", edited(window_operand), "must be a number of tokens"),
    "expanding": ("packed", added(helper.make_node("Expand", ["a", "b"], ["c"])), "'Expand'"),
    "tiling": ("packed", added(helper.make_node("Tile", ["a", "b"], ["c"])), "'Tile'"),
    "20,000 nodes": ("packed", added(*chain(20_000)), "too many"),
    "a file of its own": (
        "packed",
        added(helper.make_node("EPContext", [], ["y"], domain=MS)),
        "'EPContext' is not allowed",
    ),
    "an operator of another domain": (
        "packed",
        added(helper.make_node("Add", ["a", "b"], ["c"], domain="evil")),
        "'Add' is not allowed",
    ),
    # GroupQueryAttention
    "lengths are a constant": (
        "packed",
        constant_input(GQA, 5, np.array([1 << 20], np.int32)),
        "not allowed",  # no int32 may be stored
    ),
    "lengths are a constant of int64": (
        "packed",
        constant_input(GQA, 5, np.array([1 << 20])),
        "graph's input seqlens_k",
    ),
    "lengths and total exchanged": ("packed", rewired(GQA, 5, "total_sequence_length"), "seqlens_k"),
    "lengths are computed": (
        "packed",
        added(helper.make_node("Neg", ["seqlens_k"], ["negative"]), first=True),
        "must be logits_to_keep or states_to_keep",
    ),
    "total is a constant": ("packed", constant_input(GQA, 6, np.array(1 << 20)), "total_sequence_length"),
    "total is missing": ("packed", rewired(GQA, 6, ""), "input 6 is missing"),
    "the cache is a constant": (
        "packed",
        constant_input(GQA, 3, np.zeros((1, 2, 1, 32), np.float32)),
        "past key and value",
    ),
    "the caches of two layers": ("packed", edited(swapped_caches), "one to each layer's cache"),
    "one cache for two layers": ("packed", edited(shared_cache), "one to each layer's cache"),
    "key and value exchanged": ("packed", rewired(GQA, 3, "past_key_values.0.value"), "past key and value"),
    "a cache that is too short": ("packed", edited(half_cache), "holds 8 tokens"),
    "a key beside a packed query": ("packed", rewired(GQA, 1, "layers.0.qkv:out"), "both"),
    "more heads": ("packed", attribute(GQA, "num_heads", 64), "the query's width"),
    "more heads in the cache": ("packed", attribute(GQA, "kv_num_heads", 64), "is not of 64 heads"),
    "no heads": ("packed", attribute(GQA, "kv_num_heads", 0), "kv_num_heads"),
    "heads below 0": ("packed", attribute(GQA, "num_heads", -4), "num_heads"),
    "no rotation": ("packed", attribute(GQA, "do_rotary", 0), "do_rotary"),
    "a window of its own": ("packed", attribute(GQA, "local_window_size", -7), "local_window_size"),
    "a smooth softmax": ("packed", attribute(GQA, "smooth_softmax", 1), "smooth_softmax"),
    "a quantized cache": ("packed", attribute(GQA, "k_quant_type", "PER_CHANNEL"), "k_quant_type"),
    "a scale that is no number": ("packed", attribute(GQA, "scale", float("nan")), "scale"),
    "a scale of another type": ("packed", attribute(GQA, "scale", 1), "scale"),
    "a short rotary table": ("packed", reshaped(GQA, 7, [3, 16]), "shape"),
    "two short rotary tables": (
        "packed",
        lambda data: reshaped(GQA, 8, [3, 8])(reshaped(GQA, 7, [3, 8])(data)),
        "a table of 3 rows",
    ),
    "a narrow rotary table": ("packed", reshaped(GQA, 8, [64, 1]), "shape"),
    "positions of its own": ("packed", rewired(GQA, 9, "input_ids"), "positions and sinks"),
    "a bias of another shape": ("packed", rewired(GQA, 10, "layers.0.qkv:out"), "bias"),
    "a sink": ("packed", rewired(GQA, 11, "layers.0.qkv:out"), "inputs"),
    # MatMulNBits, GatherBlockQuantized
    "K beyond the weights": ("packed", attribute(NBITS, "K", 1 << 20), "K is not the input's width"),
    "N beyond the weights": ("packed", attribute(NBITS, "N", 1 << 20), "shape"),
    "N below 0": ("packed", attribute(NBITS, "N", -1), "N with the value"),
    "3 bits": ("packed", attribute(NBITS, "bits", 3), "bits"),
    "blocks of 0": ("packed", attribute(NBITS, "block_size", 0), "block_size"),
    "blocks of another size": ("packed", attribute(NBITS, "block_size", 256), "shape"),
    "an accuracy level": ("packed", attribute(NBITS, "accuracy_level", 9), "accuracy_level"),
    "short weights": ("packed", reshaped(NBITS, 1, [1, 2, 16]), "shape"),
    "short scales": ("packed", reshaped(NBITS, 2, [1, 2]), "shape"),
    "short zero points": ("packed", reshaped(NBITS, 3, [1, 1]), "shape"),
    "an order of groups": ("packed", rewired(NBITS, 4, "input_ids"), "5 inputs"),
    "weights that are computed": (
        "packed",
        rewired(NBITS, 1, "layers.0.qkv:out", number=1),
        "must be an initializer",
    ),
    "rows by a constant": ("packed", constant_input(ROWS, 1, np.array([[1 << 40]])), "must be input_ids"),
    "a table with short scales": ("packed", reshaped(ROWS, 2, [1, 2]), "shape"),
    "a table with short zero points": ("packed", reshaped(ROWS, 3, [1, 1]), "shape"),
    "rows in quarter blocks": ("packed", attribute(ROWS, "block_size", 128), "whole blocks"),
    "another axis": ("packed", attribute(ROWS, "quantize_axis", 0), "quantize_axis"),
    # norms, and what is standard
    "a short norm": ("packed", reshaped(SKIP, 2, [1]), "shape"),
    "a skip of another shape": ("packed", rewired(SKIP, 1, "layers.0.qkv:out"), "differ"),
    "an epsilon below 0": ("packed", attribute(SKIP, "epsilon", -1.0), "epsilon"),
    "a norm over another axis": ("normed", attribute("SimplifiedLayerNormalization", "axis", 0), "axis"),
    "a tied embedding of few rows": ("normed", reshaped("Cast", 0, [2, 64]), "'logits'"),
    "a float table by a constant": ("normed", constant_input("Gather", 1, np.array([[1 << 40]])), "rank 0"),
    "parts of another size": (
        "normed",
        constant_input("Split", 1, np.array([1 << 20, 32, 32])),
        "are not a width",
    ),
    "parts of 0": ("normed", constant_input("Split", 1, np.array([128, 0, 0])), "positive"),
    "a shape below 0 to reshape to": (
        "normed",
        constant_input("Reshape", 1, np.array([0, 0, -1])),
        "positive",
    ),
    "more elements than there are": (
        "normed",
        constant_input("Reshape", 1, np.array([0, 0, 1 << 20, 32])),
        "another number of elements",
    ),
    "a cut from the far end": (
        "packed",
        constant_input("Slice", 1, np.array([-(2**62)])),
        "not the last rows",
    ),
    "a value of two names": (
        "packed",
        added(helper.make_node("Tanh", ["norm:0"], ["norm:0"])),
        "two values are called",
    ),
    "a value of nowhere": ("packed", rewired("Mul", 0, "nowhere"), "made nowhere"),
    "a circle": ("packed", rewired("Mul", 0, "head:out"), "made nowhere"),
    "an output missing": ("packed", edited(lambda m: m.graph.output.pop()), "is missing"),
    "an output more": (
        "packed",
        edited(lambda m: m.graph.output.append(helper.make_tensor_value_info("norm:0", 1, ["batch"]))),
        "unexpected",
    ),
    "an input of another type": (
        "packed",
        edited(
            lambda m: m.graph.input[0].CopyFrom(helper.make_tensor_value_info("input_ids", 6, ["a", "b"]))
        ),
        "asks for",
    ),
    "an output without a name": (
        "packed",
        edited(lambda m: node(m, "Mul").output.__setitem__(0, "")),
        "has no name",
    ),
    "one matrix for two products": ("packed", edited(one_for_two), "multiplied with twice"),
    "a stored table cut again and again": ("normed", edited(cut_table), "looked up"),
    "a thousand inputs": (
        "packed",
        edited(lambda m: node(m, "Mul").input.extend(["nowhere"] * 1000)),
        "more than 16 inputs",
    ),
    "a hundred attributes": (
        "packed",
        edited(
            lambda m: node(m, GQA).attribute.extend([helper.make_attribute(f"a{i}", 1) for i in range(999)])
        ),
        "more than 16 attributes",
    ),
    # the encoder's
    "a mask that is a constant": ("encoder", constant_input(MHA, 4, np.array([[1 << 40]])), "attention_mask"),
    "a mask of another value": ("encoder", rewired(MHA, 4, "input_ids"), "attention_mask"),
    "a key of another shape": ("encoder", rewired(MHA, 1, "layers.0.qkv:out"), "not like the query"),
    "heads that do not divide": ("encoder", attribute(MHA, "num_heads", 7), "another shape"),
    "a short bias": ("encoder", reshaped(MHA, 3, [3]), "shape"),
    "a cache in the encoder": ("encoder", rewired(MHA, 6, "layers.0.qkv:out"), "inputs"),
    "a short gamma": ("encoder", reshaped("SkipLayerNormalization", 2, [1]), "shape"),
    "few positions": ("encoder", edited(few_positions), "a table of 2 rows"),
    "few token types": ("encoder", constant_input("Gather", 1, np.array([[7]])), "rank 0"),
    "a bias of another width": ("encoder", reshaped("BiasGelu", 1, [1]), "shape"),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attack(sound, name):
    """The graph is refused for what was done to it; as exported it passes."""
    base, attack, says = ATTACKS[name]
    graph = sound[base]
    check_graph(graph.data, "g.onnx", graph.spec, graph.files)
    data = attack(graph.data)
    assert data != graph.data
    with pytest.raises(BundleError) as error:
        check_graph(data, "g.onnx", graph.spec, graph.files)
    message = str(error.value)
    assert says in message
    assert message.isprintable() and len(message) < 500 and message.startswith("g.onnx: ")


def test_a_bundle_is_refused_without_a_runtime(tmp_path):
    """Opening a bundle with such a graph, hashes correct, ends before onnxruntime is even imported."""
    logits = np.zeros((len(TOKENS), tiny.VOCAB), np.float32)
    root = write_bundle(tmp_path / "bundle", decoder_golden(logits, 0.1), encoder=False)
    path = root / "graphs/int4.onnx"
    path.write_bytes(constant_input(GQA, 5, np.array([1 << 20]))(path.read_bytes()))
    relist(root, "graphs/int4.onnx")
    code = (
        "import sys\n"
        "from edge_reasoner.contract.bundle.open import open_bundle\n"
        "from edge_reasoner.errors import BundleError\n"
        "try:\n    open_bundle(sys.argv[1])\n"
        "except BundleError as error:\n    print(error, 'onnxruntime' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "graph's input seqlens_k" in done.stdout and done.stdout.endswith(" False\n")


def test_a_giant_graph_is_refused_unread():
    """More bytes than any graph has are not looked at."""
    with pytest.raises(BundleError, match="at most"):
        scan_graph(bytes((4 << 20) + 1), "g.onnx")


def test_many_of_everything():
    """A hundred thousand dimensions, names or initializers are refused where they pass the limit."""
    wide = field(5, b"\x08\x01" * 100_000)
    values = field(11, b"") + field(12, b"")
    graph = field(1, field(2, b"") + field(4, b"Add")) + field(2, b"g") + wide + values
    with pytest.raises(BundleError, match="more than 16 dims"):
        scan_graph(b"\x08\x0a" + field(7, graph) + field(8, b"\x10\x15"), "g.onnx")
