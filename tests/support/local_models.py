"""A local chat model over the fake decoder that answers from a table."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from support.tiny_tokenizers import byte_level, wrap

from edge_reasoner.backends.fake import FakeDecoder
from edge_reasoner.contract.bundle.tokenizer_files import TokenizerConfig
from edge_reasoner.contract.template.render import ChatTemplate
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.engine.loop import Engine, EngineLimits

TEMPLATE = (
    "{% for m in messages %}<|im_end|>{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>assistant:{% endif %}"
)


def scripted_model(
    answers: Mapping[str, str],
    *,
    context_tokens: int = 512,
    sure: bool = True,
    template: str | None = TEMPLATE,
    limits: EngineLimits | None = None,
) -> LocalModel:
    """Answers the last user message by the first key in it; anything else by silence.

    `sure=False` gives uniform logits: the text is then noise, and the statistics say so.
    """
    tokenizer = wrap(byte_level(), TokenizerConfig(bos_token="<s>", eos_token="</s>"))
    eos, turn = tokenizer.token_id("</s>"), tokenizer.token_id("<|im_end|>")
    assert eos is not None and turn is not None

    def script(tokens: Sequence[int]) -> int | None:
        if not sure:
            return None
        # what follows the last turn's opening is the answer so far; bytes of unfinished characters count too
        opening = len(tokens) - tokens[::-1].index(turn) if turn in tokens else len(tokens)
        said = max(0, len(tokens) - opening - len(tokenizer.encode("assistant:")))
        question = tokenizer.decode(tokens[:opening]).rpartition("user:")[2]
        wanted = next((answer for key, answer in answers.items() if key in question), "")
        rest = tokenizer.encode(wanted)[said:]
        return rest[0] if rest else eos

    ticks = itertools.count()
    decoder = FakeDecoder(tokenizer.vocab_size, context_tokens, script)
    engine = Engine(
        decoder,
        tokenizer,
        name="tiny",
        eos_token_ids=[eos],
        clock=lambda: next(ticks) * 1e-3,
        limits=limits,
    )
    chat = template and ChatTemplate(template, special_tokens={}, clock=time.monotonic, now=datetime.now)
    return LocalModel(engine, chat or None, bos_token_id=None)
