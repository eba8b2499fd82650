"""The reference cloud: a bundle (fp32, unpruned) behind the OpenAI protocol, and the loop that serves it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from edge_reasoner.activation.opening import open_bundle_at
from edge_reasoner.chat.model import ChatModel, ChatRequest, ChatResult, ChatStream
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.errors import InputError
from edge_reasoner.machine.cache_dir import default_cache_dir
from edge_reasoner.query.assemble import Machine, default_threads, open_local_model
from edge_reasoner.server.app import DEFAULT_MAX_WAITING, create_app

_KEEP_ALIVE_S = 5
_SHUTDOWN_S = 3
_START_TIMEOUT_S = 10.0


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


def serve(
    model: ChatModel,
    *,
    host: str = "127.0.0.1",
    port: int = 9000,
    max_waiting: int = DEFAULT_MAX_WAITING,
    auth_token: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves until interrupted. Raises InputError when the address cannot be bound.

    `ready` gets the base URL (…/v1) once connections are accepted; with port 0 it says which was taken.
    """
    with _listener(host, port) as listener:
        if ready is not None:
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{listener.getsockname()[1]}/v1")
        _server(model, max_waiting, auth_token).run(sockets=[listener])


@contextmanager
def serving(
    model: ChatModel,
    *,
    port: int = 0,
    max_waiting: int = DEFAULT_MAX_WAITING,
    auth_token: str | None = None,
) -> Iterator[str]:
    """Serves on loopback in a thread for the length of a `with`; gives the base URL (…/v1)."""
    with _listener("127.0.0.1", port) as listener:
        server = _server(model, max_waiting, auth_token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            # the socket listens already: requests wait in its backlog until the loop runs
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(_START_TIMEOUT_S)


def _server(model: ChatModel, max_waiting: int, auth_token: str | None) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(model, max_waiting=max_waiting, auth_token=auth_token),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        limit_concurrency=max_waiting + 64,
    )
    return uvicorn.Server(config)


def _listener(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"port: {port} is not allowed; give 0 (any free port) to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
