"""Decoders lowered without the pipeline around them, opened on the device's own backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch
from support.sequences import OneSequence

from edge_export.lower.decoder_onnx import GraphOptions, write_decoder_graph
from edge_export.model.config import DecoderConfig, TensorSource
from edge_export.model.tensors import parameter_count
from edge_export.plan.plan import plan_decoder
from edge_export.stages.store_decoder import store_decoder
from edge_export.storage.decoder import StoredDecoder
from edge_export.storage.stage_cache import Notes
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.manifest import DecoderSpec
from edge_reasoner.contract.profile import DeviceProfile


class MemorySource:
    """A TensorSource over a dictionary."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.detach().to(torch.float32) for name, tensor in tensors.items()}

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._tensors[name][start:stop].clone()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)


def quiet(what: str, done: int, total: int) -> None:
    """Progress nobody watches."""


def decoder_spec(config: DecoderConfig, context_tokens: int, kv_dtype: str = "float32") -> DecoderSpec:
    """The spec of a lowered decoder."""
    return DecoderSpec(
        family=config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        kv_heads=tuple(layer.num_kv_heads for layer in config.layers),
        head_dim=tuple(layer.head_dim for layer in config.layers),
        kv_dtype=kv_dtype,
        context_tokens=context_tokens,
        parameters=parameter_count(config),
        eos_token_ids=(),
        bos_token_id=None,
    )


def lower_decoder(
    config: DecoderConfig,
    source: TensorSource,
    profile: DeviceProfile,
    recipe: str,
    folder: Path,
    *,
    context_tokens: int,
    level: int = 1,
    checks: tuple[torch.Tensor, ...] = (),
) -> tuple[Path, DecoderSpec, StoredDecoder]:
    """Stores the weights (round-to-nearest where quantized), writes a graph: path, spec, what was stored."""
    plan = plan_decoder(config, profile, recipe, context_tokens, None, None, "rtn")
    stored = store_decoder(folder / "d.data", config, source, plan, None, (), checks, quiet, Notes(None))
    options = GraphOptions(plan.opset, context_tokens, plan.compute, level)
    write_decoder_graph(folder / "d.onnx", "d.data", config, stored.weights, stored.ropes, options)
    return folder / "d.onnx", decoder_spec(config, context_tokens, plan.compute), stored


def logits_in_pieces(
    path: Path, spec: DecoderSpec, token_ids: torch.Tensor, sizes: list[int]
) -> torch.Tensor:
    """Logits [T, vocab] of token ids [T] fed in pieces of these sizes, all positions kept."""
    with closing(OneSequence(OrtDecoder(path, spec, threads=1))) as sequence:
        rows = [
            torch.from_numpy(sequence.extend(piece.numpy(), len(piece)).copy()).reshape(len(piece), -1)
            for piece in token_ids.split(sizes)
        ]
    return torch.cat(rows)
