"""The device runtime on an ARM core, with a bundle: run in the aarch64 userland by scripts/arm/test.sh.

EDGE_REASONER_DEMO_BUNDLE is the bundle, EDGE_REASONER_ARM_EXPECTED what tests/arm/replay.py recorded of it on
x86-64, EDGE_REASONER_ARM_CPU the emulated core.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

if platform.machine() != "aarch64":
    pytest.skip("runs inside the aarch64 userland: scripts/arm/test.sh", allow_module_level=True)

from kernels import Case, build, measure
from replay import CONTEXT_TOKENS, Recorded, logits_along, open_component

from edge_reasoner import Reasoner
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.machine.isa import isa_features, native_import_is_safe

CPU = os.environ["EDGE_REASONER_ARM_CPU"]
BUNDLE = Path(os.environ["EDGE_REASONER_DEMO_BUNDLE"])
#: core -> (features it has, features it has not)
FEATURES = {
    "cortex-a72": ({"asimd", "crc32"}, {"lse", "fphp", "asimddp", "i8mm", "sve"}),
    "cortex-a76": ({"asimd", "lse", "fphp", "asimdhp", "asimddp"}, {"i8mm", "sve"}),
}


@pytest.fixture(scope="module")
def recorded():
    """What x86-64 computed, in the same run of scripts/arm/test.sh."""
    data = Path(os.environ["EDGE_REASONER_ARM_EXPECTED"]).read_bytes()
    return msgspec.json.decode(data, type=Recorded)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """One activation cache for the module: the self-test runs once for each component."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reasoner_component(cache_dir):
    """The activated decoder."""
    activated = open_component(open_bundle(BUNDLE), "reasoner", cache_dir)
    yield activated
    activated.model.close()


def test_probe_names_the_core_s_features():
    """HWCAP, not the host's CPU, decides; the native import is tried in a child on the same core."""
    present, absent = FEATURES[CPU]
    assert present <= isa_features()
    assert not absent & isa_features()
    probe = native_import_is_safe()
    assert probe.safe and probe.conclusive, probe.message


def test_matmulnbits_computes_as_the_exporter_counts_on(tmp_path):
    """With zero points, int8 arithmetic is per block on every core; accuracy level 1 is fp32."""
    chosen = [
        Case(576, bits, 32, zeros, level)
        for bits in (4, 8)
        for zeros in ("middle", "fitted")
        for level in (1, 4)
    ]
    build(tmp_path, chosen)
    for row in measure(tmp_path, chosen)["rows"]:
        assert row["rms_relative_error"] < (1e-5 if row["accuracy_level"] == 1 else 0.015), row


def test_activation_reproduces_the_golden_vectors(reasoner_component, recorded):
    """The configuration in use passed the bundle's golden vectors on this core, within their tolerance."""
    activation = reasoner_component.activation
    print("\n".join(f"{r.variant_id} {r.session_options}: {r.error} {r.reason}" for r in activation.reports))
    assert activation.machine.architecture == "aarch64" and activation.bundle_id == recorded.bundle_id
    (used,) = (
        r
        for r in activation.reports
        if (r.variant_id, r.session_options) == (activation.variant_id, activation.session_options)
    )
    assert used.passed and used.error <= recorded.tolerance


def test_greedy_answers_agree_with_x86(reasoner_component, recorded):
    """Logits stay within twice the golden tolerance of x86-64's, and clear winners are the same token.

    Both machines are within the tolerance of the exact logits, so within twice of each other.
    """
    agreed = clear = total = 0
    errors = []
    for recording in recorded.decoder:
        fed = [step.token_ids[0] for step in recording.steps]
        rows = logits_along(reasoner_component.decoder, list(recording.prompt_ids), fed)
        for step, row in zip(recording.steps, rows, strict=True):
            expected, got = np.array(step.logits), row[list(step.token_ids)]
            spread = np.linalg.norm(expected - expected.mean())
            errors.append(np.linalg.norm(got - expected) / spread)
            assert errors[-1] <= 2 * recorded.tolerance, (recording.prompt, errors[-1])
            same = int(row.argmax()) == step.token_ids[0]
            is_clear = expected[0] - expected[1] > 2 * np.abs(got - expected).max()
            assert same or not is_clear, (recording.prompt, step.token_ids[:2], expected[:2])
            agreed, clear, total = agreed + same, clear + is_clear, total + 1
    print(f"relative RMS of logits against x86-64: mean {np.mean(errors):.2g}, largest {max(errors):.2g}")
    print(f"{agreed} of {total} greedy tokens as on x86-64, {clear} of them by a clear margin")
    assert agreed >= 0.8 * total


def test_embeddings_agree_with_x86(recorded, cache_dir):
    """The preprocessor's embeddings have a cosine of at least 0.99 with x86-64's."""
    if not recorded.encoder:
        pytest.skip("the bundle has no preprocessor")
    session = open_component(open_bundle(BUNDLE), "preprocessor", cache_dir).encoder
    got = session.embed([list(item.token_ids) for item in recorded.encoder])
    session.close()
    expected = np.array([item.vector for item in recorded.encoder])
    assert (got * expected).sum(-1).min() > 0.99


def test_ask_in_python(cache_dir, recorded):
    """`Reasoner.ask` answers locally on this core."""
    prompt = recorded.decoder[0].prompt
    with Reasoner.open(
        BUNDLE, mode="local", threads=1, context_tokens=CONTEXT_TOKENS, cache_dir=cache_dir
    ) as reasoner:
        answer = reasoner.ask(prompt, max_tokens=4, temperature=0.0)
    assert answer.source.startswith("local") and answer.text
    assert 1 <= answer.usage.completion_tokens <= 4


def test_ask_on_the_command_line(cache_dir, recorded):
    """`edge-reasoner ask --json` prints one JSON object with a local answer."""
    start = "from edge_reasoner.cli.main import main; main()"
    arguments = [
        "ask",
        str(BUNDLE),
        recorded.decoder[0].prompt,
        "--mode",
        "local",
        "--max-tokens",
        "4",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        env={**os.environ, "EDGE_REASONER_CACHE": str(cache_dir)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"]
