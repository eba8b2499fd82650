"""The frozen values that the stages hand on: each is the one before it, and what its stage found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from edge_export.checkpoint.bert import EncoderCheckpoint
from edge_export.checkpoint.load import DecoderCheckpoint
from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_export.options import ExportOptions
from edge_export.plan.analysis import Analysis
from edge_export.plan.encoder import EncoderAnalysis, EncoderPlan
from edge_export.plan.plan import ExportPlan
from edge_export.progress import Progress
from edge_export.storage.decoder import StoredDecoder
from edge_export.storage.encoder import StoredEncoder
from edge_export.storage.stage_cache import StageCache
from edge_reasoner.contract.bundle.manifest import (
    ComponentKind,
    DecoderSpec,
    EncoderSpec,
    GoldenSet,
    Manifest,
    Predicted,
    Variant,
)
from edge_reasoner.contract.profile import DeviceProfile
from edge_reasoner.contract.profile.cost import GraphCost

T = TypeVar("T")

#: what kind of model a checkpoint holds: the key of every stage's table
ModelKind = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class Run:
    """What all stages of one export share."""

    progress: Progress
    cache: StageCache
    #: the bundle being written; until there is one, stages write no files
    folder: Path | None = None

    @property
    def bundle(self) -> Path:
        """The folder of the bundle that is being written."""
        assert self.folder is not None, "nothing is written before the plan is made"
        return self.folder


@dataclass(frozen=True, kw_only=True)
class Job:
    """One component to make: the model that was asked for, or its preprocessor."""

    model: str
    board: DeviceProfile
    options: ExportOptions


@dataclass(frozen=True, kw_only=True)
class Found(Job):
    """Where the model is."""

    path: Path
    kind: ModelKind

    @property
    def role(self) -> ComponentKind:
        """What the model is in a bundle."""
        return "reasoner" if self.kind == "decoder" else "preprocessor"


@dataclass(frozen=True, kw_only=True)
class Loaded(Found):
    """An opened checkpoint: configuration checked, weights not yet read."""

    checkpoint: DecoderCheckpoint | EncoderCheckpoint
    tokenizer: TokenizerFiles
    chat_template: str | None
    warnings: tuple[str, ...]

    @property
    def decoder(self) -> DecoderCheckpoint:
        """The checkpoint of a decoder."""
        return of(DecoderCheckpoint, self.checkpoint)

    @property
    def encoder(self) -> EncoderCheckpoint:
        """The checkpoint of an encoder."""
        return of(EncoderCheckpoint, self.checkpoint)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What stands for the weights wherever results are kept."""
        return self.kind, self.checkpoint.digest.sha256, self.checkpoint.config


@dataclass(frozen=True)
class Texts:
    """What an export reads: token ids int64 [T]; an encoder is measured on sentences."""

    calibration: tuple[torch.Tensor, ...] = ()
    calibration_sha256: str | None = None
    quality: tuple[torch.Tensor, ...] = ()
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Checked(Loaded):
    """A model that the board can take, and the texts that it will be measured on."""

    #: positions of the KV cache; of an encoder, its own context
    context_tokens: int
    texts: Texts


@dataclass(frozen=True, kw_only=True)
class Analysed(Checked):
    """What calibration text said, where the recipe asks for it."""

    analysis: Analysis | EncoderAnalysis | None


@dataclass(frozen=True, kw_only=True)
class Planned(Analysed):
    """Every decision, made before any weight changes; what it will cost on the board."""

    plan: ExportPlan | EncoderPlan
    cost: GraphCost
    predicted: Predicted


@dataclass(frozen=True, kw_only=True)
class Stored(Planned):
    """Weights in the bundle's data file."""

    stored: StoredDecoder | StoredEncoder


@dataclass(frozen=True, kw_only=True)
class Lowered(Stored):
    """Graphs over those weights. Paths are relative to the bundle."""

    spec: DecoderSpec | EncoderSpec
    #: fastest first, the reference last
    variants: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True)
class Verified(Lowered):
    """The variants that reproduce torch on the device's backend, and the vectors that say so."""

    golden: GoldenSet


@dataclass(frozen=True, kw_only=True)
class Measured(Verified):
    """What it is worth beside the original."""

    quality: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Reported:
    """All components of a bundle, and the files that belong to none of them."""

    components: tuple[Measured, ...]
    files: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Packed(Reported):
    """A whole bundle in its folder, not yet at its place."""

    manifest: Manifest
    #: bytes: source_bytes, bundle_bytes, and <role>_bytes of each component
    sizes: Mapping[str, float]


@dataclass(frozen=True)
class ExportReport:
    """What an export made; `to_dict` is `edge-export --json`."""

    bundle: Path | None
    profile: str
    plan: Mapping[str, Any]
    sizes: Mapping[str, float]
    quality: Mapping[str, float]
    predicted: Mapping[str, float | None]
    warnings: tuple[str, ...]
    seconds: float
    #: stages whose results an earlier export had left in the cache
    reused: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The contract's JSON object. `measured` is null: the board's own figures come from `bench`."""
        return {
            "bundle": None if self.bundle is None else str(self.bundle),
            "profile": self.profile,
            "plan": dict(self.plan),
            "sizes": dict(self.sizes),
            "quality": dict(self.quality),
            "predicted": dict(self.predicted),
            "measured": None,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 1),
        }


def extend(kind: type[T], value: Any, /, **found: Any) -> T:
    """The stage's value: all of the one before, and what was found. TypeError where that is not all."""
    return kind(**{field.name: getattr(value, field.name) for field in fields(value)} | found)


def of(kind: type[T], value: object) -> T:
    """`value`, known to be of that kind."""
    assert isinstance(value, kind), f"{type(value).__name__} is no {kind.__name__}"
    return value
