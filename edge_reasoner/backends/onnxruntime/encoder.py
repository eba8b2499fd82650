"""Sentence encoders on onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.base import Graph, TokenIds
from edge_reasoner.backends.onnxruntime.graph_files import GraphFiles
from edge_reasoner.backends.onnxruntime.session import CPU, library_errors, open_session
from edge_reasoner.backends.onnxruntime.signature import check_signature, encoder_signature
from edge_reasoner.contract.bundle.manifest import EncoderSpec
from edge_reasoner.errors import ContextOverflowError, InputError

#: Most tokens (padding included) of one encoder call.
_EMBED_CHUNK_TOKENS = 4096


class OrtEncoder:
    """A sentence encoder's graph: see `EncoderModel`. Thread-safe. Raises as `OrtDecoder` does."""

    def __init__(
        self,
        graph: Graph,
        spec: EncoderSpec,
        *,
        provider: str = CPU,
        session_options: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        self._spec = spec
        self._files = GraphFiles(graph)
        self._where = self._files.where
        self._session = open_session(graph, provider, session_options or {}, threads)
        check_signature(self._session.get(), self._where, *encoder_signature(spec))

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        return self._spec.dimension

    @property
    def context_tokens(self) -> int:
        """Longest input in tokens."""
        return self._spec.context_tokens

    def embed(self, token_ids: list[list[int]]) -> NDArray[np.float32]:
        """See `EncoderModel.embed`. Inputs of like length run together, so padding stays small."""
        session = self._session.get()
        self._files.check()
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
            with library_errors(f"{self._where}: embedding {len(group)} inputs"):
                result[group] = session.run(["embedding"], inputs)[0]
        return result

    def close(self) -> None:
        """Releases graph and weights."""
        self._session.close()


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
