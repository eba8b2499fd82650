"""Verification: a graph that does not reproduce torch is refused; golden vectors; quality figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.lowered_decoders import lower_decoder, quiet
from support.tiny_models import logits_of, make_model, tokens

from edge_export.checkpoint.load import load_checkpoint
from edge_export.lower.decoder_onnx import GraphOptions, write_decoder_graph
from edge_export.model.stream import original_head, stream_hidden
from edge_export.verify.decoder import (
    decoder_golden,
    golden_sequences,
    measure_quality,
    stored_head,
)
from edge_export.verify.tolerance import EXACT, FAST
from edge_export.verify.variants import judge_decoder
from edge_reasoner.backends.golden import check_golden
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.manifest import Variant
from edge_reasoner.contract.profile import load_profile
from edge_reasoner.errors import VerificationError

PROFILE = load_profile("generic-x86")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An int8 decoder with a fast and a reference graph, and its golden vectors."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "graphs").mkdir()
    make_model("llama").save_pretrained(folder)
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config
    sequences = golden_sequences(config, [tokens(200)[0]], 256)
    path, spec, stored = lower_decoder(
        config,
        checkpoint.source,
        PROFILE,
        "int8",
        folder / "graphs",
        context_tokens=256,
        checks=tuple(sequences),
    )
    options = GraphOptions(PROFILE.max_opset, 256, "float32", 4)
    write_decoder_graph(path.with_name("fast.onnx"), "d.data", config, stored.weights, stored.ropes, options)
    head = stored_head(config, folder / "graphs/d.data", stored)
    golden = decoder_golden(config, sequences, stored.expected_states, head, FAST["int8"])
    check_golden(golden, spec, "golden")
    return folder, spec, golden


def variant(name: str, reference: bool) -> Variant:
    """A variant of graphs/<name>.onnx."""
    return Variant(
        id=name,
        backend="onnxruntime",
        execution_provider="CPUExecutionProvider",
        graph=f"graphs/{name}.onnx",
        minimum_runtime="1.23.2",
        ram_floor_bytes=1,
        reference=reference,
    )


BOTH = (variant("fast", False), variant("d", True))


def altered(golden, change):
    """The golden set with every check's logits passed through `change`."""
    vectors = tuple(
        msgspec.structs.replace(
            vector,
            checks=tuple(
                msgspec.structs.replace(check, logits=tuple(change(x) for x in check.logits))
                for check in vector.checks
            ),
        )
        for vector in golden.decoder
    )
    return msgspec.structs.replace(golden, decoder=vectors)


def test_sound_graphs_are_kept(exported):
    """Both variants reproduce the vectors, in their order, without a warning."""
    folder, spec, golden = exported
    assert judge_decoder(folder, spec, BOTH, golden, 1, quiet)[:2] == (BOTH, ())


@pytest.mark.parametrize(
    "change", [lambda x: -x, lambda x: 1.02 * x + 0.1, lambda x: x + 0.3 * math.sin(40 * x)]
)
def test_other_logits_than_the_reference_graphs(exported, change):
    """A reference that deviates by more than rounding is refused, though within the fast tolerance."""
    folder, spec, golden = exported
    with pytest.raises(VerificationError, match=r"graphs/d\.onnx: does not reproduce torch") as caught:
        judge_decoder(folder, spec, (variant("d", True),), altered(golden, change), 1, quiet)
    assert caught.value.exit_status == 3 and "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_weights(exported, tmp_path):
    """One byte of a layer's scales changed on disk: the reference graph is refused."""
    folder, spec, golden = exported
    (tmp_path / "graphs").mkdir()
    for file in ("d.onnx", "fast.onnx", "d.data"):
        (tmp_path / "graphs" / file).write_bytes((folder / "graphs" / file).read_bytes())
    data = bytearray((tmp_path / "graphs/d.data").read_bytes())
    values = np.frombuffer(data, np.uint8).copy()
    middle = len(values) // 3
    values[middle : middle + 2048] ^= 0x80
    (tmp_path / "graphs/d.data").write_bytes(values.tobytes())
    with pytest.raises(VerificationError):
        judge_decoder(tmp_path, spec, BOTH, golden, 1, quiet)


