"""A tiny bundle that answers: `tiny_bundle` with a character tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import tiny_bundle
from support import tiny_graphs as tiny
from tokenizers import Tokenizer, decoders, models

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}a:"


def tokenizer() -> Tokenizer:
    """One token per printable ASCII character, after <unk>, <s> and </s>."""
    characters = "".join(map(chr, range(32, 32 + tiny.VOCAB - 3)))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(characters)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    built.decoder = decoders.Fuse()
    built.add_special_tokens(["<s>", "</s>"])
    return built


def write_answering_bundle(root: Path, *, exact: bool = False, wrong_golden: bool = False) -> Path:
    """Writes the bundle. `exact`: fp32 arithmetic only; `wrong_golden`: vectors that no kernel reproduces."""
    weights = tiny.weights()
    logits = tiny.reference_logits(weights, list(tiny_bundle.TOKENS))
    golden = tiny_bundle.decoder_golden(-logits if wrong_golden else logits, 1.0)
    options = {}
    if exact:
        options = {
            "variants": (tiny_bundle.variant("fp32"),),
            "models": {"fp32": tiny.decoder_model(weights, 0)},
        }
    tiny_bundle.write_bundle(root, golden, **options)
    json = tokenizer().to_str().encode()
    tiny_bundle.add_files(
        root,
        {
            "tokenizer/reasoner/tokenizer.json": json,
            "tokenizer/reasoner/tokenizer_config.json": b'{"bos_token":"<s>","eos_token":"</s>"}',
            "tokenizer/reasoner/chat_template.jinja": TEMPLATE.encode(),
            "tokenizer/preprocessor/tokenizer.json": json,
        },
    )
    return root


def reference_log_likelihood(token_ids: list[int], start: int) -> float:
    """By transformers: Σ log P(token | those before) over `token_ids[start:]`."""
    logits = tiny.reference_logits(tiny.weights(), token_ids).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(sum(log_p[i - 1, token_ids[i]] for i in range(start, len(token_ids))))
