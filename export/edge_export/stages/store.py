"""store: quantizes, and writes the bundle's data files. Resumes at the layer where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

import torch

from edge_export.plan.analysis import Analysis
from edge_export.plan.encoder import EncoderPlan, quantizer_of
from edge_export.plan.plan import ExportPlan
from edge_export.quantize import make_quantizer
from edge_export.quantize.formats import BlockFormat
from edge_export.stages.analyse import analysis_inputs
from edge_export.stages.store_decoder import store_decoder
from edge_export.stages.values import ModelKind, Planned, Run, Stored, extend, of
from edge_export.storage.decoder import KeptDecoder, StoredDecoder
from edge_export.storage.encoder import StoredEncoder
from edge_export.storage.external_data import ExternalData
from edge_export.storage.matrices import KeptMatrices, StoredMatrix, store_blocks, store_dense
from edge_export.storage.stage_cache import Notes
from edge_export.verify.decoder import golden_sequences

T = TypeVar("T")


def store(run: Run, planned: Planned) -> Stored:
    """Writes `graphs/<role>.data`. Raises CheckpointError where a weight is corrupt."""
    (run.bundle / "graphs").mkdir(exist_ok=True)
    return extend(Stored, planned, stored=_STORE[planned.kind](run, planned))


def data_file(planned: Planned) -> str:
    """Where the weights lie in the bundle."""
    return f"graphs/{planned.role}.data"


def decoder_sequences(planned: Planned) -> list[torch.Tensor]:
    """Token ids of a decoder's golden vectors."""
    return golden_sequences(planned.decoder.config, planned.texts.quality, planned.context_tokens)


def store_inputs(planned: Planned) -> tuple[Any, ...]:
    """What the stored weights depend on."""
    texts = planned.texts
    analysed = () if planned.analysis is None else analysis_inputs(planned)
    return *planned.identity, planned.role, planned.plan, analysed, texts.calibration, texts.quality


def _decoder(run: Run, planned: Planned) -> StoredDecoder:
    checkpoint, file = planned.decoder, data_file(planned)

    def make(notes: Notes) -> KeptDecoder:
        stored = store_decoder(
            run.bundle / file,
            checkpoint.config,
            checkpoint.source,
            of(ExportPlan, planned.plan),
            None if planned.analysis is None else of(Analysis, planned.analysis).head_inputs,
            planned.texts.calibration,
            [*decoder_sequences(planned), *planned.texts.quality],
            run.progress,
            notes,
        )
        return KeptDecoder.of(stored)

    return _kept(run, planned, KeptDecoder, make).stored()


def _encoder(run: Run, planned: Planned) -> StoredEncoder:
    checkpoint, file = planned.encoder, data_file(planned)
    weights = of(EncoderPlan, planned.plan).weights

    def make(notes: Notes) -> KeptMatrices:
        stored: dict[str, StoredMatrix] = {}
        with ExternalData(run.bundle / file) as data:
            for index, weight in enumerate(weights):
                run.progress("quantizing the encoder", index, len(weights))
                tensor = torch.cat([checkpoint.source.get(part) for part in weight.tensors])
                if isinstance(weight.format, BlockFormat):
                    quantizer = make_quantizer(quantizer_of(weight.format))
                    stored[weight.name] = store_blocks(data, quantizer.quantize(tensor, weight.format))
                else:
                    stored[weight.name] = store_dense(data, tensor, weight.format)
        run.progress("quantizing the encoder", len(weights), len(weights))
        return KeptMatrices.of(stored)

    return StoredEncoder(_kept(run, planned, KeptMatrices, make).matrices())


def _kept(run: Run, planned: Planned, kind: type[T], make: Callable[[Notes], T]) -> T:
    return run.cache.remember(
        "store",
        lambda: store_inputs(planned),
        kind,
        make,
        folder=run.bundle,
        files=lambda kept: (data_file(planned),),
    )


_STORE: Final[Mapping[ModelKind, Callable[[Run, Planned], StoredDecoder | StoredEncoder]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _encoder}
)
