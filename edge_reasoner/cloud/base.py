"""The options that all cloud protocols share, and what their streams end with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_reasoner.chat.checks import check_integer, check_is, check_number, check_text
from edge_reasoner.chat.model import PulledStream, Usage
from edge_reasoner.cloud.redact import shown_url
from edge_reasoner.privacy.screen import DEFAULT_SCREEN, Screen

_MAX_S, _MAX_ATTEMPTS, _MAX_BYTES, _MAX_USD = 1e6, 100, 1 << 40, 1e6
_TIMES = ("connect_s", "read_s", "total_s", "settle_s")


@dataclass(frozen=True)
class CloudLimits:
    """Bounds of one request. Times in seconds; the total covers every attempt and the whole stream. Raises
    InputError."""

    connect_s: float = 5.0
    read_s: float = 30.0
    total_s: float = 120.0
    attempts: int = 3
    backoff_base_s: float = 0.25
    backoff_cap_s: float = 4.0
    #: a Retry-After longer than this is not waited for
    retry_after_cap_s: float = 10.0
    #: after the finish reason only token counts can come: they are not waited for any longer than this
    settle_s: float = 5.0
    line_bytes: int = 1024 * 1024
    response_bytes: int = 16 * 1024 * 1024
    #: text and thinking together; no model writes as much
    answer_chars: int = 1_000_000
    #: events of one reply that bring neither text nor thinking; a ping a second is far less
    idle_events: int = 100_000

    def __post_init__(self) -> None:
        for name in _TIMES:
            check_number(name, getattr(self, name), 0.0, _MAX_S, above=True)
        for name in ("backoff_base_s", "backoff_cap_s", "retry_after_cap_s"):
            check_number(name, getattr(self, name), 0.0, _MAX_S)
        check_integer("attempts", self.attempts, 1, _MAX_ATTEMPTS)
        for name in ("line_bytes", "response_bytes", "answer_chars", "idle_events"):
            check_integer(name, getattr(self, name), 1, _MAX_BYTES)


@dataclass(frozen=True)
class CloudPrice:
    """US dollars per million tokens, 0 to a million. Raises InputError."""

    input_usd_per_mtok: float
    output_usd_per_mtok: float

    def __post_init__(self) -> None:
        for name in ("input_usd_per_mtok", "output_usd_per_mtok"):
            check_number(name, getattr(self, name), 0.0, _MAX_USD)

    def cost_usd(self, usage: Usage) -> float:
        """What `usage` costs."""
        spent = usage.prompt_tokens * self.input_usd_per_mtok
        return (spent + usage.completion_tokens * self.output_usd_per_mtok) / 1e6


@dataclass(frozen=True)
class CloudOptions:
    """Where the cloud is. `model` None asks the endpoint which model it serves (the first it lists).

    The API key is read from `environment[api_key_env]`; it is never stored in a file, logged or shown.
    `screen`: the owner's rules for what is sent; without others, those of a `Policy` with no options. Raises
    InputError.
    """

    url: str
    model: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    limits: CloudLimits = CloudLimits()
    price: CloudPrice | None = None
    screen: Screen = DEFAULT_SCREEN

    def __repr__(self) -> str:
        return f"CloudOptions(url={shown_url(str(self.url))!r}, model={self.model!r})"

    def __post_init__(self) -> None:
        check_text("url", self.url, "an endpoint's URL (http://…/v1)")
        for name in ("model", "api_key_env"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        check_is("environment", self.environment, Mapping, "a mapping of names to texts")
        check_is("limits", self.limits, CloudLimits, "CloudLimits")
        check_is("price", self.price, (CloudPrice, type(None)), "a CloudPrice")
        check_is("screen", self.screen, Screen, "a Screen")


@dataclass(frozen=True)
class CloudResult:
    """How a cloud answer ended: a `ChatResult`. `usage` is None where the endpoint did not count."""

    text: str
    thinking: str | None
    model: str
    finish_reason: str
    usage: Usage | None


#: An answer of a cloud protocol under way.
CloudStream = PulledStream[str, CloudResult]
