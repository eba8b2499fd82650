"""A cloud answer as it grows out of the parts of a reply."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_reasoner.chat.model import ChatPiece, Usage
from edge_reasoner.cloud.base import CloudLimits, CloudResult
from edge_reasoner.cloud.faults import fix_surrogates
from edge_reasoner.cloud.parts import Part
from edge_reasoner.cloud.redact import PieceRedactor, Redactor
from edge_reasoner.engine.stopping import StopMatcher
from edge_reasoner.errors import CloudProtocolError, NoAnswerError, one_line

#: spaces, controls and characters without a width are no words
_VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def only_thought(finish_reason: str) -> str:
    """What is wrong with an answer that is all thinking."""
    return f"thought and gave no answer (finish reason {one_line(finish_reason, 40)!r}); allow more tokens"


class AnswerUnderWay:
    """What has arrived of one answer. One thread adds; any may read `complete`, `shown` and `settled_s`."""

    def __init__(self, redactor: Redactor, limits: CloudLimits, clock: Callable[[], float]) -> None:
        self._redactor = redactor
        self._limits = limits
        self._clock = clock
        self.begin({}, stop=())

    def begin(self, sent: Mapping[str, Any], *, stop: Sequence[str]) -> None:
        """Starts anew for another attempt. `stop`: stop strings that the endpoint does not know."""
        self.complete = False
        #: text was handed out
        self.shown = False
        self.too_long = False
        #: what the endpoint said that is no part of an answer
        self.remark = ""
        #: when to stop waiting for side facts, on the clock
        self.settled_s = math.inf
        self._asked_model = str(sent.get("model", ""))
        self._stop = StopMatcher(stop)
        self._pieces, self._thoughts = PieceRedactor(self._redactor), PieceRedactor(self._redactor)
        self._halves, self._thought_halves = _Halves(), _Halves()
        self._chars = 0
        self._has_words = False
        #: something came after a finish reason
        self._went_on = False
        self._thinking: list[str] = []
        self._finish: str | None = None
        self._model: str | None = None
        self._usage: Usage | None = None
        self._called_tools = self._refused = False
        #: which of several answers this is, once it is known
        self.index: float | None = None
        #: as received
        self._texts, self._ideas = list[str](), list[str]()
        self._only_messages = True

    def add(self, part: Part) -> ChatPiece:
        """Adds a part; returns the text and the thinking that may be shown now."""
        self._model = part.model or self._model
        self._usage = part.usage or self._usage
        if self.index is None:
            self.index = part.index
        elif part.index not in (None, self.index):
            return ChatPiece("", "")  # of another answer, which nobody asked for
        self._called_tools |= part.called_tools
        self._refused |= part.refused
        self.remark = part.remark or ("" if part.text else self.remark)
        new_text, new_thinking = (
            self._new(part, self._texts, part.text),
            self._new(part, self._ideas, part.thinking),
        )
        self._only_messages &= part.is_message or not part.text
        self._chars += len(new_text) + len(new_thinking)
        self.too_long = self._chars > self._limits.answer_chars
        thought = ""
        if new_thinking:
            thought = self._thoughts.push(self._thought_halves.push(new_thinking))
            self._thinking.append(thought)
        text = self._pieces.push(self._stop.push(self._halves.push(new_text)))
        says_more = bool(new_text or new_thinking)
        if part.finish_reason is not None:
            # some end every chunk with a reason; some say "stop" after the reason why they did
            if says_more or self._finish in (None, "stop") or self._went_on:
                self._finish = part.finish_reason
            self.complete, self._went_on = True, False
            says_more = True
        elif self.complete:
            self._went_on |= says_more
        if self.complete and says_more:
            self.settled_s = self._clock() + self._limits.settle_s
        if self._stop.stopped:
            self._finish, self.complete = "stop", True
        if self.complete:
            text, thought = text + self._flush(), thought + self._flush_thought()
        return ChatPiece(self._shown(text), thought)

    def end(self) -> ChatPiece:
        """The reply says that it is whole; returns what was still held back."""
        self.complete = True
        return ChatPiece(self._shown(self._flush()), self._flush_thought())

    def _flaw(self) -> CloudProtocolError | None:
        """Why a complete reply is no answer, or None."""
        if self.remark and self._finish is None and self.shown:
            return CloudProtocolError(f"the answer broke off: {one_line(self.remark)}")
        if self._has_words:
            return None
        if self._refused or self._finish == "content_filter":
            return CloudProtocolError("the answer was withheld (content_filter)")
        if self._called_tools:
            return CloudProtocolError("called tools instead of answering; none were offered")
        if self._thinking:
            return NoAnswerError(only_thought(self._finish or "stop"))
        if self.remark:
            return CloudProtocolError(f"the answer is empty: {one_line(self.remark)}")
        return CloudProtocolError("the answer is empty")

    def result(self, asked_model: str) -> CloudResult:
        """How it ended, without the text. Raises CloudProtocolError if a complete reply is no answer."""
        flaw = self._flaw()
        if flaw is not None:
            raise flaw
        finish = "refusal" if self._refused else self._finish or "stop"
        self._flush_thought()
        thinking = "".join(self._thinking)
        model = self._model or asked_model or self._asked_model
        return CloudResult("", thinking or None, self._tidy(model), self._tidy(finish), self._usage)

    def cancelled(self) -> CloudResult:
        """How it ended if its reader gave it up."""
        return CloudResult("", None, self._tidy(self._model or self._asked_model), "cancelled", None)

    def _new(self, part: Part, before: list[str], said: str) -> str:
        """What of a text was not said before: a message may say it all again."""
        if part.is_message and before and said:
            so_far = "".join(before)
            before[:] = [so_far]
            if said.startswith(so_far):
                said = said[len(so_far) :]
            elif not self._only_messages:
                return ""
        if said:
            before.append(said)
        return said

    def _shown(self, text: str) -> str:
        self.shown |= bool(text)
        self._has_words |= bool(_VISIBLE.search(text))
        return text

    def _flush(self) -> str:
        rest = self._stop.flush() if not self._stop.stopped else ""
        return self._pieces.push(rest + self._halves.flush()) + self._pieces.flush()

    def _flush_thought(self) -> str:
        rest = self._thoughts.push(self._thought_halves.flush()) + self._thoughts.flush()
        if rest:
            self._thinking.append(rest)
        return rest

    def _tidy(self, name: str) -> str:
        return self._redactor.clean(fix_surrogates(name))


class _Halves:
    """Makes text that can be encoded: a pair of surrogates may come in two parts."""

    def __init__(self) -> None:
        self._half = ""

    def push(self, text: str) -> str:
        text, self._half = self._half + text, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return fix_surrogates(text)

    def flush(self) -> str:
        half, self._half = self._half, ""
        return fix_surrogates(half)
