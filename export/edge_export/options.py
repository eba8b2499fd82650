"""What the user of the export stage may choose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_export.plan.plan import RECIPES
from edge_reasoner.errors import InputError

Task = Literal["auto", "causal-lm", "encoder"]


@dataclass(frozen=True)
class ExportOptions:
    """What the user may choose. Raises InputError on values that are not allowed."""

    recipe: str = "auto"
    task: Task = "auto"
    quantizer: str = "gptq"
    context_tokens: int | None = None
    calibration: Path | None = None
    quality_text: Path | None = None
    preprocessor: str | None = None
    max_size_mb: float | None = None
    max_latency_ms: float | None = None
    min_quality: float | None = None
    licence: str | None = None
    version: int = 1
    threads: int = 2
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise InputError(f"--recipe {self.recipe!r}: allowed: {', '.join(RECIPES)}")
        if self.quantizer not in ("gptq", "searched", "rtn"):
            raise InputError(f"--quantizer {self.quantizer!r}: allowed: gptq, searched, rtn")
        if self.version < 1:
            raise InputError(f"--bundle-version {self.version}: allowed: 1 or more")
