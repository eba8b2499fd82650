"""The main job on a real model: export, answer locally, hand over to a cloud, go on without it."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import openai
import pytest

from edge_reasoner import InferenceClient, Reasoner
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.server.reference import ReferenceModel, serving

pytestmark = pytest.mark.real_model

EASY = "What is the capital of France?"
HARD = (
    "A tank holds 240 litres. A pump fills 18 litres a minute while a leak loses 3 litres a minute. After 7 "
    "minutes a second pump adds 9 litres a minute. How many minutes does it take to fill it? Show each step."
)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """One activation cache for the module."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(smollm2_bundle, cache_dir):
    """A cloud over real HTTP on loopback."""
    model = ReferenceModel.open(smollm2_bundle, threads=2, cache_dir=cache_dir, name="reference")
    with serving(model) as url:
        yield url


def test_the_default_recipe_is_small_and_close(smollm2_bundle):
    """At most 115 MB for the reasoner; on held-out text it mostly chooses as the original does."""
    reasoner = open_bundle(smollm2_bundle).component("reasoner")
    assert sum(entry.size_bytes for entry in reasoner.files) <= 115e6
    assert reasoner.quality["top1_agreement"] >= 0.86
    assert reasoner.quality["perplexity_ratio"] <= 1.065


def test_the_preprocessor_is_small_and_close(smollm2_bundle, minilm_dir):
    """MiniLM as int8: 74 % fewer bytes of weights, mean cosine at least 0.99."""
    encoder = open_bundle(smollm2_bundle).component("preprocessor")
    weights = sum(entry.size_bytes for entry in encoder.files if entry.path.startswith("graphs/"))
    assert weights <= 0.26 * (minilm_dir / "model.safetensors").stat().st_size
    assert encoder.quality["mean_cosine"] >= 0.99


def test_ask_prints_the_contract(smollm2_bundle, cache_dir):
    """`edge-reasoner ask --json` answers an easy question on the device, with every field of the contract."""
    command = [sys.executable, "-m", "edge_reasoner.cli.main", "ask", str(smollm2_bundle), EASY]
    run = subprocess.run(
        [*command, "--mode", "offline", "--max-tokens", "24", "--temperature", "0", "--json"],
        capture_output=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "EDGE_REASONER_CACHE": str(cache_dir)},
        check=True,
    )
    answer = json.loads(run.stdout)
    assert "Paris" in answer["text"]
    assert answer["source"] in ("local", "local-fast")
    assert set(answer) >= {"text", "source", "model", "confidence", "decision", "usage", "timings", "cost"}
    assert set(answer["decision"]) >= {"route", "score", "threshold", "reasons", "features"}


def test_hard_questions_go_to_the_cloud_and_come_back_without_it(smollm2_bundle, reference, cache_dir):
    """Easy: local. Hard: cloud. Hard without an endpoint: the local answer, marked degraded."""
    with Reasoner.open(smollm2_bundle, cloud=reference, cache_dir=cache_dir) as reasoner:
        assert reasoner.ask(EASY, max_tokens=24).source == "local"
        answer = reasoner.ask(HARD, max_tokens=24)
        assert answer.source == "cloud"
        assert answer.text and answer.decision.reasons
    with Reasoner.open(smollm2_bundle, cloud="http://127.0.0.1:9/v1", cache_dir=cache_dir) as reasoner:
        answer = reasoner.ask(HARD, max_tokens=24)
        assert answer.source == "degraded"
        assert answer.text and answer.note


def test_other_peoples_clients(smollm2_bundle, reference, cache_dir):
    """The `openai` package and the documents' `InferenceClient` call get the same greedy answer."""
    client = openai.OpenAI(base_url=reference, api_key="unused")
    theirs = client.chat.completions.create(
        model="reference", messages=[{"role": "user", "content": EASY}], temperature=0, max_tokens=24
    )
    ours = InferenceClient(model_name="reference", endpoint=reference).infer(
        prompt=EASY, parameters={"temperature": 0, "max_tokens": 24}
    )
    assert ours.choices[0].text == theirs.choices[0].message.content
    assert "Paris" in ours.choices[0].text


def test_session_keeps_the_cache(smollm2_bundle, cache_dir):
    """A second turn reuses the first turn's KV cache."""
    with (
        Reasoner.open(smollm2_bundle, mode="offline", cache_dir=cache_dir) as reasoner,
        reasoner.session() as chat,
    ):
        chat.ask("My name is Ada.", max_tokens=16)
        answer = chat.ask("What is my name?", max_tokens=16)
        assert answer.usage.cached_tokens > 10


def test_what_was_asked_before_changes_no_answer(smollm2_bundle, cache_dir):
    """Text, confidence and decision are the same, bit for bit, with a warm prefix and without."""
    system = {
        "role": "system",
        "content": "You are a careful assistant that answers in one short sentence. " * 4,
    }
    chats = [[system, {"role": "user", "content": text}] for text in (EASY, "What is the capital of Peru?")]

    def opened():
        return Reasoner.open(smollm2_bundle, mode="local", threads=2, cache_dir=cache_dir)

    cold = []
    for chat in chats:
        with opened() as reasoner:
            cold.append(reasoner.ask(chat, max_tokens=24))
    with opened() as reasoner:
        warm = [reasoner.ask(chat, max_tokens=24) for chat in (*chats, *chats)]
    assert [answer.usage.cached_tokens > 0 for answer in (*cold, *warm)] == [False] * 3 + [True] * 3
    for one, other in zip([*cold, *cold], warm, strict=True):
        assert (one.text, one.confidence, one.decision) == (other.text, other.confidence, other.decision)


def test_the_same_input_gives_the_same_bytes(smollm2_gguf, tmp_path):
    """Two exports of a real model are equal to the byte (the recipe without calibration, for speed)."""
    from edge_export.options import ExportOptions
    from edge_export.pipeline import export

    digests = []
    for name in ("a", "b"):
        options = ExportOptions(recipe="int4", quantizer="rtn", threads=2)
        export(str(smollm2_gguf), "raspberry-pi-5", tmp_path / name, options)
        digests.append(msgspec.to_builtins(open_bundle(tmp_path / name).manifest))
    assert digests[0] == digests[1]
