"""The scheduler on onnxruntime: shared weights, caches of their own, answers bit for bit the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from support.answering_bundle import write_answering_bundle
from support.tiny_graphs import VOCAB, decoder_model, decoder_spec, save, weights
from support.watched_model import WatchedModel, engine_of

from edge_reasoner.backends import load_backend
from edge_reasoner.backends.base import DecoderModel
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.generate import Generation, HiddenStates
from edge_reasoner.engine.loop import Engine, TokenStream
from edge_reasoner.reasoner import Reasoner

RANDOM = np.random.default_rng(17)
SHARED = RANDOM.integers(0, VOCAB, 300).tolist()
GREEDY = SamplingParams(max_tokens=24)
DRAWN = SamplingParams(max_tokens=24, temperature=1.2, top_p=0.9, seed=5, repetition_penalty=1.1)
#: name: accuracy level of the int4 products (4: int8 arithmetic), threads
KINDS = {"fp32": (0, 1), "int8": (4, 1), "int8, two threads": (4, 2)}


@pytest.fixture(scope="module", params=list(KINDS))
def open_model(request: pytest.FixtureRequest, tmp_path_factory) -> Callable[[], DecoderModel]:
    """Opens the tiny decoder anew."""
    level, threads = KINDS[request.param]
    path: Path = save(decoder_model(weights(), level), tmp_path_factory.mktemp("graph") / "tiny.onnx")
    backend = load_backend("onnxruntime")
    return lambda: backend.open_decoder(
        path, decoder_spec(), provider="CPUExecutionProvider", session_options={}, threads=threads
    )


@pytest.fixture
def cold(open_model) -> Callable[..., tuple[list[tuple], Generation]]:
    """The answer of a model that has not been asked before."""

    def ask(prompt: list[int], params: SamplingParams, *, hidden: bool = False):
        with closing(engine_of(open_model())) as engine:
            return _read(engine.submit(prompt, params, hidden=hidden))

    return ask


@pytest.fixture
def warm(open_model) -> Iterator[Engine]:
    """An engine that has answered a prompt that begins with `SHARED`."""
    with closing(engine_of(open_model())) as engine:
        engine.submit([*SHARED, 3, 4, 5], DRAWN, hidden=True).result()
        yield engine


def _read(stream: TokenStream) -> tuple[list[tuple], Generation]:
    pieces = [(p.token_id, p.logprob, p.margin, p.entropy) for p in stream]
    return pieces, stream.result()


def _bits(hidden: HiddenStates | None) -> list[bytes]:
    assert hidden is not None and hidden.answer_last is not None and hidden.answer_mean is not None
    states = (hidden.prompt_last, hidden.prompt_mean, hidden.answer_last, hidden.answer_mean)
    return [state.tobytes() for state in states]


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("tail", [[], [7], RANDOM.integers(0, VOCAB, 90).tolist()], ids=len)
def test_warm_is_cold(cold, warm, params: SamplingParams, tail: list[int]) -> None:
    """A reused prefix changes no bit: tokens, log-probabilities, margins, entropies, hidden states."""
    prompt = [*SHARED, *tail]
    expected, whole = cold(prompt, params, hidden=True)
    got, done = _read(warm.submit(prompt, params, hidden=True))
    assert (whole.usage.cached_tokens, done.usage.cached_tokens) == (0, 256)
    assert got == expected and done.text == whole.text
    assert _bits(done.hidden) == _bits(whole.hidden)
    again, done = _read(warm.submit(prompt, params))
    assert again == expected and done.usage.cached_tokens >= 256


def test_a_conversation_is_cold_at_every_turn(cold, warm) -> None:
    """Each turn's prompt holds the answers before, which were decoded token by token: they are fed again."""
    prompt = [*SHARED[:50]]
    for turn in range(5):
        expected, _ = cold(prompt, DRAWN)
        got, done = _read(warm.submit(prompt, DRAWN))
        assert got == expected and done.usage.cached_tokens >= (32 if turn else 0)
        prompt = [*prompt, *done.token_ids, *RANDOM.integers(0, VOCAB, 20).tolist()]


def test_interleaved_and_forked_is_cold(cold, open_model) -> None:
    """Answers that take turns on one model, some forked from one under way, are the cold ones."""
    asked = [
        ([*SHARED, 1, 2], DRAWN),
        ([*SHARED, 9], GREEDY),
        (SHARED[:40], DRAWN),
        ([*SHARED[:130], 5], DRAWN),
    ]
    expected = [cold(prompt, params)[0] for prompt, params in asked]
    model = WatchedModel(open_model())
    with closing(engine_of(model)) as engine:
        with model.held():
            streams = [engine.submit(*asked[0])]
            model.arrive()
            model.step(6)
            streams += [engine.submit(prompt, params) for prompt, params in asked[1:]]
        answers = [_read(stream) for stream in streams]
    assert [pieces for pieces, _ in answers] == expected
    assert [done.usage.cached_tokens for _, done in answers] == [0, 256, 32, 128]
    assert model.caches == 1, "the others are forks"
    owners = [id(cache) for cache, _ in model.fed]
    changes = sum(one != other for one, other in itertools.pairwise(owners))
    assert changes > 60, "they took turns"


def test_a_fork_is_bit_identical(open_model) -> None:
    """Two caches of one model, forked at a shared prefix: the logits of either are those of one alone."""
    model = open_model()

    def logits(cache, tokens: list[int]) -> bytes:
        return model.extend(cache, np.array(tokens, np.int64)).logits.tobytes()

    def fed(tails: list[list[int]]) -> list[bytes]:
        cache = model.new_cache()
        logits(cache, SHARED)
        return [logits(cache, tail) for tail in tails]

    one, two = [[1], [2], [3, 4]], [[8, 9], [5], [6]]
    expected = fed(one), fed(two)
    origin = model.new_cache()
    logits(origin, SHARED)
    fork = origin.fork()
    got: tuple[list[bytes], list[bytes]] = [], []
    for first, second in zip(one, two, strict=True):
        got[0].append(logits(origin, first))
        got[1].append(logits(fork, second))
    assert got == expected
    model.close()


@pytest.mark.parametrize("exact", [True, False], ids=["fp32", "int8"])
def test_the_reasoner_judges_warm_as_cold(tmp_path: Path, exact: bool) -> None:
    """Text, confidence and the whole decision of a question do not depend on what was asked before."""
    bundle = write_answering_bundle(tmp_path / "bundle", exact=exact)
    system = {"role": "system", "content": "Be brief, be kind, be right, and say so if you do not know it."}

    def chat(text: str) -> list[dict]:
        return [system, {"role": "user", "content": text}]

    def opened() -> Reasoner:
        return Reasoner.open(bundle, threads=1, cache_dir=tmp_path / "cache")

    questions = ["What is the capital of France?", "What is the capital of Peru?", "Who wrote it?"]
    cold = []
    for question in questions:
        with opened() as reasoner:
            cold.append(reasoner.ask(chat(question), max_tokens=20))
    with opened() as reasoner:
        warm = [reasoner.ask(chat(question), max_tokens=20) for question in (*questions, *questions)]
    assert all(answer.usage.cached_tokens == 0 for answer in cold)
    assert all(answer.usage.cached_tokens >= 64 for answer in warm[1:])
    for one, other in zip([*cold, *cold], warm, strict=True):
        assert (one.text, one.confidence, one.decision) == (other.text, other.confidence, other.decision)
        assert one.confidence is not None
