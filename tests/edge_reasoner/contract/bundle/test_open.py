"""From a bundle directory to answers: real files, a real graph, the reference cloud and both clients."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from support import tiny_bundle
from support.tiny_graphs import VOCAB, reference_logits, weights
from tokenizers import Tokenizer, decoders, models

from edge_reasoner import InferenceClient, Reasoner
from edge_reasoner.errors import BundleError, EdgeReasonerError, InputError, TemplateError
from edge_reasoner.server.reference import ReferenceModel, serving

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}a:"


def _tokenizer_json() -> bytes:
    characters = "".join(map(chr, range(32, 32 + VOCAB - 3)))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str().encode()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A tiny bundle with tokenizers, a config and a chat template."""
    logits = reference_logits(weights(), list(tiny_bundle.TOKENS))
    root = tiny_bundle.write_bundle(tmp_path / "bundle", tiny_bundle.decoder_golden(logits, 1.0))
    tokenizer = _tokenizer_json()
    tiny_bundle.add_files(
        root,
        {
            "tokenizer/reasoner/tokenizer.json": tokenizer,
            "tokenizer/reasoner/tokenizer_config.json": b'{"bos_token":"<s>","eos_token":"</s>"}',
            "tokenizer/reasoner/chat_template.jinja": TEMPLATE.encode(),
            "tokenizer/preprocessor/tokenizer.json": tokenizer,
        },
    )
    return root


def test_open_ask_and_stream(bundle: Path, tmp_path: Path) -> None:
    """The opened bundle answers, deterministically, streamed and whole, with one self-test for both."""
    with Reasoner.open(bundle, threads=1, cache_dir=tmp_path / "cache", mode="local") as reasoner:
        answer = reasoner.ask("abc", max_tokens=8)
        assert (answer.source, answer.model, answer.usage.completion_tokens) == ("local", "tiny", 8)
        assert answer.usage.prompt_tokens == len("u:abc") + 1 + len("a:")
        assert "".join(reasoner.stream("abc", max_tokens=8)) == answer.text
        assert reasoner.activation is not None and answer.timings.preprocess_ms > 0


def test_reference_cloud_and_clients(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bundle as a cloud, as a directory and over HTTP: InferenceClient gets the same greedy text."""
    monkeypatch.setenv("EDGE_REASONER_CACHE", str(tmp_path / "cache"))
    parameters = {"max_tokens": 8, "temperature": 0.0}
    with InferenceClient(endpoint=bundle) as client:
        local = client.infer(prompt="abc", parameters=parameters)
        window = client.infer(prompt="abc", parameters={"attention_window": 12})
        assert window.usage.prompt_tokens + window.usage.completion_tokens == 12
        assert window.choices[0].finish_reason == "context"
    with InferenceClient(model_name=str(bundle)) as client:
        assert client.infer("abc", parameters).choices[0].text == local.choices[0].text
    model = ReferenceModel.open(bundle, threads=1, cache_dir=tmp_path / "cache")
    with serving(model) as url, InferenceClient(None, "tiny", url) as client:
        assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "tiny"
        remote = client.infer(prompt="abc", parameters=parameters)
        assert (remote.choices[0].text, remote.source) == (local.choices[0].text, "cloud")
        with Reasoner.open(bundle, url, threads=1, cache_dir=tmp_path / "cache", mode="cloud") as reasoner:
            answer = reasoner.ask("abc", max_tokens=8)
            assert (answer.text, answer.source) == (local.choices[0].text, "cloud")


@pytest.mark.parametrize(
    ("relative", "data", "error"),
    [
        ("tokenizer.json", b'{"version": "1.0"}', BundleError),
        ("tokenizer_config.json", b'{"bos": "<s>"}', BundleError),
        ("chat_template.jinja", b"{% for %}", TemplateError),
        ("chat_template.jinja", b"\xff", TemplateError),
        ("chat_template.jinja", b"{{ 'a' * 10**9 }}", TemplateError),
    ],
)
def test_forged_tokenizer_files(
    bundle: Path, tmp_path: Path, relative: str, data: bytes, error: type
) -> None:
    """Well-listed but malformed tokenizer files are refused in one line, at once or at the first prompt."""
    tiny_bundle.add_files(bundle, {f"tokenizer/reasoner/{relative}": data})
    with (
        pytest.raises(error) as caught,
        Reasoner.open(bundle, threads=1, cache_dir=tmp_path / "c") as reasoner,
    ):
        reasoner.ask("abc")
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2


@pytest.mark.parametrize(
    "options", [{"mode": "x"}, {"threads": 0}, {"context_tokens": -1}, {"cloud": "nope"}]
)
def test_bad_options_are_refused_first(options: dict, tmp_path: Path) -> None:
    """Illegal options are refused before the bundle is even looked at."""
    with pytest.raises(InputError, match=next(iter(options))):
        Reasoner.open(tmp_path / "missing", **options)
    with pytest.raises(EdgeReasonerError, match="missing"):
        Reasoner.open(tmp_path / "missing")


def test_answer_json_keys(bundle: Path, tmp_path: Path) -> None:
    """A real answer is JSON with finite numbers."""
    with Reasoner.open(bundle, threads=1, cache_dir=tmp_path / "cache") as reasoner:
        text = json.dumps(reasoner.ask("What is 2 + 2?", max_tokens=4).to_dict(), allow_nan=False)
    assert json.loads(text)["decision"]["calibrated"] is False
