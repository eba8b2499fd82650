"""The reference cloud: a bundle (fp32, unpruned) behind the OpenAI protocol."""

from __future__ import annotations

import os
from pathlib import Path

from edge_reasoner.activation.opening import open_bundle_at
from edge_reasoner.chat.model import ChatModel, ChatRequest, ChatResult, ChatStream
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.machine.cache_dir import default_cache_dir
from edge_reasoner.query.assemble import Machine, default_threads, open_local_model
from edge_reasoner.server.listen import serve, serving

__all__ = ["ReferenceModel", "serve", "serving"]


class ReferenceModel:
    """A `ChatModel` over another one, under the name that clients ask for."""

    def __init__(self, model: ChatModel, name: str | None = None) -> None:
        """`name` None: the model's own. The model is closed with this one."""
        self._model = model
        self._name = name or model.name

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        threads: int | None = None,
        context_tokens: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> ReferenceModel:
        """Opens a bundle's reasoner. Raises what `open_bundle_at` and `open_local_model` raise."""
        machine = Machine(
            threads=threads or default_threads(),
            cache_dir=Path(cache_dir) if cache_dir is not None else default_cache_dir(os.environ),
        )
        opened = bundle if isinstance(bundle, Bundle) else open_bundle_at(bundle, machine.cache_dir)
        local, _ = open_local_model(opened, machine, context_tokens=context_tokens)
        return cls(local, name)

    @property
    def name(self) -> str:
        """See `ChatModel`."""
        return self._name

    @property
    def context_tokens(self) -> int | None:
        """See `ChatModel`."""
        return self._model.context_tokens

    def submit(self, request: ChatRequest) -> ChatStream[str, ChatResult]:
        """See `ChatModel`."""
        return self._model.submit(request)

    def close(self) -> None:
        """See `ChatModel`."""
        self._model.close()
