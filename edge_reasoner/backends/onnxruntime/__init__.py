"""The onnxruntime backend. Importing this package loads nothing; `load` does."""

from __future__ import annotations

from edge_reasoner.backends.base import Backend


def load() -> Backend:
    """Imports onnxruntime and says what it can do here."""
    from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
    from edge_reasoner.backends.onnxruntime.encoder import OrtEncoder
    from edge_reasoner.backends.onnxruntime.session import available_providers, runtime_version

    return Backend(
        name="onnxruntime",
        runtime_version=runtime_version(),
        providers=available_providers(),
        open_decoder=OrtDecoder,
        open_encoder=OrtEncoder,
    )
