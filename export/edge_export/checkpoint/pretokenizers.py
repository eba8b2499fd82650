"""Which pre-tokenizer a GGUF's `tokenizer.ggml.pre` stands for.

A byte-level BPE splits the text by one or more regular expressions before it merges. GGUF stores only a name;
the expressions are those of the models' own tokenizer.json files (written for Oniguruma, which `tokenizers`
uses), the names and the groups are llama.cpp's. Where llama.cpp had to approximate an expression (Tekken and
GPT-4o: its engine lacked the letter-case classes), the model's own is used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from edge_reasoner.contract.bundle.tokenizer_patterns import (
    DEEPSEEK_V3_WORDS,
    GPT2,
    GPT4O,
    LLAMA3,
    QWEN2,
    TEKKEN,
)

_DEEPSEEK_V3 = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK_V3_WORDS)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE splits text, and what its family implies.

    `patterns` are applied one after the other to the pieces that the one before left; both matches and gaps
    are pieces. `ignore_merges`: a piece that is itself a token is not merged up from bytes.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def to_json(self) -> dict[str, Any]:
        """The `pre_tokenizer` object of a tokenizer.json."""
        splits: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}


def _table() -> Mapping[str, PreTokenizer]:
    groups: list[tuple[str, PreTokenizer]] = [
        ("default", PreTokenizer(_DEFAULT)),
        (
            "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
            PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True),
        ),
        ("smaug-bpe dbrx", PreTokenizer((LLAMA3,))),
        ("tekken", PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True)),
        ("gpt-4o llama4 kanana2", PreTokenizer((GPT4O,))),
        ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open", PreTokenizer((QWEN2,))),
        (
            "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
            PreTokenizer((r"\p{N}", GPT2)),
        ),
        (
            "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat exaone4 mellum a.x-4.0",
            PreTokenizer((GPT2,)),
        ),
        ("deepseek-v3 hunyuan-dense joyai-llm", PreTokenizer(_DEEPSEEK_V3)),
        ("deepseek-coder", PreTokenizer(_DEEPSEEK_CODER)),
    ]
    return MappingProxyType({name: rule for names, rule in groups for name in names.split()})


#: `tokenizer.ggml.pre` → rule
PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = _table()
