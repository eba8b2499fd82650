"""What a query returns: the answer, where it came from, and what it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from edge_reasoner.chat.model import ChatPiece, Usage
from edge_reasoner.gate.decide import Decision

Source = Literal["local-fast", "local", "cache", "cloud", "degraded"]
#: local text · cloud text · the cloud takes over, nothing was shown · the cloud failed after text was shown ·
#: the end, with the whole Answer
PieceKind = Literal["local", "cloud", "handover", "degraded", "end"]


@dataclass(frozen=True)
class Timings:
    """Where the time went. `ttft_ms`: from the call to the first token of the answer that was delivered."""

    queue_ms: float
    preprocess_ms: float
    ttft_ms: float
    total_ms: float
    prefill_tps: float | None
    decode_tps: float | None


@dataclass(frozen=True)
class Cost:
    """US dollars of cloud tokens (0 when none were used, None without a price); joules of local work,
    estimated from the board's power, or None where that is unknown."""

    usd: float | None
    joules: float | None


@dataclass(frozen=True)
class Answer:
    """One answer. `confidence` is the gate's estimate for a local answer, None for the cloud's.

    `source` "degraded": the cloud was wanted and did not serve (or is switched off), so this is the local
    answer; `note` says why.
    """

    text: str
    source: Source
    model: str
    confidence: float | None
    decision: Decision
    usage: Usage
    timings: Timings
    cost: Cost
    finish_reason: str
    note: str | None = None
    #: what a reasoning model wrote before its answer; never part of `text`
    thinking: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that `ask --json` prints."""
        return {
            "text": self.text,
            "thinking": self.thinking,
            "source": self.source,
            "model": self.model,
            "confidence": self.confidence,
            "decision": self.decision.as_dict(),
            "usage": asdict(self.usage),
            "timings": asdict(self.timings),
            "cost": asdict(self.cost),
            "finish_reason": self.finish_reason,
            "note": self.note,
        }

    def __str__(self) -> str:
        return self.text


class Piece(ChatPiece):
    """A piece of a streamed answer: prints as its text. `kind` says what it is; the last has `answer` set.

    `thought` is what a reasoning model thought meanwhile, of the side that `kind` names; it is told as it
    comes once that side's answer would be shown.
    """

    kind: PieceKind
    answer: Answer | None

    __slots__ = ("answer", "kind")

    def __new__(cls, text: str, kind: PieceKind, answer: Answer | None = None, thought: str = "") -> Piece:
        """Makes a piece; `answer` only for kind "end"."""
        piece = super().__new__(cls, text, thought)
        piece.kind = kind
        piece.answer = answer
        return piece
