"""Decoders on onnxruntime against transformers, and how it fails."""

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from support.sequences import OneSequence
from support.tiny_graphs import VOCAB, decoder_model, decoder_spec, reference_logits, save, weights

from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.errors import BackendError, BundleError, ContextOverflowError, InputError

TOKENS = np.random.default_rng(1).integers(0, VOCAB, 620)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The tiny decoder, fp32 arithmetic."""
    return save(decoder_model(weights()), tmp_path_factory.mktemp("graph") / "tiny.onnx")


@pytest.fixture(scope="module")
def reference():
    """transformers' logits for TOKENS."""
    pytest.importorskip("transformers")
    return reference_logits(weights(), TOKENS.tolist())


def relative_rms(got, expected) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected - expected.mean()))


@pytest.mark.parametrize(
    "accuracy_level, kv_dtype, tolerance",
    [(0, "float32", 1e-4), (0, "float16", 0.01), (4, "float32", 0.1)],
)
def test_agrees_with_transformers(tmp_path, reference, accuracy_level, kv_dtype, tolerance):
    """Chunked prefill, a rewind into several tokens and decode steps reproduce transformers' Llama."""
    path = save(decoder_model(weights(), accuracy_level, kv_dtype), tmp_path / "tiny.onnx")
    sequence = OneSequence(OrtDecoder(path, decoder_spec(kv_dtype), threads=2))
    assert relative_rms(sequence.extend(TOKENS, num_logits=600), reference[-600:]) < tolerance
    sequence.rewind(100)
    assert relative_rms(sequence.extend(TOKENS[100:130], num_logits=30), reference[100:130]) < tolerance
    for position in range(130, 140):
        got = sequence.extend(TOKENS[position : position + 1])
        assert relative_rms(got, reference[position : position + 1]) < tolerance
    sequence.close()


def test_graph_with_a_fixed_context(tmp_path, graph):
    """A graph that fixes the KV buffers' size serves any smaller context, and no larger one."""
    path = save(decoder_model(weights(), context=64), tmp_path / "fixed.onnx")
    fixed = OneSequence(OrtDecoder(path, decoder_spec(context_tokens=64)), 32)
    free = OneSequence(OrtDecoder(graph, decoder_spec()), 32)
    assert fixed.cache.context_tokens == 32
    np.testing.assert_allclose(fixed.extend(TOKENS[:32]), free.extend(TOKENS[:32]), atol=1e-5)
    with pytest.raises(ContextOverflowError):
        fixed.extend(TOKENS[:1])
    with pytest.raises(BundleError, match=r"holds \[64\] tokens, not 65"):
        OrtDecoder(path, decoder_spec(context_tokens=65))


def test_decode_allocates_nothing_that_lasts(graph):
    """The row returned by every decode step is the same memory."""
    sequence = OneSequence(OrtDecoder(graph, decoder_spec(), threads=1))
    first = sequence.extend(TOKENS[:1]).ctypes.data
    assert all(sequence.extend(TOKENS[i : i + 1]).ctypes.data == first for i in range(1, 5))
    sequence.close()


