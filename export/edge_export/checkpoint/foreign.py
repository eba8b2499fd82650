"""Recognizes what stands where a checkpoint's file or tensor should be, so that a refusal can say what to do.

Reads heads of files and names only; nothing here decides whether something is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: bytes at the start of a file that are enough to know it by
HEAD_BYTES: Final = 64
_LFS: Final = b"version https://git-lfs.github.com/spec/"
_PAGES: Final = (b"<!doctype html", b"<html")
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")

_CONVERT: Final = "save the model with transformers: model.save_pretrained(…) writes safetensors"
_QUANTIZED: Final = "these are quantized weights; allowed are F32, F16 and BF16 safetensors, or a GGUF file"
#: what tensors of a kind are called → what to do about it
_KINDS: Final = (
    (r"lora_|\.base_layer\.|^base_model\.", "these are weights with an adapter; merge it into them first"),
    (
        r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|absmax|"
        r"quant_map|scales|biases|SCB|codes|codebooks)$|\.weight\.(absmax|quant_map|quant_state)",
        _QUANTIZED,
    ),
    (
        r"(qkv_proj|gate_up_proj|attn_qkv|query_key_value|c_attn|Wqkv|W_pack)\b",
        "q/k/v or gate/up are stored as one (fused); split them, or convert without fusing",
    ),
    (
        r"^(_orig_mod|module|ema|_fsdp_wrapped_module)\.",
        "the names have a training wrapper's prefix; " + _CONVERT,
    ),
    (
        r"^layers\.\d+\.(attention|feed_forward)\.|^tok_embeddings\.",
        "the names are those of the original release; convert it to transformers' format",
    ),
    (r"\.attn_q\.weight\.lora_", "an adapter (LoRA), not a model; merge it into its model first"),
    (r"^transformer\.(h|wte)\b|^gpt_neox\.", "the names are those of another family of models"),
)
#: file name → what it is and what to do
_OTHER_WEIGHTS: Final = (
    (r"adapter_model\.(safetensors|bin)", "an adapter (LoRA) alone; merge it into its model first"),
    (
        r"pytorch_model.*\.bin(\.index\.json)?|.*\.(pth|pt|bin|ckpt)",
        f"PyTorch's pickles are not read; {_CONVERT}",
    ),
    (
        r"tf_model\.h5|flax_model\.msgpack|.*\.(h5|msgpack)",
        f"TensorFlow's and Flax's are not read; {_CONVERT}",
    ),
    (
        r"consolidated.*\.safetensors",
        "the original release's names are not read; convert it to transformers' format",
    ),
    (
        r"model.*-of-\d+\.safetensors",
        "the shards have no index (model.safetensors.index.json); download it too",
    ),
    (r".*\.safetensors", "only model.safetensors is read; rename it if it is the whole model"),
    (r".*\.onnx", "ONNX files are not read; give the model that they were made from"),
)


def what_it_is(head: bytes) -> str | None:
    """What a file that begins with `head` is instead of text, safetensors or GGUF; None: unknown."""
    if head.startswith(_LFS):
        return "a Git LFS pointer, not the file itself; fetch it: git lfs pull"
    if head.lstrip().lower().startswith(_PAGES):
        return "a web page, not the file itself; download it again"
    if head.startswith(_PICKLES):
        return f"a PyTorch or zip file; PyTorch's pickles are not read; {_CONVERT}"
    return None


def file_is(path: Path) -> str | None:
    """`what_it_is` of a file; None also where it cannot be read."""
    try:
        with path.open("rb") as file:
            return what_it_is(file.read(HEAD_BYTES))
    except OSError:
        return None


def tensors_are(names: Iterable[str]) -> str | None:
    """What is known of a checkpoint whose tensors have such names: why the wanted one is not among them."""
    listed = list(names)
    for pattern, meaning in _KINDS:
        if (found := next(filter(re.compile(pattern).search, listed), None)) is not None:
            return f"there is {found[:120]!r}: {meaning}"
    return None


def weights_beside(directory: Path) -> str | None:
    """What a directory without readable weights has instead; None: nothing that is known."""
    try:
        names = sorted(path.name for path in directory.iterdir() if path.name != "model.safetensors")
    except OSError:
        return None
    for pattern, meaning in _OTHER_WEIGHTS:
        if (found := next(filter(re.compile(pattern).fullmatch, names), None)) is not None:
            return f"there is {found[:120]!r}: {meaning}"
    return None


def quantization_named(entry: object) -> str:
    """The method that a `quantization_config` names, as text for a message; "" where it names none."""
    if not isinstance(entry, dict):
        return ""
    for key in ("quant_method", "quant_type", "mode"):
        if isinstance(value := entry.get(key), str) and value:
            return value[:40]
    return ""
