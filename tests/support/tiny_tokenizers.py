"""Small tokenizers of the three kinds that decoders use, built by the `tokenizers` library itself."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edge_reasoner.contract.bundle.tokenizer_files import TokenizerConfig
from edge_reasoner.engine.tokens import TextTokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog, then the fox rests",
    "größe Straße über naïve café",
    "你好,世界。こんにちは 안녕하세요 😀👩‍👩‍👧 …",
    "def f(x):\n    return x * 2\n",
]


def byte_level() -> Tokenizer:
    """GPT-2 style: tokens are pieces of UTF-8 (SmolLM2, Qwen, Llama 3)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece(*, strip: bool) -> Tokenizer:
    """SentencePiece style with byte fallback; `strip` drops the leading space (Llama 2; Gemma does not)."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in [
        "▁",
        "▁▁",
        "▁the",
        "▁fox",
        "fox",
        "o",
        "x",
        "f",
        "h",
        "e",
        "t",
        ".",
        "\n",
        "ß",
        "你",
        "\ufffd",
    ]:
        vocabulary[token] = len(vocabulary)
    merges = [("f", "o"), ("fo", "x")]
    vocabulary["fo"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    prepend = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def wrap(tokenizer: Tokenizer, config: TokenizerConfig | None = None) -> TextTokenizer:
    """Through the same bytes that a bundle holds."""
    return TextTokenizer.from_files(
        tokenizer.to_str().encode(), config or TokenizerConfig(), where="tokenizer.json"
    )
