"""Cloud protocols: one file, one name and one row of `PROTOCOLS` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from edge_reasoner.errors import InputError, shown

if TYPE_CHECKING:
    from edge_reasoner.chat.model import ChatModel
    from edge_reasoner.cloud.base import CloudOptions

ProtocolName = Literal["openai"]
DEFAULT_PROTOCOL: ProtocolName = "openai"


def _openai(options: CloudOptions) -> ChatModel:
    from edge_reasoner.cloud.openai_protocol import OpenAIModel

    return OpenAIModel(options)


#: protocol name → constructor; imports happen when a protocol is first used
PROTOCOLS: Mapping[ProtocolName, Callable[[CloudOptions], ChatModel]] = MappingProxyType({"openai": _openai})


def connect(options: CloudOptions, protocol: str = DEFAULT_PROTOCOL) -> ChatModel:
    """A client for the endpoint; nothing is sent yet. Raises InputError: unknown protocol, bad URL."""
    for name, make in PROTOCOLS.items():
        if isinstance(protocol, str) and name == protocol:
            return make(options)
    raise InputError(f"cloud protocol: {shown(protocol)} is not known; choose one of {', '.join(PROTOCOLS)}")