_MANY_CACHES = """
import resource, sys
from pathlib import Path
import msgspec, numpy as np
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.manifest import DecoderSpec

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

model = OrtDecoder(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=DecoderSpec))
tokens = np.array([5, 6, 7, 8])
model.extend(model.new_cache(), tokens)
before_bytes = resident_bytes()
caches = [model.new_cache() for _ in range(25)]
for cache in caches:
    model.extend(cache, tokens)
caches += [cache.fork() for cache in caches]
print(resident_bytes() - before_bytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_another_cache_costs_only_what_it_holds(graph):
    """Fifty caches of 1280 tokens (32 MB if touched), each holding four: far less than their capacity."""
    spec = msgspec.json.encode(decoder_spec()).decode()
    command = [sys.executable, "-c", _MANY_CACHES, str(graph), spec]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12e6


_TASKS = Path("/proc/self/task")


def _threads() -> set[str]:
    return {task.name for task in _TASKS.iterdir()}


def _cpu_s(threads: set[str]) -> float:
    """Processor seconds of these threads so far, to the nanosecond."""
    return sum(int((_TASKS / name / "schedstat").read_text().split()[0]) for name in threads) / 1e9


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="reads threads' clocks from /proc")
def test_idle_threads_do_not_spin(graph):
    """Between calls the model's own threads use (almost) no processor time, however long the pause.

    Only their clocks count, not the wall's, nor other threads': 0.3 ms in 20 pauses on a machine of any load.
    Threads that spin on use 200 ms.
    """
    before = _threads()
    sequence = OneSequence(OrtDecoder(graph, decoder_spec(), threads=2))
    own = _threads() - before
    assert own
    sequence.extend(TOKENS[:500])
    used_s = 0.0
    for token in range(500, 520):
        sequence.extend(TOKENS[token : token + 1])
        before_s = _cpu_s(own)
        time.sleep(0.02)
        used_s += _cpu_s(own) - before_s
    assert used_s < 0.02
    sequence.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"session.optimized_model_filepath": "/var/x"}, "is not allowed"),
        ({"mlas.disable_kleidiai": "2"}, "is not in 0 … 1"),
        ({"session.dynamic_block_base": "９"}, "is not in 0 … 64"),
        ({"session.intra_op.spin_duration_us": "-1"}, "is not in"),
    ],
)
def test_hostile_session_options(graph, options, message):
    """Only listed session options with values in range are passed to the library."""
    with pytest.raises(BundleError, match=message):
        OrtDecoder(graph, decoder_spec(), session_options=options)


def test_allowed_session_option(graph):
    """An allowed option reaches the library."""
    sequence = OneSequence(OrtDecoder(graph, decoder_spec(), session_options={"mlas.disable_kleidiai": "1"}))
    assert sequence.extend(TOKENS[:2]).shape == (1, VOCAB)
    sequence.close()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": VOCAB + 1}, "output 'logits' is tensor\\(float\\)"),
        ({"head_dim": (16, 24)}, "input 'past_key_values.1.key'"),
        ({"kv_heads": (2,), "head_dim": (16,)}, "'past_key_values.1.key' is unexpected"),
        ({"kv_dtype": "float16"}, "asks for tensor\\(float16\\)"),
    ],
)
def test_spec_and_graph_differ(graph, changes, message):
    """A spec that does not describe the graph is refused when the model opens."""
    with pytest.raises(BundleError, match=message):
        OrtDecoder(graph, decoder_spec(**changes))


def test_no_threads(graph):
    """A number of threads that is none is refused."""
    with pytest.raises(InputError, match="threads is 0"):
        OrtDecoder(graph, decoder_spec(), threads=0)


def test_context_beyond_memory_is_refused_before_allocating(graph):
    """A cache larger than what this process may use is refused with figures."""
    with pytest.raises(InputError, match=r"needs .* GB of KV cache; this process may use .* GB: try"):
        OrtDecoder(graph, decoder_spec(context_tokens=2**53)).new_cache()


def test_provider_not_in_this_build(graph):
    """A provider that this onnxruntime lacks is an error, not a silent fall-back."""
    with pytest.raises(BackendError, match="'CUDAExecutionProvider' is not in this onnxruntime"):
        OrtDecoder(graph, decoder_spec(), provider="CUDAExecutionProvider")


def test_broken_graph_is_one_line(tmp_path):
    """Bytes that are no model, and an opset that the runtime does not know, give one line each."""
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x0a\x3a\x03abc")
    with pytest.raises(BundleError) as error:
        OrtDecoder(path, decoder_spec())
    assert "broken.onnx: loading" in str(error.value) and "\n" not in str(error.value)
    model = decoder_model(weights())
    model.opset_import[0].version = 99
    onnx.save(model, path)
    with pytest.raises((BackendError, BundleError)) as error:
        OrtDecoder(path, decoder_spec())
    assert "\n" not in str(error.value)


def test_package_import_loads_no_native_library():
    """Importing the backend table does not import onnxruntime."""
    code = "import sys, edge_reasoner.backends; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