def test_an_inexact_fast_graph_is_left_out_with_a_warning(exported, tmp_path):
    """A fast variant beyond its tolerance is dropped and named; the exact reference remains."""
    folder, spec, golden = exported
    other = make_model("llama", seed=9)
    other.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    (tmp_path / "graphs").mkdir()
    wrong, _, _ = lower_decoder(
        checkpoint.config,
        checkpoint.source,
        PROFILE,
        "int8",
        tmp_path / "graphs",
        context_tokens=256,
        level=4,
    )
    wrong = wrong.rename(wrong.with_name("fast.onnx"))
    wrong.with_name("d.data").rename(wrong.with_name("other.data"))
    wrong.write_bytes(wrong.read_bytes().replace(b"d.data", b"o.data"))
    wrong.with_name("other.data").rename(wrong.with_name("o.data"))
    for file in ("d.onnx", "d.data"):
        (tmp_path / "graphs" / file).write_bytes((folder / "graphs" / file).read_bytes())
    kept, warnings, _ = judge_decoder(tmp_path, spec, BOTH, golden, 1, quiet)
    assert kept == BOTH[1:] and len(warnings) == 1 and warnings[0].startswith("fast: left out")


def test_golden_vectors_are_transformers_logits(tmp_path):
    """Positions, argmax and logits of the vectors come out of transformers too."""
    model = make_model("gemma3")
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    config, source = checkpoint.config, checkpoint.source
    sequences = golden_sequences(config, [tokens(30)[0]], 64)
    assert [len(s) for s in sequences] == [7, 32, 40, 64]  # 32: the window of 8 and 24 beyond
    states = stream_hidden(config, source, sequences)
    golden = decoder_golden(config, sequences, states, original_head(config, source), EXACT)
    for sequence, vector in zip(sequences, golden.decoder, strict=True):
        assert vector.token_ids == tuple(sequence.tolist())
        assert [check.position for check in vector.checks][-1] == len(sequence) - 1
        logits = logits_of(model, sequence[None])[0]
        for check in vector.checks:
            row = logits[check.position]
            assert check.argmax == int(row.argmax()) and len(set(check.token_ids)) == len(check.token_ids)
            found = torch.tensor(check.logits)
            assert (found - row[list(check.token_ids)]).abs().max() <= 2e-4 * row.abs().max()


def test_quality_against_transformers(tmp_path):
    """Agreement, its error and both perplexities equal what transformers' logits give."""
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    config, source = checkpoint.config, checkpoint.source
    other = make_model("llama", seed=5)
    (tmp_path / "other").mkdir()
    other.save_pretrained(tmp_path / "other")
    changed = load_checkpoint(tmp_path / "other")
    path, spec, _ = lower_decoder(
        changed.config, changed.source, PROFILE, "fp32", tmp_path, context_tokens=256
    )
    texts = [tokens(150, 3)[0], tokens(7, 4)[0]]
    decoder = OrtDecoder(path, spec, threads=1)
    states = stream_hidden(config, source, texts)
    quality = measure_quality(config, decoder, texts, states, original_head(config, source), quiet)
    decoder.close()
    tables = [[logits_of(m, ids[None])[0] for ids in texts] for m in (model, other)]
    agreed = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(*tables, strict=True)]).float()
    perplexities = []
    for rows in tables:
        picked = [
            row[:-1].log_softmax(-1).gather(1, ids[1:, None]) for row, ids in zip(rows, texts, strict=True)
        ]
        perplexities.append(float(torch.cat(picked).mean().neg().exp()))
    assert quality.positions == 157 and quality.top1_agreement == pytest.approx(float(agreed.mean()))
    share = float(agreed.mean())
    assert quality.top1_agreement_stderr == pytest.approx(math.sqrt(share * (1 - share) / 157))
    assert quality.original_perplexity == pytest.approx(perplexities[0], rel=1e-3)
    assert quality.perplexity == pytest.approx(perplexities[1], rel=1e-3)
    ratio = quality.to_dict()["perplexity_ratio"]
    assert ratio == pytest.approx(perplexities[1] / perplexities[0], rel=2e-3)


def test_golden_sequences_cross_every_window_that_fits():
    """One vector goes beyond each window; contexts shorter than that are filled to the end."""
    checkpoint_window = 700
    config = load_windowed(checkpoint_window)
    lengths = [len(s) for s in golden_sequences(config, [torch.arange(50) % 90], 2048)]
    assert lengths == [7, 40, 160, checkpoint_window + 24]
    lengths = [len(s) for s in golden_sequences(config, [torch.arange(50) % 90], 300)]
    assert lengths == [7, 40, 160, 300]
    far = load_windowed(4096)
    assert [len(s) for s in golden_sequences(far, [torch.arange(50) % 90], 8192)] == [7, 40, 160]


def load_windowed(window_tokens: int):
    """A llama configuration whose first layer has a window."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make_model("llama").save_pretrained(folder)
        config = load_checkpoint(Path(folder)).config
    first, *others = config.layers
    return replace(config, layers=(replace(first, sliding_window_tokens=window_tokens), *others))
