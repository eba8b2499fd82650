"""A local chat model: messages in, tokens out. Ties tokenizer, chat template and engine together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_reasoner.chat.messages import message_text
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.contract.template.render import ChatTemplate, Message
from edge_reasoner.engine.generate import Engine, TokenStream, never_cancelled
from edge_reasoner.engine.tokens import TextTokenizer


class LocalModel:
    """One model on this device. Not thread-safe: callers take turns."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None,
        *,
        name: str,
        bos_token_id: int | None,
    ) -> None:
        """`template` None: a base model, which continues the raw prompt after `bos_token_id` (if any)."""
        self.name = name
        self.tokenizer = tokenizer
        self._engine = engine
        self._template = template
        self._bos = [] if bos_token_id is None else [bos_token_id]

    @property
    def context_tokens(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return self._engine.context_tokens

    @property
    def has_template(self) -> bool:
        """Whether the model was made for chats."""
        return self._template is not None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, ready to be answered. Raises InputError, TemplateError."""
        if self._template is None:
            return self.raw_ids("\n".join(message_text(message) for message in messages))
        return self.tokenizer.encode(self._template.render(messages))

    def raw_ids(self, text: str) -> list[int]:
        """Token ids of a text to be continued as it is."""
        return [*self._bos, *self.tokenizer.encode(text)]

    def check_fits(self, prompt_tokens: int, context_tokens: int | None = None) -> int:
        """See `Engine.check_fits`."""
        return self._engine.check_fits(prompt_tokens, context_tokens)

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cancelled: Callable[[], bool] = never_cancelled,
        context_tokens: int | None = None,
    ) -> TokenStream:
        """See `Engine.generate`."""
        return self._engine.generate(prompt_ids, params, cancelled=cancelled, context_tokens=context_tokens)

    def close(self) -> None:
        """Releases the session."""
        self._engine.close()
