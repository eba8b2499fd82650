"""SmolLM2 as exported beside transformers' own Llama with the weights that gguf's own reader gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.sequences import OneSequence
from support.smollm2 import smollm2_of_transformers

from edge_export.options import ExportOptions
from edge_export.pipeline import export
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.open import open_bundle

pytestmark = pytest.mark.real_model
VOCAB = 49152


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    """transformers' Llama with SmolLM2's weights."""
    return smollm2_of_transformers(smollm2_gguf)


@pytest.fixture(scope="module")
def session(smollm2_gguf, tmp_path_factory):
    """The fp32 bundle's session, as the device opens it."""
    folder = tmp_path_factory.mktemp("smollm2") / "fp32"
    text = folder.with_name("few.txt")
    text.write_text("Water boils at a hundred degrees.")  # its figures are not what is tested here
    export(
        str(smollm2_gguf),
        "generic-x86",
        folder,
        ExportOptions(recipe="fp32", calibration=text, quality_text=text, context_tokens=512),
    )
    bundle = open_bundle(folder)
    component = bundle.component("reasoner")
    opened = OneSequence(OrtDecoder(bundle.path_of(component.variants[-1].graph), component.spec, threads=2))
    yield opened
    opened.close()


def test_logits_equal_transformers(smollm2, session):
    """Over 256 tokens, in prefill and decode, no logit differs by more than 2e-3."""
    ids = torch.randint(0, VOCAB, (256,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = smollm2(ids[None]).logits[0].numpy()
    session.rewind(0)
    worst = 0.0
    for piece in np.split(np.arange(256), [200, 201, 202, 203, 204]):
        found = session.extend(ids.numpy()[piece], num_logits=len(piece)).reshape(len(piece), -1)
        worst = max(worst, float(np.abs(found - expected[piece]).max()))
    assert worst <= 2e-3


def test_greedy_tokens_equal_transformers(smollm2, session):
    """64 greedy tokens after a prompt are the same ones."""
    prompt = [1, 9690, 198, 2683, 359, 253]
    with torch.no_grad():
        expected = smollm2.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :]
    session.rewind(0)
    row = session.extend(np.array(prompt))
    found = []
    for _ in range(64):
        found.append(int(np.argmax(row)))
        row = session.extend(np.array(found[-1:]))
    assert found == expected.tolist()
