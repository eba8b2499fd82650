"""The local chat model: messages in, tokens out. Ties tokenizer, chat template and engine together."""

from __future__ import annotations

from collections.abc import Sequence

from edge_reasoner.chat.messages import message_text
from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.contract.template.render import ChatTemplate, Message
from edge_reasoner.engine.loop import Engine, TokenStream
from edge_reasoner.engine.tokens import TextTokenizer
from edge_reasoner.errors import ContextOverflowError, InputError, TemplateError

#: stands for what the user will say; templates may trim it, so it has no blanks at its ends
_NEXT_WORDS = "[the next words]"


class LocalModel:
    """One model on this device: a `ChatModel`. Thread-safe."""

    def __init__(
        self, engine: Engine, template: ChatTemplate | TemplateError | None, *, bos_token_id: int | None
    ) -> None:
        """`template` None: a base model, which continues the raw prompt after `bos_token_id` (if any); an
        error: why chats cannot be read, raised by each of them."""
        self._engine = engine
        self._template = template
        self._bos = [] if bos_token_id is None else [bos_token_id]

    @property
    def name(self) -> str:
        """See `ChatModel`."""
        return self._engine.name

    @property
    def context_tokens(self) -> int:
        """See `ChatModel`."""
        return self._engine.context_tokens

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, ready to be answered. Raises InputError, TemplateError."""
        if isinstance(self._template, TemplateError):
            raise TemplateError(str(self._template)) from self._template
        if self._template is None:
            return self.raw_ids("\n".join(message_text(message) for message in messages))
        return self._encode(_rendered(self._template, messages))

    def raw_ids(self, text: str) -> list[int]:
        """Token ids of a text to be continued as it is. Raises InputError."""
        return [*self._bos, *self._encode(text)]

    def _encode(self, text: str) -> list[int]:
        """Token ids. A text that cannot fit the context however it is cut is refused unread."""
        limit = self.context_tokens
        if len(text) > limit and len(text) > (most := self.tokenizer.most_chars(limit)):
            raise ContextOverflowError(
                f"the prompt has {len(text)} characters; at most {most} fit a context of {limit} tokens"
            )
        return self.tokenizer.encode(text)

    def request_ids(self, request: ChatRequest) -> list[int]:
        """Token ids of what a request asks. Raises InputError, TemplateError."""
        return self.prompt_ids(request.messages) if request.text is None else self.raw_ids(request.text)

    def submit(self, request: ChatRequest) -> TokenStream:
        """See `ChatModel`. Raises InputError, TemplateError, ContextOverflowError, OverloadedError at
        once."""
        return self.submit_ids(self.request_ids(request), request)

    def submit_ids(self, prompt_ids: Sequence[int], request: ChatRequest) -> TokenStream:
        """Like `submit`, for a caller that has the request's token ids already."""
        return self._engine.submit(
            prompt_ids,
            request.params,
            context_tokens=request.context_tokens,
            hidden=request.hidden,
            chat=request.text is None,
        )

    def prefill_ahead(self, messages: Sequence[Message]) -> None:
        """Feeds what the next turn of a chat will begin with, while nothing else is asked; never waits.

        A chat that cannot be read is left alone: its next turn says why.
        """
        try:
            known = self._next_turn_ids(messages)
        except InputError:
            return
        self._engine.prefill_ahead(known)

    def _next_turn_ids(self, messages: Sequence[Message]) -> list[int]:
        """All that comes before the next user's words, whatever these are."""
        if self._template is None:
            return self.prompt_ids(messages)
        if isinstance(self._template, TemplateError):
            return []
        turn: Message = {"role": "user", "content": _NEXT_WORDS}
        known, _, _ = _rendered(self._template, [*messages, turn]).rpartition(_NEXT_WORDS)
        return self._encode(known) if known else []

    def close(self) -> None:
        """Ends the engine and releases the model."""
        self._engine.close()


def _rendered(template: ChatTemplate, messages: Sequence[Message]) -> str:
    # templates of text models would write a list of parts out as Python does
    return template.render([{**message, "content": message_text(message)} for message in messages])
