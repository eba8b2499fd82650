"""Measured sensitivity of an encoder's matrices, against whole encoders with rounded weights."""

from __future__ import annotations

import pytest
import torch
from support.tiny_berts import make_bert

from edge_export.checkpoint.bert import load_encoder
from edge_export.model.encoder import Encoder
from edge_export.plan.encoder import encoder_weights, matrix_kind
from edge_export.plan.encoder_analysis import analyse_encoder, analysis_tokens
from edge_export.plan.recipes import encoder_int4, smallest_int8
from edge_export.progress import silent
from edge_export.quantize import make_quantizer

SENTENCES = ([2, 5, 6, 7, 3], [2, 8, 3], [2, 9, 10, 11, 12, 13, 14, 3])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An opened random encoder."""
    path = tmp_path_factory.mktemp("bert")
    make_bert(path, "even")
    return load_encoder(path)


def embed(encoder) -> torch.Tensor:
    """Embeddings of the sentences, one after another, without padding."""
    with torch.inference_mode():
        rows = [encoder(torch.tensor([ids]), torch.ones(1, len(ids))) for ids in SENTENCES]
    return torch.cat(rows).double()


def loss(checkpoint, changes) -> float:
    """Mean of 1 − cosine with these tensors replaced."""
    whole = Encoder.from_source(checkpoint.config, checkpoint.source)
    exact = embed(whole)
    for name, weight in changes.items():
        whole.get_parameter(name).data = weight
    return float((1 - torch.cosine_similarity(embed(whole), exact, dim=-1)).mean())


def test_losses_are_those_of_the_whole_encoder(checkpoint):
    """Each matrix alone at 4 bits, and all at 8: as if the whole encoder had been rounded and run."""
    config, source = checkpoint.config, checkpoint.source
    analysis = analyse_encoder(config, source, SENTENCES, silent)
    assert analysis.sentences == len(SENTENCES)
    wide = {}
    for name, tensors in encoder_weights(config):
        if matrix_kind(name) is None:
            continue
        narrow = {}
        for tensor in tensors:
            weight = source.get(tensor)
            narrow[tensor] = make_quantizer("searched").quantize(weight, encoder_int4()).dequantize()
            fmt = smallest_int8(weight.shape[1])
            wide[tensor] = make_quantizer("rtn").quantize(weight, fmt).dequantize()
        expected = loss(checkpoint, narrow)
        got = analysis.int4_losses[name.removesuffix(".weight")]
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-7), name
    assert analysis.int8_loss == pytest.approx(loss(checkpoint, wide), rel=1e-2, abs=1e-7)


def test_larger_encoders_see_fewer_tokens(checkpoint):
    """The work is bounded, and some tokens are always read."""
    from dataclasses import replace

    config = checkpoint.config
    large = replace(config, hidden_size=1024, ffn_width=4096, num_layers=24)
    assert 96 <= analysis_tokens(large) < analysis_tokens(config)
