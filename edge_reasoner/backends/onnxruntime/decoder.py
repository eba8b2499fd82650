"""Causal LMs on onnxruntime: one session (weights) for any number of KV caches.

Everything is bound once per cache; a decode step only changes numbers in place.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.base import Graph, KVCache, Logits, Step, TokenIds
from edge_reasoner.backends.onnxruntime.graph_files import GraphFiles
from edge_reasoner.backends.onnxruntime.kv_cache import Bindings, CacheState, KVBuffers, OrtKVCache, Room
from edge_reasoner.backends.onnxruntime.session import CPU, library_errors, open_session, ort_value
from edge_reasoner.backends.onnxruntime.signature import check_signature, decoder_signature
from edge_reasoner.backends.saved_cache import CacheLayout, pack, unpack
from edge_reasoner.contract.bundle.manifest import DecoderSpec
from edge_reasoner.errors import BundleError, ContextOverflowError, InputError
from edge_reasoner.machine.memory import total_bytes

#: Longest input of one prefill call: longer calls are hardly faster but need more memory for activations.
PREFILL_CHUNK_TOKENS = 512
#: Where a provider's KV cache lives; a provider that is not named here reads host memory.
_DEVICES: Mapping[str, str] = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}


class OrtDecoder:
    """A causal LM's graph and weights: see `DecoderModel`.

    Raises BundleError when the graph is not what its spec says, BackendError when the library fails.
    """

    def __init__(
        self,
        graph: Graph,
        spec: DecoderSpec,
        *,
        provider: str = CPU,
        session_options: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        self._spec = spec
        self._files = GraphFiles(graph)
        self._where = self._files.where
        self._session = open_session(graph, provider, session_options or {}, threads)
        check_signature(self._session.get(), self._where, *decoder_signature(spec))
        self._room_tokens = self._fixed_room_tokens()
        self._device = _DEVICES.get(provider, "cpu")
        self._lock = threading.Lock()
        self._caches: weakref.WeakSet[OrtKVCache] = weakref.WeakSet()
        self._fingerprint: str | None = None
        # The arrays below are what every cache's bindings point to: written in place, never replaced.
        self._token = np.zeros((1, 1), np.int64)
        self._seqlens = np.zeros((1,), np.int32)
        self._total = np.zeros((), np.int32)
        self._keep = np.ones((1,), np.int64)
        self._states = np.ones((1,), np.int64)
        self._hidden_last = np.zeros((1, spec.hidden_size), np.float32)
        self._hidden_sum = np.zeros((1, spec.hidden_size), np.float32)
        self._row = np.zeros((1, 1, spec.vocab_size), np.float32)
        self._rows = self._row[0]

    def _fixed_room_tokens(self) -> int | None:
        """Tokens of the KV buffers where the graph fixes a number; what stays unused costs no memory."""
        fixed = {
            value.shape[2] for value in self._session.get().get_inputs() if value.name.startswith("past_key")
        }
        numbers = {size for size in fixed if isinstance(size, int)}
        if len(numbers) > 1 or any(size < self._spec.context_tokens for size in numbers):
            raise BundleError(
                f"{self._where}: its KV cache holds {sorted(numbers)} tokens, not {self._spec.context_tokens}"
            )
        return numbers.pop() if numbers else None

    @property
    def context_tokens(self) -> int:
        """Longest context of a cache, in tokens."""
        return self._spec.context_tokens

    @property
    def vocab_size(self) -> int:
        """Width of a logits row."""
        return self._spec.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self._spec.hidden_size

    def new_cache(self, context_tokens: int | None = None) -> OrtKVCache:
        """See `DecoderModel.new_cache`."""
        context = _checked_context(self._spec, context_tokens)
        return self._filled_cache(context, None)

    def restore(self, saved: bytes) -> OrtKVCache:
        """See `DecoderModel.restore`."""
        context, filled = unpack(saved, self._layout(), self.context_tokens)
        return self._filled_cache(_checked_context(self._spec, context), filled)

    def _filled_cache(self, context_tokens: int, filled: Sequence[NDArray[Any]] | None) -> OrtKVCache:
        self._session.get()
        room = Room(
            self._buffer_shapes(), self._spec.kv_dtype, self._room_tokens or context_tokens, self._device
        )
        with library_errors(f"{self._where}: allocating the KV cache"):
            buffers = KVBuffers(room, filled)
        return self._adopt(buffers, context_tokens, filled[0].shape[1] if filled else 0)

    def _adopt(self, buffers: KVBuffers, context_tokens: int, length_tokens: int) -> OrtKVCache:
        """A cache of this model over these buffers."""
        self._session.get()  # in a forked child the lock may be held for ever
        with self._lock:
            session = self._session.get()
            with library_errors(f"{self._where}: binding the KV cache"):
                decode, prefill = (self._new_binding(session, buffers) for _ in range(2))
                decode.bind_ortvalue_input("input_ids", ort_value(self._token))
                decode.bind_ortvalue_output("logits", ort_value(self._row))
            cache = OrtKVCache(
                CacheState(buffers, Bindings(decode, prefill)),
                where=self._where,
                context_tokens=context_tokens,
                length_tokens=length_tokens,
                adopt=self._adopt,
                pack=self._pack,
            )
            self._caches.add(cache)
            return cache

    def _new_binding(self, session: Any, buffers: KVBuffers) -> Any:
        """A binding of all that does not change from call to call."""
        binding = session.io_binding()
        binding.bind_ortvalue_input("seqlens_k", ort_value(self._seqlens))
        binding.bind_ortvalue_input("total_sequence_length", ort_value(self._total))
        binding.bind_ortvalue_input("logits_to_keep", ort_value(self._keep))
        binding.bind_ortvalue_input("states_to_keep", ort_value(self._states))
        binding.bind_ortvalue_output("hidden_last", ort_value(self._hidden_last))
        binding.bind_ortvalue_output("hidden_sum", ort_value(self._hidden_sum))
        for index, value in enumerate(buffers.values):
            name = f"{index // 2}.{('key', 'value')[index % 2]}"
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return binding

    def extend(
        self, cache: KVCache, token_ids: TokenIds, num_logits: int = 1, *, hidden: bool = False
    ) -> Step:
        """See `DecoderModel.extend`."""
        session = self._session.get()
        self._files.check()
        if not isinstance(cache, OrtKVCache) or cache not in self._caches:
            raise ValueError(f"{self._where}: the cache belongs to another model")
        state, length = cache.state, cache.length_tokens  # `state` keeps the buffers until this call is over
        count = token_ids.shape[0] if token_ids.ndim == 1 else 0
        if not 1 <= num_logits <= count:
            raise ValueError(
                f"token_ids {token_ids.shape} must be [n], n ≥ 1, and 1 ≤ num_logits ({num_logits}) ≤ n"
            )
        if length + count > cache.context_tokens:
            raise ContextOverflowError(
                f"{length} + {count} tokens exceed the context of {cache.context_tokens} tokens"
            )
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self.vocab_size:
            raise InputError(f"{self._where}: token ids must be in 0 … {self.vocab_size - 1}")
        with library_errors(f"{self._where}: running {count} tokens"):
            if count == 1:
                step = self._step(session, state.bindings.decode, token_ids, length)
            else:
                step = self._prefill(session, state.bindings.prefill, token_ids, length, num_logits, hidden)
        cache.grow(count)
        return step if hidden else Step(step.logits)

    def _step(self, session: Any, binding: Any, token_ids: TokenIds, length: int) -> Step:
        self._token[0, 0] = token_ids[0]
        self._set_lengths(length + 1, 1, 1)
        session.run_with_iobinding(binding)
        return Step(self._row[0], self._hidden_last[0], self._hidden_sum[0])

    def _prefill(
        self, session: Any, binding: Any, token_ids: TokenIds, length: int, num_logits: int, hidden: bool
    ) -> Step:
        """Runs chunks; each writes its share of the wanted rows straight into the result.

        With `hidden` all positions go through the last layer's MLP, not only those that get logits.
        """
        total = np.zeros(self.hidden_size, np.float32)
        count = token_ids.shape[0]
        rows = self._result_rows(num_logits)
        for start in range(0, count, PREFILL_CHUNK_TOKENS):
            chunk = token_ids[start : start + PREFILL_CHUNK_TOKENS]
            end = start + chunk.shape[0]
            # result row r belongs to position count - num_logits + r
            first, last = max(0, start - (count - num_logits)), end - (count - num_logits)
            target = rows[first:last] if last > 0 else self._row[0]
            self._set_lengths(length + end, target.shape[0], chunk.shape[0] if hidden else target.shape[0])
            tokens = np.ascontiguousarray(chunk, np.int64).reshape(1, -1)
            binding.bind_ortvalue_input("input_ids", ort_value(tokens))
            binding.bind_ortvalue_output("logits", ort_value(target[np.newaxis]))
            session.run_with_iobinding(binding)
            total += self._hidden_sum[0]
        return Step(rows, self._hidden_last[0], total)

    def _result_rows(self, num_logits: int) -> Logits:
        if num_logits == 1:
            row: Logits = self._row[0]
            return row
        if self._rows.shape[0] < num_logits:
            self._rows = np.empty((num_logits, self.vocab_size), np.float32)
        rows: Logits = self._rows[:num_logits]
        return rows

    def _set_lengths(self, total_tokens: int, kept: int, states: int) -> None:
        self._seqlens[0] = total_tokens - 1
        self._total[()] = total_tokens
        self._keep[0] = kept
        self._states[0] = states

    def close(self) -> None:
        """Releases graph, weights and its caches' memory; nothing in a forked child. Idempotent."""
        if not self._session.is_here:
            return
        with self._lock:
            for cache in list(self._caches):
                cache.close()
            self._session.close()

    def _pack(self, context_tokens: int, filled: Sequence[NDArray[Any]]) -> bytes:
        self._session.get()  # a forked child's buffers are its parent's, who may be writing
        return pack(self._layout(), context_tokens, filled)

    def _layout(self) -> CacheLayout:
        if self._fingerprint is None:
            self._fingerprint = self._files.fingerprint()
        return CacheLayout(self._fingerprint, self._spec.kv_dtype, self._buffer_shapes())

    def _buffer_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of key and value of each layer."""
        sizes = zip(self._spec.kv_heads, self._spec.head_dim, strict=True)
        return tuple(shape for shape in sizes for _ in ("key", "value"))


def _checked_context(spec: DecoderSpec, context_tokens: int | None) -> int:
    wanted = spec.context_tokens if context_tokens is None else context_tokens
    if not 1 <= wanted <= spec.context_tokens:
        raise InputError(
            f"context of {wanted} tokens: 1 to {spec.context_tokens} are possible with this model"
        )
    # the machine's memory, or less where a control group leaves this process less
    needed_bytes, memory_bytes = wanted * spec.kv_bytes_per_token, total_bytes()
    if memory_bytes is not None and needed_bytes > memory_bytes:
        half = max(1, memory_bytes // (2 * spec.kv_bytes_per_token))
        raise InputError(
            f"a context of {wanted} tokens needs {needed_bytes / 1e9:.1f} GB of KV cache; this process may"
            f" use {memory_bytes / 1e9:.1f} GB: try {half} tokens"
        )
    return wanted
