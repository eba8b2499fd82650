"""Fuzzers of tokenizers: tokenizer.json (device and exporter), its side files, SentencePiece models."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.fuzz import composed
from hostile.fuzz.mutate import FEW, MANY, check
from support.tiny_tokenizers import byte_level, sentencepiece
from support.vocab_gguf import write_vocab_gguf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edge_export.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from edge_export.checkpoint.tokenizer import limit_vocabulary, load_tokenizer_files
from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_reasoner.contract.bundle.tokenizer_files import TokenizerConfig, parse_tokenizer_config
from edge_reasoner.contract.bundle.tokenizer_patterns import LLAMA3
from edge_reasoner.engine.tokens import IncrementalDecoder, TextTokenizer
from edge_reasoner.errors import CheckpointError

TEXT = "Hello, <s>größe\n你好 🙂\U000fabcd</s>"
GOLDEN = Path(__file__).resolve().parents[2] / "edge_export" / "checkpoint" / "golden" / "sentencepiece.json"
CONFIG = {
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "pad_token": None,
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}, "400": {"content": "<tool>"}},
    "chat_template": "{{ messages }}",
}
WORDS = (
    *(b'"<no>"', b'"<unk>"', b'"added_tokens"', b'"unk_token"', b'"BPE"', b'"Unigram"', b'"WordPiece"'),
    *(b'"WordLevel"', b'"ByteLevel"', b'"Sequence"', b'"ByteFallback"', b'"Metaspace"', b'"Regex"'),
    *(b'"Precompiled"', b'"Replace"', b'"Prepend"', b'"NFKD"', b'"Strip"', b'"Digits"', b'"Punctuation"'),
    *(b'"TemplateProcessing"', b'"SpecialToken"', b'"Split"', b'"Isolated"', b'"BertNormalizer"', b'" {2,}"'),
    *(b'"max_input_chars_per_word"', b'"continuing_subword_prefix"', b'"byte_fallback"', b'"unk_id"'),
    *(b'"(a+)+$"', b'"content"', b'"normalized"', b'"special"', b"2097152"),
)


def fuzz_tokenizer(data: bytes) -> None:
    """As the device opens a bundle's tokenizer, encodes, decodes and streams."""
    tokenizer = TextTokenizer.from_files(data, TokenizerConfig(), where="tokenizer.json")
    ids = tokenizer.encode(TEXT)
    assert isinstance(tokenizer.decode(ids), str)
    decoder = IncrementalDecoder(tokenizer)
    for token_id in ids:
        decoder.push(token_id)
    decoder.flush()


def fuzz_composed_tokenizer(data: bytes) -> None:
    """As the device opens one of odd but well-formed parts."""
    model = json.loads(byte_level().to_str())["model"]
    fuzz_tokenizer(composed.tokenizer(data, model["vocab"], model["merges"]))


def fuzz_composed_checkpoint(data: bytes) -> None:
    """As the exporter takes one, and the device what comes of it."""
    model = json.loads(byte_level().to_str())["model"]
    _exported(tokenizer__json=composed.tokenizer(data, model["vocab"], model["merges"]))


def fuzz_tokenizer_config(data: bytes) -> None:
    """The bundle's strict side file."""
    parse_tokenizer_config(data, "tokenizer_config.json").special_tokens()


def _exported(**files: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name.replace("__", ".")).write_bytes(data)
        loaded = load_tokenizer_files(Path(folder))
    for made in (loaded, _cut(loaded)):
        TextTokenizer.from_files(made.tokenizer_json, TokenizerConfig(), where="exported").encode(TEXT)


def _cut(files: TokenizerFiles) -> TokenizerFiles:
    """Without its last token, where it can do without."""
    try:
        return limit_vocabulary(files, files.vocab_size - 1)
    except CheckpointError:
        return files


def fuzz_exported_tokenizer(data: bytes) -> None:
    """As the exporter takes a checkpoint's tokenizer.json; what it makes, the device can open."""
    _exported(tokenizer__json=data)


