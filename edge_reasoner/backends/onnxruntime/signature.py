"""Does a graph have the inputs and outputs that the manifest's spec promises?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec
from edge_reasoner.errors import BundleError

#: name -> (onnxruntime type, shape; None where the size is free)
Signature = dict[str, tuple[str, tuple[int | None, ...]]]


def decoder_signature(spec: DecoderSpec) -> tuple[Signature, Signature]:
    """Inputs and outputs of a decoder's graph."""
    kv_type = {"float32": "tensor(float)", "float16": "tensor(float16)"}[spec.kv_dtype]
    inputs: Signature = {
        "input_ids": ("tensor(int64)", (None, None)),
        "seqlens_k": ("tensor(int32)", (None,)),
        "total_sequence_length": ("tensor(int32)", ()),
        "logits_to_keep": ("tensor(int64)", (1,)),
        "states_to_keep": ("tensor(int64)", (1,)),
    }
    outputs: Signature = {
        "logits": ("tensor(float)", (None, None, spec.vocab_size)),
        "hidden_last": ("tensor(float)", (None, spec.hidden_size)),
        "hidden_sum": ("tensor(float)", (None, spec.hidden_size)),
    }
    for layer, (heads, width) in enumerate(zip(spec.kv_heads, spec.head_dim, strict=True)):
        for side in ("key", "value"):
            inputs[f"past_key_values.{layer}.{side}"] = (kv_type, (None, heads, None, width))
            outputs[f"present.{layer}.{side}"] = (kv_type, (None, heads, None, width))
    return inputs, outputs


def encoder_signature(spec: EncoderSpec) -> tuple[Signature, Signature]:
    """Inputs and outputs of an encoder's graph."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return (
        dict.fromkeys(names, ("tensor(int64)", (None, None))),
        {"embedding": ("tensor(float)", (None, spec.dimension))},
    )


def check_signature(session: Any, where: str, inputs: Signature, outputs: Signature) -> None:
    """Raises BundleError unless the session's graph has exactly these inputs and outputs."""
    for kind, wanted, found in (
        ("input", inputs, session.get_inputs()),
        ("output", outputs, session.get_outputs()),
    ):
        got = {value.name: (str(value.type), tuple(value.shape)) for value in found}
        if odd := sorted(wanted.keys() ^ got.keys()):
            state = "missing" if odd[0] in wanted else "unexpected"
            raise BundleError(f"{where}: {kind} {odd[0]!r} is {state}")
        for name, (element_type, shape) in wanted.items():
            if got[name][0] != element_type or not _fits(shape, got[name][1]):
                raise BundleError(
                    f"{where}: {kind} {name!r} is {got[name][0]} {list(got[name][1])};"
                    f" the manifest's spec asks for {element_type} {list(shape)}"
                )


def _fits(wanted: Sequence[int | None], got: Sequence[int | str | None]) -> bool:
    """Equal rank, and equal wherever both sides state a number."""
    return len(wanted) == len(got) and all(
        not isinstance(have, int) or want is None or want == have
        for want, have in zip(wanted, got, strict=True)
    )
