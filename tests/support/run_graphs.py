"""Loads graphs by onnxruntime alone and runs what loads, in any Python that has it, within limits.

python run_graphs.py < lines of paths      prints one JSON line for each: what the runtime saw, or its refusal
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

_MEMORY_BYTES = 4 << 30
_TOKENS = 5
#: what the symbols of a shape come to in this run
SIZES = {
    **{"batch": 1, "tokens": _TOKENS, "total": _TOKENS, "context": 64},
    **{"logits_to_keep": 1, "states_to_keep": 1},
}
_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
#: what it raises in place of dying
_REFUSALS = (
    *(state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile),
    *(state.RuntimeException, state.NotImplemented, RuntimeError, ValueError, MemoryError),
)


def feed(name: str, kind: str, shape: list[Any]) -> np.ndarray:
    """An input for a prefill of a few tokens, the cache empty, one position kept."""
    if name == "seqlens_k":
        return np.array([_TOKENS - 1], np.int32)
    if name == "total_sequence_length":
        return np.array(_TOKENS, np.int32)
    if name.startswith("past_key_values"):
        return np.zeros([SIZES.get(dim, dim) for dim in shape], _TYPES[kind])
    return np.ones([SIZES.get(dim, dim) for dim in shape], _TYPES[kind])


def _outcome(path: str) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    seen: dict[str, Any] = {"path": path, "inputs": [], "outputs": [], "error": None}
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for kind, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            seen[kind] = [[value.name, value.type, value.shape] for value in values]
        session.run(None, {v.name: feed(v.name, v.type, v.shape) for v in session.get_inputs()})
    except _REFUSALS as error:
        seen["error"] = str(error)[:200]
    return seen


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        print(json.dumps(_outcome(line.rstrip("\n"))), flush=True)
