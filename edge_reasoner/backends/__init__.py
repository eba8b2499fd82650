"""Inference backends behind the protocols of `backends.base`: one file and one row of the table each.

Importing this package loads no native library; asking the table for a backend does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_reasoner.backends.base import DecoderSession, EncoderSession
from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec
from edge_reasoner.errors import BundleError


class OpenDecoder(Protocol):
    """Opens a decoder's graph; the parameters and errors are those of `OrtDecoderSession`."""

    def __call__(
        self,
        graph_path: Path,
        spec: DecoderSpec,
        *,
        provider: str,
        session_options: Mapping[str, str],
        threads: int,
        context_tokens: int | None,
    ) -> DecoderSession: ...


class OpenEncoder(Protocol):
    """Opens an encoder's graph; the parameters and errors are those of `OrtEncoderSession`."""

    def __call__(
        self,
        graph_path: Path,
        spec: EncoderSpec,
        *,
        provider: str,
        session_options: Mapping[str, str],
        threads: int,
    ) -> EncoderSession: ...


@dataclass(frozen=True)
class Backend:
    """One inference library."""

    name: str
    runtime_version: str
    providers: tuple[str, ...]
    open_decoder: OpenDecoder
    open_encoder: OpenEncoder


def _onnxruntime() -> Backend:
    from edge_reasoner.backends import onnxruntime_backend as module

    return Backend(
        name="onnxruntime",
        runtime_version=module.runtime_version(),
        providers=module.available_providers(),
        open_decoder=module.OrtDecoderSession,
        open_encoder=module.OrtEncoderSession,
    )


#: name in the manifest -> how to load it
BACKENDS: Mapping[str, Callable[[], Backend]] = {"onnxruntime": _onnxruntime}


def load_backend(name: str) -> Backend:
    """Loads the backend's native library. Raises BundleError for a name that the table lacks."""
    if name not in BACKENDS:
        raise BundleError(f"backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]()