def fuzz_side_files(data: bytes) -> None:
    """Any side file of a checkpoint's tokenizer."""
    names = ("tokenizer_config__json", "special_tokens_map__json", "added_tokens__json")
    for name in names[:2] if b"_token" in data else names[2:]:
        _exported(tokenizer__json=byte_level().to_str().encode(), **{name: data})


def fuzz_sentencepiece(data: bytes) -> None:
    """A checkpoint's tokenizer.model."""
    _exported(tokenizer__model=data)


def fuzz_gguf_tokenizer(data: bytes) -> None:
    """The tokenizer inside a GGUF file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data)
        tokenizer_from_gguf(path)


def _other_models() -> list[bytes]:
    """An encoder's WordPiece and a Unigram model, with every kind of part around them."""
    wordpiece = Tokenizer(
        models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "h": 3, "##e": 4}, unk_token="[UNK]")
    )
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)]
    )
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("e", -2.5), ("llo", -3.0)], 0, False))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True), pre_tokenizers.Metaspace()]
    )
    unigram.decoder = decoders.Metaspace()
    split = byte_level()
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return [made.to_str().encode() for made in (wordpiece, unigram, split)]


def _gguf(folder: Path) -> list[bytes]:
    letters = ["<s>", "</s>", "<unk>", "a", "b", "ab", "▁", "▁a", "<tool>"]
    types = [3, 3, 2, 1, 1, 1, 1, 1, 4]
    both = {"ggml.tokens": letters, "ggml.token_type": types, "chat_template": "{{ messages }}"}
    scored = {**both, "ggml.model": "llama", "ggml.scores": [0.0] * 3 + [-1.0, -2.0, -3.0, -4.0, -5.0, 0.0]}
    merged = {**both, "ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.merges": ["a b"]}
    return [
        write_vocab_gguf(folder / f"{i}.gguf", metadata).read_bytes()
        for i, metadata in enumerate((scored, merged))
    ]


def _seeds(folder: Path) -> dict[Callable[[bytes], None], list[bytes]]:
    plain = [byte_level().to_str().encode(), sentencepiece(strip=True).to_str().encode()]
    with_added = json.loads(plain[0])
    with_added["added_tokens"].append({**with_added["added_tokens"][0], "id": 500, "content": "<x>"})
    configs = [b'{"add_bos":true,"bos_token":"<s>"}', b"{}"]
    model = base64.b64decode(json.loads(GOLDEN.read_text(encoding="ascii"))["model_base64"])
    return {
        fuzz_tokenizer: [*plain, *_other_models()],
        fuzz_tokenizer_config: configs,
        fuzz_exported_tokenizer: [*plain, *_other_models(), json.dumps(with_added).encode()],
        fuzz_side_files: [json.dumps(CONFIG).encode(), b'{"<s>": 0}'],
        fuzz_sentencepiece: [model],
        fuzz_gguf_tokenizer: _gguf(folder),
    }


TARGETS = (
    fuzz_tokenizer,
    fuzz_tokenizer_config,
    fuzz_exported_tokenizer,
    fuzz_side_files,
    fuzz_sentencepiece,
    fuzz_gguf_tokenizer,
)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
@pytest.mark.parametrize("count", [FEW // 3, pytest.param(MANY, marks=pytest.mark.slow)])
def test_fuzz(target: Callable[[bytes], None], count: int, tmp_path: Path) -> None:
    """Only errors of the project's tree, no hang, no growth."""
    check(target, _seeds(tmp_path)[target], count, words=WORDS)


@pytest.mark.parametrize("target", [fuzz_composed_tokenizer, fuzz_composed_checkpoint])
@pytest.mark.parametrize("count", [FEW // 3, pytest.param(MANY, marks=pytest.mark.slow)])
def test_fuzz_composed(target: Callable[[bytes], None], count: int) -> None:
    """The same of tokenizers that are sound in form."""
    check(target, [], count, damaged=(b"%d" % i for i in range(count)))
