"""Exported decoders of every family under the device's scheduler: what is cached changes no bit."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from support.lowered_decoders import lower_decoder
from support.tiny_models import CASES, make_model
from support.watched_model import engine_of

from edge_export.checkpoint.load import load_checkpoint
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.contract.profile import load_profile

CONTEXT = 256
PARAMS = SamplingParams(max_tokens=16, temperature=1.0, seed=3)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_warm_is_cold_in_every_family(case: str, recipe: str, tmp_path) -> None:
    """Tokens, statistics and hidden states of a prompt are those of an engine that was not asked before."""
    make_model(case).save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    path, spec, _ = lower_decoder(
        checkpoint.config,
        checkpoint.source,
        load_profile("generic-x86"),
        recipe,
        tmp_path,
        context_tokens=CONTEXT,
    )
    start = np.random.default_rng(2).integers(0, spec.vocab_size, 140).tolist()
    prompts = [start, [*start, 5, 6], [*start[:100], 7]]

    def answers(asked: list[list[int]]) -> list[tuple]:
        with closing(engine_of(OrtDecoder(path, spec, threads=1))) as engine:
            streams = [engine.submit(prompt, PARAMS, hidden=True) for prompt in asked]
            read = []
            for stream in streams:
                pieces = [(p.token_id, p.logprob, p.margin, p.entropy) for p in stream]
                done = stream.result()
                states = [vars(done.hidden)[name].tobytes() for name in sorted(vars(done.hidden))]
                read.append((pieces, states))
            again = engine.submit(asked[0], PARAMS).result()
            assert again.usage.cached_tokens >= 64
            assert list(again.token_ids) == [piece[0] for piece in read[0][0]]
        return read

    cold = [answers([prompt])[0] for prompt in prompts]
    assert answers(prompts) == cold
