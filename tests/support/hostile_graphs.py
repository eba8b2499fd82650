"""Sound graphs of the exporter, and what an attacker would make of them: by the onnx package, or by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec

MS = "com.microsoft"
#: what a graph's bytes become
Change = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Sound:
    """A graph as exported, and what it is checked against."""

    path: Path
    spec: DecoderSpec | EncoderSpec

    @property
    def data(self) -> bytes:
        """The graph file's bytes."""
        return self.path.read_bytes()

    @property
    def files(self) -> dict[str, int]:
        """Sizes of the files beside the graph, and its own, by name."""
        return {file.name: file.stat().st_size for file in self.path.parent.iterdir() if file.is_file()}


def sound_graphs(folder: Path) -> dict[str, Sound]:
    """A packed int4 decoder with a window, one that norms its heads with float16 weights, and an encoder."""
    from support.lowered_decoders import lower_decoder
    from support.lowered_encoders import lower_encoder
    from support.tiny_berts import make_bert
    from support.tiny_models import make_model

    from edge_export.checkpoint.load import load_checkpoint
    from edge_reasoner.contract.profile import load_profile

    profile = load_profile("generic-x86")
    graphs = {}
    for name, case, recipe in (("packed", "mistral-window", "int4"), ("normed", "qwen3", "fp16")):
        at = folder / name
        make_model(case).save_pretrained(at / "model")
        checkpoint = load_checkpoint(at / "model")
        path, spec, _ = lower_decoder(
            checkpoint.config, checkpoint.source, profile, recipe, at, context_tokens=64, level=4
        )
        graphs[name] = Sound(path, spec)
    make_bert(folder / "encoder" / "model", "even")
    lowered = lower_encoder(folder / "encoder" / "model", "int8", profile, folder / "encoder")
    graphs["encoder"] = Sound(folder / "encoder" / lowered.variants[0].graph, lowered.spec)
    return graphs


# --- by the onnx package ------------------------------------------------------------------------------------


def edited(change: Callable[[onnx.ModelProto], object]) -> Change:
    """`change` made to the parsed model, written canonically again."""

    def apply(data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        change(model)
        return model.SerializeToString(deterministic=True)

    return apply


def node(model: onnx.ModelProto, op_type: str, number: int = 0) -> onnx.NodeProto:
    """The graph's so many-th node of that operator."""
    return [item for item in model.graph.node if item.op_type == op_type][number]


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """The initializer of that name."""
    return next(item for item in model.graph.initializer if item.name == name)


def read(model: onnx.ModelProto, op_type: str, number: int, index: int) -> onnx.TensorProto:
    """The initializer that is that input of a node."""
    return tensor(model, node(model, op_type, number).input[index])


def rewired(op_type: str, index: int, value: str, number: int = 0) -> Change:
    """Another value as that input of a node."""

    def change(model: onnx.ModelProto) -> None:
        inputs = node(model, op_type, number).input
        while len(inputs) <= index:
            inputs.append("")
        inputs[index] = value

    return edited(change)


def constant_input(op_type: str, index: int, array: np.ndarray, number: int = 0) -> Change:
    """A constant as that input of a node."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(array, "evil"))
        inputs = node(model, op_type, number).input
        while len(inputs) <= index:
            inputs.append("")
        inputs[index] = "evil"

    return edited(change)


def attribute(op_type: str, name: str, value: object, number: int = 0) -> Change:
    """Another value of an attribute, or one more attribute."""

    def change(model: onnx.ModelProto) -> None:
        attributes = node(model, op_type, number).attribute
        for index, item in enumerate(attributes):
            if item.name == name:
                del attributes[index]
                break
        attributes.append(helper.make_attribute(name, value))

    return edited(change)


def added(*nodes: onnx.NodeProto, first: bool = False) -> Change:
    """More nodes, at the end or before all others."""

    def change(model: onnx.ModelProto) -> None:
        kept = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *kept] if first else [*kept, *nodes])

    return edited(change)


def reshaped(op_type: str, index: int, dims: list[int], number: int = 0, *, fit: bool = True) -> Change:
    """An initializer of another shape; `fit`: its stored length changed with it, its place too."""

    def change(model: onnx.ModelProto) -> None:
        item = read(model, op_type, number, index)
        sizes = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.UINT8: 1, TensorProto.INT64: 8}
        if fit and item.external_data:
            entry = next(entry for entry in item.external_data if entry.key == "length")
            entry.value = str(int(np.prod(dims)) * sizes[item.data_type])
        item.dims[:] = dims
        declared = [value for value in model.graph.value_info if value.name == item.name]
        for value in declared:
            value.CopyFrom(helper.make_tensor_value_info(item.name, item.data_type, dims))

    return edited(change)


def external(key: str, value: str) -> Change:
    """Another value of a key of the first external tensor's data; a new key where there is none."""

    def change(model: onnx.ModelProto) -> None:
        item = next(item for item in model.graph.initializer if item.external_data)
        for entry in item.external_data:
            if entry.key == key:
                entry.value = value
                return
        item.external_data.add(key=key, value=value)

    return edited(change)


# --- by hand ------------------------------------------------------------------------------------------------


def varint(number: int, length: int = 0) -> bytes:
    """A protobuf varint, padded to `length` bytes."""
    out = bytearray()
    while number > 127 or len(out) + 1 < length:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, payload: bytes, *, key: bytes | None = None, length: bytes | None = None) -> bytes:
    """A length-delimited field; its key and its length may be spelled otherwise."""
    return (key or varint(number << 3 | 2)) + (length or varint(len(payload))) + payload


def split(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """(field number, payload, whole field) of each field of a sound message."""
    found, position = [], 0

    def number() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        start = position
        key = number()
        size = {2: number, 5: lambda: 4, 1: lambda: 8}.get(key & 7)
        if size is None:
            number()
            found.append((key >> 3, data[start:position], data[start:position]))
            continue
        count = size()
        position += count
        found.append((key >> 3, data[position - count : position], data[start:position]))
    return found


def in_graph(number: int, change: Callable[[bytes], bytes]) -> Change:
    """The first field of that number in the graph, written by `change` from its payload."""

    def apply(data: bytes) -> bytes:
        out = b""
        for at, payload, whole in split(data):
            if at != 7:
                out += whole
                continue
            graph, done = b"", False
            for inner, content, text in split(payload):
                graph += change(content) if inner == number and not done else text
                done = done or inner == number
            out += field(7, graph)
        return out

    return apply


def in_tensor(number: int, change: Callable[[bytes], bytes]) -> Change:
    """The first field of that number in the first initializer, written by `change` from its payload."""

    def rewrite(content: bytes) -> bytes:
        out, done = b"", False
        for inner, payload, whole in split(content):
            out += change(payload) if inner == number and not done else whole
            done = done or inner == number
        return field(5, out)

    return in_graph(5, rewrite)
