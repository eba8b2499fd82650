"""The onnxruntime backend: everything is bound once, a decode step only changes numbers in place.

The KV cache is one zeroed buffer per layer and side, bound as both `past_key_values` and `present`
(GroupQueryAttention then appends in place), so rewinding is a change of one counter. `np.zeros` leaves pages
untouched until they are written: a large context costs memory only as it fills.

Threads spin while a call runs and stop when it returns (`session.force_spinning_stop`), so an idle device
does not burn a core (openpilot#22736).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from edge_reasoner.backends.base import Logits, TokenIds
from edge_reasoner.backends.session_options import check_session_options
from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec
from edge_reasoner.errors import BackendError, BundleError, ContextOverflowError, InputError

#: Longest input of one prefill call: longer calls are hardly faster but need more memory for activations.
PREFILL_CHUNK_TOKENS = 512
#: Most tokens (padding included) of one encoder call.
_EMBED_CHUNK_TOKENS = 4096

_CPU = "CPUExecutionProvider"
#: Where a provider's KV cache lives; a provider that is not named here reads host memory.
_DEVICES: Mapping[str, str] = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
_NUMPY_TYPES: Mapping[str, Any] = {"float32": np.float32, "float16": np.float16}

_DEFAULT_OPTIONS: Mapping[str, str] = {
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",
}

_BAD_GRAPH_ERRORS = (ort_state.InvalidGraph, ort_state.InvalidProtobuf, ort_state.NoSuchFile)
_LIBRARY_ERRORS = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.NoModel,
    ort_state.EngineError,
    ort_state.RuntimeException,
    ort_state.ModelLoaded,
    ort_state.NotImplemented,
    ort_state.EPFail,
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
)


def runtime_version() -> str:
    """Version of the onnxruntime library that is installed, e.g. "1.23.2"."""
    return str(onnxruntime.__version__)


def available_providers() -> tuple[str, ...]:
    """Execution providers that this build of onnxruntime contains."""
    return tuple(onnxruntime.get_available_providers())


class OrtDecoderSession:
    """A causal LM's graph with its KV cache: see `DecoderSession`. Not thread-safe.

    `context_tokens` (None: the model's own) sizes the cache. `provider` must take every node unless
    `allow_cpu_nodes`: a silent fall-back to the CPU is an error. Raises BundleError when the graph is not
    what its spec says, InputError when the context does not fit, BackendError when the library fails.
    """

    def __init__(
        self,
        graph_path: Path,
        spec: DecoderSpec,
        *,
        provider: str = _CPU,
        session_options: Mapping[str, str] | None = None,
        threads: int = 1,
        context_tokens: int | None = None,
        allow_cpu_nodes: bool = False,
    ) -> None:
        self._spec = spec
        self._context_tokens = _checked_context(spec, context_tokens)
        self._length_tokens = 0
        self._where = graph_path.name
        self._session: Any = _open_session(
            graph_path, provider, session_options or {}, threads, allow_cpu_nodes=allow_cpu_nodes
        )
        _check_signature(self._session, self._where, *_decoder_signature(spec))
        with _library_errors(f"{self._where}: allocating the KV cache"):
            self._bind(_DEVICES.get(provider, "cpu"))

    def _bind(self, device: str) -> None:
        # The arrays below are what the bound OrtValues point to: written in place, never replaced.
        self._token = np.zeros((1, 1), np.int64)
        self._seqlens = np.zeros((1,), np.int32)
        self._total = np.zeros((), np.int32)
        self._keep = np.ones((1,), np.int64)
        self._row = np.zeros((1, 1, self._spec.vocab_size), np.float32)
        self._rows = self._row[0]
        kv_type = _NUMPY_TYPES[self._spec.kv_dtype]
        room_tokens = self._room_tokens()
        shapes = [
            (1, heads, room_tokens, width)
            for heads, width in zip(self._spec.kv_heads, self._spec.head_dim, strict=True)
        ]
        self._cache = [
            {side: _ort_value(np.zeros(shape, kv_type), device) for side in ("key", "value")}
            for shape in shapes
        ]
        self._decode_binding = self._new_binding()
        self._decode_binding.bind_ortvalue_input("input_ids", _ort_value(self._token))
        self._decode_binding.bind_ortvalue_output("logits", _ort_value(self._row))
        self._prefill_binding = self._new_binding()

    def _room_tokens(self) -> int:
        """Tokens of the KV buffers: the graph may fix a number; what stays unused costs no memory."""
        fixed = {value.shape[2] for value in self._session.get_inputs() if value.name.startswith("past_key")}
        numbers = {size for size in fixed if isinstance(size, int)}
        if len(numbers) > 1 or any(size < self._context_tokens for size in numbers):
            raise BundleError(
                f"{self._where}: its KV cache holds {sorted(numbers)} tokens, not {self._context_tokens}"
            )
        return numbers.pop() if numbers else self._context_tokens

    def _new_binding(self) -> Any:
        """A binding of all that does not change from call to call."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("seqlens_k", _ort_value(self._seqlens))
        binding.bind_ortvalue_input("total_sequence_length", _ort_value(self._total))
        binding.bind_ortvalue_input("logits_to_keep", _ort_value(self._keep))
        for layer, sides in enumerate(self._cache):
            for side, value in sides.items():
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{side}", value)
                binding.bind_ortvalue_output(f"present.{layer}.{side}", value)
        return binding

    @property
    def context_tokens(self) -> int:
        """Capacity of the KV cache in tokens."""
        return self._context_tokens

    @property
    def vocab_size(self) -> int:
        """Width of a logits row."""
        return self._spec.vocab_size

    @property
    def length_tokens(self) -> int:
        """Tokens now in the KV cache."""
        return self._length_tokens

    def extend(self, token_ids: TokenIds, keep: int = 1) -> Logits:
        """See `DecoderSession.extend`."""
        self._check_open()
        count = token_ids.shape[0] if token_ids.ndim == 1 else 0
        if not 1 <= keep <= count:
            raise ValueError(f"token_ids {token_ids.shape} must be [n], n ≥ 1, and 1 ≤ keep ({keep}) ≤ n")
        end = self._length_tokens + count
        if end > self._context_tokens:
            raise ContextOverflowError(
                f"{self._length_tokens} + {count} tokens exceed the context of {self._context_tokens} tokens"
            )
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self.vocab_size:
            raise InputError(f"{self._where}: token ids must be in 0 … {self.vocab_size - 1}")
        with _library_errors(f"{self._where}: running {count} tokens"):
            rows = self._step(token_ids) if count == 1 else self._prefill(token_ids, keep)
        self._length_tokens = end
        return rows

    def _step(self, token_ids: TokenIds) -> Logits:
        self._token[0, 0] = token_ids[0]
        self._set_lengths(self._length_tokens + 1, 1)
        self._session.run_with_iobinding(self._decode_binding)
        logits: Logits = self._row[0]
        return logits

    def _prefill(self, token_ids: TokenIds, keep: int) -> Logits:
        """Runs chunks; each writes its share of the kept rows straight into the result."""
        count = token_ids.shape[0]
        rows = self._result_rows(keep)
        for start in range(0, count, PREFILL_CHUNK_TOKENS):
            chunk = token_ids[start : start + PREFILL_CHUNK_TOKENS]
            end = start + chunk.shape[0]
            # result row r belongs to position count - keep + r
            first, last = max(0, start - (count - keep)), end - (count - keep)
            target = rows[first:last] if last > 0 else self._row[0]
            self._set_lengths(self._length_tokens + end, target.shape[0])
            tokens = np.ascontiguousarray(chunk, np.int64).reshape(1, -1)
            self._prefill_binding.bind_ortvalue_input("input_ids", _ort_value(tokens))
            self._prefill_binding.bind_ortvalue_output("logits", _ort_value(target[np.newaxis]))
            self._session.run_with_iobinding(self._prefill_binding)
        return rows

    def _result_rows(self, keep: int) -> Logits:
        if keep == 1:
            row: Logits = self._row[0]
            return row
        if self._rows.shape[0] < keep:
            self._rows = np.empty((keep, self.vocab_size), np.float32)
        rows: Logits = self._rows[:keep]
        return rows

    def _set_lengths(self, total_tokens: int, keep: int) -> None:
        self._seqlens[0] = total_tokens - 1
        self._total[()] = total_tokens
        self._keep[0] = keep

    def rewind(self, length_tokens: int) -> None:
        """See `DecoderSession.rewind`."""
        self._check_open()
        if not 0 <= length_tokens <= self._length_tokens:
            raise ValueError(f"cannot rewind {self._length_tokens} tokens to {length_tokens}")
        self._length_tokens = length_tokens

    def close(self) -> None:
        """Releases the session, its weights and its cache."""
        self._decode_binding = self._prefill_binding = self._session = None
        self._cache = []

    def _check_open(self) -> None:
        if self._session is None:
            raise BackendError(f"{self._where}: the session is closed")


class OrtEncoderSession:
    """A sentence encoder's graph: see `EncoderSession`. Thread-safe. Raises as `OrtDecoderSession` does."""

    def __init__(
        self,
        graph_path: Path,
        spec: EncoderSpec,
        *,
        provider: str = _CPU,
        session_options: Mapping[str, str] | None = None,
        threads: int = 1,
        allow_cpu_nodes: bool = False,
    ) -> None:
        self._spec = spec
        self._where = graph_path.name
        self._session: Any = _open_session(
            graph_path, provider, session_options or {}, threads, allow_cpu_nodes=allow_cpu_nodes
        )
        _check_signature(self._session, self._where, *_encoder_signature(spec))

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        return self._spec.dimension

    @property
    def context_tokens(self) -> int:
        """Longest input in tokens."""
        return self._spec.context_tokens

    def embed(self, token_ids: list[list[int]]) -> NDArray[np.float32]:
        """See `EncoderSession.embed`. Inputs of like length run together, so padding stays small."""
        session = self._session
        if session is None:
            raise BackendError(f"{self._where}: the session is closed")
        for ids in token_ids:
            if not ids or min(ids) < 0 or max(ids) >= self._spec.vocab_size:
                raise InputError(
                    f"{self._where}: each input needs token ids, all in 0 … {self._spec.vocab_size - 1}"
                )
            if len(ids) > self.context_tokens:
                raise ContextOverflowError(
                    f"{len(ids)} tokens exceed the encoder's context of {self.context_tokens} tokens"
                )
        result = np.empty((len(token_ids), self.dimension), np.float32)
        for group in _length_groups(token_ids):
            inputs = _padded([token_ids[index] for index in group])
            with _library_errors(f"{self._where}: embedding {len(group)} inputs"):
                result[group] = session.run(["embedding"], inputs)[0]
        return result

    def close(self) -> None:
        """Releases the session."""
        self._session = None


def _length_groups(token_ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices ordered by length and cut into groups of at most `_EMBED_CHUNK_TOKENS` padded tokens."""
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * len(token_ids[index]) > _EMBED_CHUNK_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _padded(batch: Sequence[Sequence[int]]) -> dict[str, TokenIds]:
    shape = (len(batch), max(map(len, batch)))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}


def _ort_value(array: NDArray[Any], device: str = "cpu") -> Any:
    """An OrtValue over the array's own memory (on the CPU) or over a copy on the device."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)


def _checked_context(spec: DecoderSpec, context_tokens: int | None) -> int:
    wanted = spec.context_tokens if context_tokens is None else context_tokens
    if not 1 <= wanted <= spec.context_tokens:
        raise InputError(
            f"context of {wanted} tokens: 1 to {spec.context_tokens} are possible with this model"
        )
    needed_bytes, memory_bytes = wanted * spec.kv_bytes_per_token, _memory_bytes()
    if memory_bytes is not None and needed_bytes > memory_bytes:
        raise InputError(
            f"a context of {wanted} tokens needs {needed_bytes / 1e9:.1f} GB of KV cache; this machine has"
            f" {memory_bytes / 1e9:.1f} GB: try {memory_bytes // (2 * spec.kv_bytes_per_token)} tokens"
        )
    return wanted


def _memory_bytes() -> int | None:
    """Physical memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _open_session(
    path: Path, provider: str, session_options: Mapping[str, str], threads: int, *, allow_cpu_nodes: bool
) -> Any:
    if threads < 1:
        raise InputError(f"threads is {threads}; at least 1 is needed")
    check_session_options(session_options, path.name)
    if provider not in available_providers():
        raise BackendError(
            f"{path.name}: execution provider {provider!r} is not in this onnxruntime {runtime_version()};"
            f" it has: {', '.join(available_providers())}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    entries = {**_DEFAULT_OPTIONS, **session_options}
    if provider != _CPU and not allow_cpu_nodes:
        entries["session.disable_cpu_ep_fallback"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    with _library_errors(f"{path.name}: loading"):
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        session.disable_fallback()
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"{path.name}: asked for {provider}, onnxruntime chose {', '.join(session.get_providers())}"
        )
    return session


@contextmanager
def _library_errors(doing: str) -> Iterator[None]:
    """The one place where onnxruntime's exceptions become ours."""
    try:
        yield
    except _BAD_GRAPH_ERRORS as error:
        raise BundleError(
            f"{doing}: onnxruntime {runtime_version()} refuses it: {_one_line(error)}"
        ) from error
    except _LIBRARY_ERRORS as error:
        raise BackendError(f"{doing}: onnxruntime {runtime_version()} failed: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:399] + "…"


#: name -> (onnxruntime type, shape; None where the size is free)
_Signature = dict[str, tuple[str, tuple[int | None, ...]]]


def _decoder_signature(spec: DecoderSpec) -> tuple[_Signature, _Signature]:
    kv_type = {"float32": "tensor(float)", "float16": "tensor(float16)"}[spec.kv_dtype]
    inputs: _Signature = {
        "input_ids": ("tensor(int64)", (None, None)),
        "seqlens_k": ("tensor(int32)", (None,)),
        "total_sequence_length": ("tensor(int32)", ()),
        "logits_to_keep": ("tensor(int64)", (1,)),
    }
    outputs: _Signature = {"logits": ("tensor(float)", (None, None, spec.vocab_size))}
    for layer, (heads, width) in enumerate(zip(spec.kv_heads, spec.head_dim, strict=True)):
        for side in ("key", "value"):
            inputs[f"past_key_values.{layer}.{side}"] = (kv_type, (None, heads, None, width))
            outputs[f"present.{layer}.{side}"] = (kv_type, (None, heads, None, width))
    return inputs, outputs


def _encoder_signature(spec: EncoderSpec) -> tuple[_Signature, _Signature]:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return (
        dict.fromkeys(names, ("tensor(int64)", (None, None))),
        {"embedding": ("tensor(float)", (None, spec.dimension))},
    )


def _check_signature(session: Any, where: str, inputs: _Signature, outputs: _Signature) -> None:
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
