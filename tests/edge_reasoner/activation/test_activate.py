"""Activation: the self-test picks what reproduces the golden vectors, fastest first, and remembers it."""

import itertools
import json
import platform
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support import tiny_graphs as tiny
from support.sequences import OneSequence
from support.tiny_bundle import TOKENS, decoder_golden, variant, with_tolerance, write_bundle

from edge_reasoner.activation.activate import activate, cached_activation
from edge_reasoner.backends import golden as golden_module
from edge_reasoner.backends import load_backend
from edge_reasoner.backends.base import Step
from edge_reasoner.backends.fake import FakeDecoder
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.backends.onnxruntime.session import runtime_version
from edge_reasoner.contract.bundle.manifest import DecoderGolden, GoldenCheck, GoldenSet
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import BackendError, BundleError, TargetError, VerificationError
from edge_reasoner.machine.isa import ImportProbe, isa_features

needs_int8_kernels = pytest.mark.skipif(
    platform.machine() == "aarch64" and "asimddp" not in isa_features(),
    reason="without dotprod onnxruntime computes level 4 in fp32",
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Logits [40, vocab] of transformers; where it is absent, of the fp32 graph (an old runtime's venv)."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        path = tiny.save(tiny.decoder_model(tiny.weights()), tmp_path_factory.mktemp("g") / "g.onnx")
        sequence = OneSequence(OrtDecoder(path, tiny.decoder_spec()))
        return sequence.extend(np.array(TOKENS), len(TOKENS)).copy()
    return tiny.reference_logits(tiny.weights(), list(TOKENS))


@pytest.fixture
def golden(expected):
    """Golden vectors within which the int4 level-4 graph stays."""
    return decoder_golden(expected, tolerance=0.15)


def corrupted(level: int = 0):
    """A graph whose last layer norm is wrong, as a broken kernel would make it."""
    w = tiny.weights()
    w["norm"] = w["norm"][::-1].copy()
    return tiny.decoder_model(w, level)


def models(**changed):
    w = tiny.weights()
    return {"int4": tiny.decoder_model(w, 4), "fp32": tiny.decoder_model(w, 0), **changed}


def start(root, cache, kind="reasoner", **options):
    return activate(open_bundle(root), kind, threads=1, cache_dir=cache, **options)


def test_the_fast_variant_that_passes_is_taken_and_the_reference_is_not_tried(tmp_path, golden):
    """With a sound int4 graph, the reference variant is never opened."""
    result = start(write_bundle(tmp_path / "b", golden), tmp_path / "cache")
    activation = result.activation
    assert (activation.variant_id, activation.reference, result.from_cache) == ("int4", False, False)
    assert {report.variant_id for report in activation.reports} == {"int4"}
    assert 0 < activation.reports[0].error < 0.15
    result.model.close()


def test_a_wrong_kernel_falls_back_to_the_reference(tmp_path, golden):
    """A fast variant that does not reproduce the vectors is refused with its error; the reference serves."""
    root = write_bundle(tmp_path / "b", golden, models=models(int4=corrupted()))
    result = start(root, tmp_path / "cache")
    assert (result.activation.variant_id, result.activation.reference) == ("fp32", True)
    refused = result.activation.reports[0]
    assert not refused.passed and "relative RMS error" in refused.reason and refused.step_ms is None
    result.model.close()


@needs_int8_kernels
def test_a_level_that_is_too_coarse_is_refused(tmp_path, golden):
    """The tolerance decides: int8 activations do not pass where 1 % is asked for."""
    root = write_bundle(tmp_path / "b", with_tolerance(golden, 0.01))
    result = start(root, tmp_path / "cache")
    assert result.activation.reference
    assert max(report.error for report in result.activation.reports if report.passed) < 1e-4
    result.model.close()


@needs_int8_kernels
def test_fp32_arithmetic_on_the_same_weights_is_a_last_resort(tmp_path, golden):
    """A bundle without a reference variant still starts where the runtime can be told to compute in fp32."""
    golden = with_tolerance(golden, 0.01)
    root = write_bundle(tmp_path / "b", golden, (variant("int4"),), {"int4": models()["int4"]}, encoder=False)
    if platform.machine() != "x86_64" or runtime_version().startswith("1.23."):
        with pytest.raises(VerificationError):
            start(root, tmp_path / "cache")
        return
    result = start(root, tmp_path / "cache")
    assert result.activation.reference
    assert result.activation.session_options == {"mlas.qnbit.force_fp32": "1"}
    again = start(root, tmp_path / "cache")
    assert again.from_cache
    again.model.close()
    result.model.close()


def test_none_passes(tmp_path, golden):
    """When nothing reproduces the vectors, activation fails in one line that names every candidate."""
    root = write_bundle(tmp_path / "b", golden, models=models(int4=corrupted(), fp32=corrupted()))
    with pytest.raises(VerificationError) as error:
        start(root, tmp_path / "cache")
    assert "int4" in str(error.value) and "fp32" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("activation/*.json"))


def test_the_fastest_of_several_is_taken(tmp_path, golden, monkeypatch):
    """Of two that pass, the one with the shorter steps wins, whatever the manifest's order."""
    root = write_bundle(
        tmp_path / "b", golden, (variant("int4"), variant("fp32")), models=models(), encoder=False
    )
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")  # no generic options there
    ticks = itertools.chain(*([0.0, 0.002] * 8 + [0.0, 0.001] * 8,))
    result = start(root, tmp_path / "cache", clock=lambda: next(ticks), confinement=None)
    assert result.activation.variant_id == "fp32"
    assert [report.step_ms for report in result.activation.reports] == [2.0, 1.0]
    result.model.close()


def test_the_choice_is_cached_and_a_corrupt_cache_is_ignored(tmp_path, golden):
    """The second activation runs no test; a damaged or foreign cache file leads to a new test."""
    root, cache = write_bundle(tmp_path / "b", golden), tmp_path / "cache"
    bundle = open_bundle(root)
    assert cached_activation(bundle, "reasoner", threads=1, cache_dir=cache) is None
    first = start(root, cache)
    second = start(root, cache, clock=None)
    assert second.from_cache and second.activation == first.activation
    assert cached_activation(bundle, "reasoner", threads=1, cache_dir=cache) == first.activation
    (file,) = (cache / "activation").iterdir()
    text = file.read_text()
    for damaged in (
        "{",
        "[]",
        text.replace('"passed":true', '"passed":false'),
        text.replace("int4", "other"),
        text.replace('"session_options":{}', '"session_options":{"session.optimized_model_filepath":"/x"}'),
    ):
        file.write_text(damaged)
        again = start(root, cache)
        assert not again.from_cache and again.activation.variant_id == "int4"
        again.model.close()
    other_threads = activate(bundle, "reasoner", threads=2, cache_dir=cache)
    assert not other_threads.from_cache
    for result in (first, second, other_threads):
        result.model.close()


def test_generic_options_are_tried_on_arm(tmp_path, golden, monkeypatch):
    """On aarch64 every variant is also tried without KleidiAI."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    result = start(write_bundle(tmp_path / "b", golden), tmp_path / "cache")
    assert [report.session_options for report in result.activation.reports] == [
        {},
        {"mlas.disable_kleidiai": "1"},
    ]
    result.model.close()


def test_encoder(tmp_path, golden):
    """An encoder component is activated the same way."""
    root = write_bundle(tmp_path / "b", golden)
    result = start(root, tmp_path / "cache", "preprocessor")
    assert result.encoder.embed([[1, 2]]).shape == (1, tiny.HIDDEN)
    assert result.activation.reports[0].error < 1e-5
    result.model.close()


def test_context_smaller_than_the_vectors(tmp_path, golden):
    """A cache may be smaller than what the self-test needed."""
    result = start(write_bundle(tmp_path / "b", golden), tmp_path / "cache")
    assert result.decoder.new_cache(16).context_tokens == 16
    result.model.close()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"minimum_runtime": "99.1"}, "needs onnxruntime 99.1"),
        ({"execution_provider": "QNNExecutionProvider"}, "needs QNNExecutionProvider"),
        ({"isa_floor": ("sme", "warp-drive")}, "needs CPU features sme, warp-drive"),
    ],
)
def test_variants_that_cannot_run_here(tmp_path, golden, changes, message):
    """A variant beyond this machine is skipped with its reason; if none is left, that is the error."""
    root = write_bundle(tmp_path / "b", golden, (variant("int4", **changes),), encoder=False, models=None)
    for name in ("fp32.onnx", "fp32.onnx.data"):
        (root / "graphs" / name).unlink()
    with pytest.raises(TargetError, match=message):
        start(root, tmp_path / "cache")


def test_a_wheel_that_dies_on_import_is_reported_before_it_is_imported(tmp_path, golden):
    """The import is tried in a child first; its failure is the error, and is not remembered."""
    root = write_bundle(tmp_path / "b", golden)
    bad = ImportProbe(module="onnxruntime", safe=False, conclusive=True, message="dies with SIGILL")
    with pytest.raises(BackendError, match="SIGILL"):
        start(root, tmp_path / "cache", probe_import=lambda: bad)
    start(root, tmp_path / "cache").model.close()
    # a good answer is remembered
    start(root, tmp_path / "cache", probe_import=lambda: bad).model.close()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": 1e300}, "tolerance is 1e"),
        ({"decoder": ()}, "0 golden vectors"),
    ],
)
def test_golden_vectors_that_cannot_judge(tmp_path, golden, change, message):
    """Golden vectors that would pass anything are refused."""
    root = write_bundle(tmp_path / "b", msgspec.structs.replace(golden, **change))
    with pytest.raises(BundleError, match=message):
        start(root, tmp_path / "cache")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token_ids": (tiny.VOCAB,), "prefill_tokens": 1}, "outside the vocabulary"),
        ({"checks": ()}, "checks: a vector has none"),
        ({"token_ids": (1,) * 5000, "prefill_tokens": 1}, "5000 tokens; 1 to 1280"),
    ],
)
def test_hostile_golden_vector(golden, change, message):
    """A vector that does not fit the spec is refused before any session opens."""
    vector = msgspec.structs.replace(golden.decoder[0], **change)
    with pytest.raises(BundleError, match=message):
        golden_module.check_golden(
            msgspec.structs.replace(golden, decoder=(vector,)), tiny.decoder_spec(), "golden"
        )


@pytest.mark.parametrize(
    "count, tokens, prefill, message",
    [
        (30, 1000, 1000, "30000 tokens; at most 16384"),
        (20, 500, 1, "9980 decode steps; at most 512"),
        (80, 1, 1, "80 golden vectors; 1 to 64"),
    ],
)
def test_golden_vectors_have_a_budget(tmp_path, golden, count, tokens, prefill, message):
    """What every candidate would have to compute is bounded before the first is opened."""
    vector = msgspec.structs.replace(
        golden.decoder[0],
        token_ids=(1,) * tokens,
        prefill_tokens=prefill,
        checks=tuple(msgspec.structs.replace(c, position=tokens - 1) for c in golden.decoder[0].checks),
    )
    root = write_bundle(tmp_path / "b", msgspec.structs.replace(golden, decoder=(vector,) * count))
    with pytest.raises(BundleError, match=message):
        start(root, None, probe_import=None)


class SameLogits(FakeDecoder):
    """A decoder that gives the same logits, float32 [vocab], at every position."""

    def __init__(self, row):
        super().__init__(len(row), 16)
        self.row = row

    def extend(self, cache, token_ids, num_logits=1, *, hidden=False):
        super().extend(cache, token_ids, num_logits)
        return Step(np.tile(self.row, (num_logits, 1)))


def test_wrong_argmax_alone_is_caught():
    """Two leading logits swapped: a small RMS error, but another token leads by more than the tolerance."""
    expected = np.linspace(-2.4, 2.4, tiny.VOCAB, dtype=np.float32)
    expected[7], expected[8] = 3.5, 2.5
    ids = tuple(range(tiny.VOCAB))
    check = GoldenCheck(position=1, argmax=7, token_ids=ids, logits=tuple(expected.tolist()))
    vector = DecoderGolden(token_ids=(1, 2), prefill_tokens=2, checks=(check,))
    golden = GoldenSet(schema_version=1, tolerance=0.1, decoder=(vector,))

    def trial(row):
        return golden_module.try_decoder(SameLogits(row), golden, itertools.count(0.0).__next__)

    assert trial(expected).problem == ""
    wrong = expected.copy()
    wrong[8] = 3.55
    assert trial(wrong).error < 0.1 and "token 8 leads, not 7" in trial(wrong).problem
    wrong[3] = np.nan
    assert "not finite" in trial(wrong).problem


@pytest.mark.parametrize("where", [None, "/dev/null/cache", "/dev/full"])
def test_no_cache_only_means_uncached(tmp_path, golden, where):
    """Without a cache folder, or with one that takes nothing, every start tests anew and none fails."""
    opened = write_bundle(tmp_path / "b", golden)
    for _ in range(2):
        result = start(opened, None if where is None else Path(where))
        assert not result.from_cache
        result.model.close()


def test_one_model_is_open_at_a_time(tmp_path, golden, monkeypatch):
    """However many candidates there are, the self-test holds one model's memory; the winner is open after."""
    root = write_bundle(
        tmp_path / "b", golden, (variant("int4"), variant("fp32")), models=models(), encoder=False
    )
    opened, most = set(), []

    class Counting(OrtDecoder):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            opened.add(self)
            most.append(len(opened))

        def close(self):
            super().close()
            opened.discard(self)

    backend = replace(load_backend("onnxruntime"), open_decoder=Counting)
    monkeypatch.setattr("edge_reasoner.activation.activate.load_backend", lambda name: backend)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    result = start(root, tmp_path / "cache", confinement=None)
    assert len(result.activation.reports) == 4 and max(most) == 1 and opened == {result.model}
    result.model.close()


def test_activation_is_plain_json(tmp_path, golden):
    """What `doctor` prints: candidates with error and step time, the machine and the choice."""
    result = start(write_bundle(tmp_path / "b", golden), tmp_path / "cache")
    plain = json.loads(msgspec.json.encode(result.activation))
    assert {"variant_id", "session_options", "machine", "reports", "reference"} <= plain.keys()
    assert {"architecture", "cpu", "isa", "runtime", "threads"} == plain["machine"].keys()
    result.model.close()
