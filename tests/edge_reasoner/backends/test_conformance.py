"""What every backend promises, run over the whole backend table and the fake."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.sequences import OneSequence
from support.tiny_graphs import (
    CONTEXT,
    HIDDEN,
    VOCAB,
    decoder_model,
    decoder_spec,
    encoder_model,
    encoder_spec,
    save,
    weights,
)

from edge_reasoner.backends import BACKENDS, load_backend
from edge_reasoner.backends.base import DecoderModel, KVCache
from edge_reasoner.backends.fake import FakeDecoder
from edge_reasoner.errors import BackendError, BundleError, ContextOverflowError, InputError

TOKENS = np.random.default_rng(5).integers(0, VOCAB, 600)
OpenDecoder = Callable[[], DecoderModel]


@pytest.fixture(scope="module", params=[*BACKENDS, "fake"])
def open_decoder(request, tmp_path_factory) -> OpenDecoder:
    """Opens the tiny decoder."""
    if request.param == "fake":
        return lambda: FakeDecoder(
            VOCAB, CONTEXT, script=lambda tokens: (31 * tokens[-1] + len(tokens)) % VOCAB
        )
    backend = load_backend(request.param)
    path = save(decoder_model(weights()), tmp_path_factory.mktemp("graph") / "tiny.onnx")
    return lambda: backend.open_decoder(
        path, decoder_spec(), provider=backend.providers[-1], session_options={}, threads=2
    )


@pytest.fixture(scope="module")
def model(open_decoder):
    """One model for the whole file: caches keep the tests apart."""
    opened = open_decoder()
    yield opened
    opened.close()


@pytest.fixture
def decoder(model):
    """The model with a fresh cache."""
    sequence = OneSequence(model)
    yield sequence
    sequence.cache.close()


def close(a, b) -> bool:
    return bool(np.allclose(a, b, rtol=1e-4, atol=1e-4))


def continued(model: DecoderModel, cache: KVCache, tokens=TOKENS[300:308]) -> np.ndarray:
    """Logits of a short prefill and some steps on a cache, one row each."""
    rows = [model.extend(cache, tokens[:3], 3).logits.copy()]
    rows += [model.extend(cache, tokens[i : i + 1]).logits.copy() for i in range(3, len(tokens))]
    return np.concatenate(rows)


def test_shape_type_and_length(decoder):
    """Logits are float32 [num_logits, vocab]; the length counts what was fed."""
    logits = decoder.extend(TOKENS[:5], 3)
    assert (logits.shape, logits.dtype) == ((3, VOCAB), np.float32)
    assert (decoder.length_tokens, decoder.cache.context_tokens) == (5, CONTEXT)
    assert (decoder.model.context_tokens, decoder.model.vocab_size) == (CONTEXT, VOCAB)


def test_chunks_steps_and_one_call_agree(decoder):
    """600 tokens in one (internally chunked) call, in pieces and one by one give the same rows."""
    whole = decoder.extend(TOKENS, 600).copy()
    decoder.rewind(0)
    pieces = [decoder.extend(TOKENS[a:b], b - a).copy() for a, b in ((0, 7), (7, 8), (8, 560))]
    assert close(np.concatenate(pieces), whole[:560])
    for position in range(560, 600):
        assert close(decoder.extend(TOKENS[position : position + 1])[0], whole[position])


def test_one_row_is_the_last(decoder):
    """num_logits=1 over several chunks returns the last position only."""
    last = decoder.extend(TOKENS)[0].copy()
    decoder.rewind(0)
    assert close(decoder.extend(TOKENS, 2)[1], last)


def test_rewind_forgets(decoder):
    """After a rewind another continuation gives what a fresh cache gives."""
    decoder.extend(TOKENS[:50])
    decoder.rewind(20)
    again = decoder.extend(TOKENS[100:110], 10).copy()
    decoder.rewind(0)
    fresh = decoder.extend(np.concatenate([TOKENS[:20], TOKENS[100:110]]), 10)
    assert decoder.length_tokens == 30
    assert close(again, fresh)


def test_two_caches_of_one_model_are_two_models(open_decoder, model):
    """Two sequences interleaved on one model: bit for bit the logits of two models."""
    texts = TOKENS[:40], TOKENS[100:140]
    caches = [model.new_cache(64) for _ in texts]
    interleaved = [[], []]
    for piece in (slice(0, 30), *(slice(i, i + 1) for i in range(30, 40))):
        for rows, cache, text in zip(interleaved, caches, texts, strict=True):
            rows.append(model.extend(cache, text[piece]).logits.copy())
    for rows, text in zip(interleaved, texts, strict=True):
        alone = OneSequence(open_decoder(), 64)
        expected = [alone.extend(text[:30]).copy()]
        expected += [alone.extend(text[i : i + 1]).copy() for i in range(30, 40)]
        alone.close()
        np.testing.assert_array_equal(np.stack(rows), np.stack(expected))


def test_fork_goes_on_bit_for_bit(model):
    """Both sides of a fork, also after a rewind, give what the undivided sequence gives."""
    cache = model.new_cache(128)
    model.extend(cache, TOKENS[:60])
    cache.rewind(50)
    twin = cache.fork()
    assert (twin.length_tokens, twin.context_tokens) == (50, 128)
    other = continued(model, twin, TOKENS[400:408])
    mine = continued(model, cache)
    np.testing.assert_array_equal(mine, continued(model, _rewound(twin, 50)))
    np.testing.assert_array_equal(other, continued(model, _rewound(cache, 50), TOKENS[400:408]))
    cache.close()
    assert continued(model, _rewound(twin, 50)).tobytes() == mine.tobytes()


def _rewound(cache: KVCache, length_tokens: int) -> KVCache:
    cache.rewind(length_tokens)
    return cache


@pytest.mark.parametrize("length", [0, 1, 70])
def test_restored_goes_on_bit_for_bit(open_decoder, model, length):
    """A saved cache continues bit for bit in the same model and in one opened anew."""
    cache = model.new_cache(100)
    if length:
        model.extend(cache, TOKENS[:length])
    saved = cache.save()
    expected = continued(model, cache)
    anew = open_decoder()
    for opened in (model, anew):
        restored = opened.restore(saved)
        assert (restored.length_tokens, restored.context_tokens) == (length, 100)
        np.testing.assert_array_equal(continued(opened, restored), expected)
    anew.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_saves_are_refused(model, data):
    """Cut, lengthened or with any byte changed: a saved cache is refused as such."""
    cache = model.new_cache(16)
    model.extend(cache, TOKENS[:3])
    saved = bytearray(cache.save())
    kind = data.draw(st.sampled_from(["cut", "more", "byte"]))
    if kind == "cut":
        del saved[data.draw(st.integers(0, len(saved) - 1)) :]
    elif kind == "more":
        saved += data.draw(st.binary(min_size=1, max_size=9))
    else:
        saved[data.draw(st.integers(0, len(saved) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InputError, match="saved KV cache"):
        model.restore(bytes(saved))


def test_a_cache_belongs_to_its_model(open_decoder, model):
    """A cache of another model is refused, though it is of the same kind."""
    other = open_decoder()
    with pytest.raises(ValueError, match="another model"):
        model.extend(other.new_cache(8), TOKENS[:1])
    other.close()


def test_caches_opened_from_many_threads(model):
    """Eight threads open, fork, save and restore at once; every cache works afterwards."""
    base = model.new_cache(32)
    model.extend(base, TOKENS[:20])
    made: list[KVCache] = []
    lock, start = threading.Lock(), threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(10):
            fresh, twin, back = model.new_cache(32), base.fork(), model.restore(base.save())
            with lock:
                made.extend((fresh, twin, back))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 240
    expected = continued(model, base)
    for cache in made:
        if cache.length_tokens == 0:
            model.extend(cache, TOKENS[:20])
        np.testing.assert_array_equal(continued(model, cache), expected)


def test_full_context_then_overflow(model):
    """The last token of the context fits, one more does not and leaves the length as it was."""
    sequence = OneSequence(model, 8)
    sequence.extend(TOKENS[:7])
    sequence.extend(TOKENS[7:8])
    with pytest.raises(ContextOverflowError, match="8 \\+ 1 tokens exceed the context of 8"):
        sequence.extend(TOKENS[8:9])
    assert sequence.length_tokens == 8


@pytest.mark.parametrize("context_tokens", [0, CONTEXT + 1])
def test_impossible_context(model, context_tokens):
    """A context that the model cannot have names what is possible."""
    with pytest.raises(InputError, match=f"1 to {CONTEXT} are possible"):
        model.new_cache(context_tokens)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_token_outside_the_vocabulary(decoder, token):
    """A token id outside the vocabulary is refused before it reaches native code."""
    with pytest.raises(InputError, match="token ids must be in 0"):
        decoder.extend(np.array([token]))
    assert decoder.length_tokens == 0


def test_wrong_calls(decoder):
    """An empty input, more rows than tokens and a rewind forward are refused."""
    with pytest.raises(ValueError):
        decoder.extend(np.array([], np.int64))
    with pytest.raises(ValueError):
        decoder.extend(TOKENS[:2], 3)
    with pytest.raises(ValueError):
        decoder.rewind(1)


def test_hidden_states(decoder):
    """The last position's state and the sum over all, the same however the tokens are cut into calls."""
    model, cache = decoder.model, decoder.cache
    plain = model.extend(cache, TOKENS)
    assert (plain.hidden_last, plain.hidden_sum) == (None, None)
    logits = plain.logits.copy()
    cache.rewind(0)
    whole = model.extend(cache, TOKENS, hidden=True)
    assert whole.hidden_last is not None and whole.hidden_sum is not None
    assert whole.hidden_last.shape == whole.hidden_sum.shape == (model.hidden_size,)
    assert whole.hidden_last.dtype == whole.hidden_sum.dtype == np.float32
    assert close(whole.logits, logits)
    last, total = whole.hidden_last.copy(), whole.hidden_sum.copy()
    cache.rewind(0)
    summed = np.zeros_like(total)
    for start, stop, num_logits in ((0, 550, 1), (550, 551, 1), (551, 590, 20), (590, 600, 10)):
        step = model.extend(cache, TOKENS[start:stop], num_logits, hidden=True)
        summed += step.hidden_sum
    np.testing.assert_allclose(step.hidden_last, last, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(summed, total, rtol=1e-3, atol=2e-2)


USES = {
    "extend": lambda model, cache: model.extend(cache, TOKENS[:1]),
    "rewind": lambda model, cache: cache.rewind(0),
    "fork": lambda model, cache: cache.fork(),
    "save": lambda model, cache: cache.save(),
}


@pytest.mark.parametrize("use", list(USES))
def test_closed_cache(model, use):
    """A closed cache says so, whatever is asked of it; its model goes on."""
    cache = model.new_cache(8)
    cache.close()
    cache.close()
    with pytest.raises(BackendError, match="closed"):
        USES[use](model, cache)
    model.extend(model.new_cache(8), TOKENS[:1])


@pytest.mark.parametrize("use", [*USES, "new_cache", "restore"])
def test_closed_model(open_decoder, use):
    """A closed model says so; so do the caches that it still had."""
    model = open_decoder()
    cache = model.new_cache(8)
    model.extend(cache, TOKENS[:2])
    saved = cache.save()
    model.close()
    model.close()
    uses = {**USES, "new_cache": lambda m, c: m.new_cache(8), "restore": lambda m, c: m.restore(saved)}
    with pytest.raises(BackendError, match="closed"):
        uses[use](model, cache)


def test_unknown_backend():
    """A name that the table lacks is refused with those it has."""
    with pytest.raises(BundleError, match=f"'abacus' is unknown; known: {', '.join(BACKENDS)}"):
        load_backend("abacus")


@pytest.mark.parametrize("name", list(BACKENDS))
def test_encoder_matches_numpy_whatever_the_batch(name, tmp_path):
    """Embeddings equal numpy's mean-pooled rows, in input order, for mixed lengths in one batch."""
    backend, w = load_backend(name), weights()
    path = save(encoder_model(w), tmp_path / "encoder.onnx")
    model = backend.open_encoder(
        path, encoder_spec(), provider=backend.providers[-1], session_options={}, threads=2
    )
    rng = np.random.default_rng(3)
    batch = [rng.integers(0, VOCAB, n).tolist() for n in [3, 64, 1, *rng.integers(1, 64, 120)]]
    expected = np.stack([w["embed"][ids].mean(0) for ids in batch])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    got = model.embed(batch)
    assert (got.dtype, got.shape, model.dimension) == (np.float32, (123, HIDDEN), HIDDEN)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert model.embed([]).shape == (0, HIDDEN)
    with pytest.raises(ContextOverflowError, match="65 tokens"):
        model.embed([[1] * 65])
    with pytest.raises(InputError):
        model.embed([[]])
    model.close()
    with pytest.raises(BackendError, match="closed"):
        model.embed([[1]])
