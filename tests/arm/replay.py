"""Greedy decoding with its logits, recorded on one machine and replayed on another.

    python tests/arm/replay.py BUNDLE OUT.json     records here

The replay feeds the recorded tokens, so one flipped near-tie does not make everything after it incomparable.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from edge_reasoner.activation.activate import Activated, activate
from edge_reasoner.backends.base import DecoderModel, EncoderModel
from edge_reasoner.contract.bundle.manifest import MAX_GOLDEN_BYTES, parse_golden
from edge_reasoner.contract.bundle.open import Bundle, open_bundle
from edge_reasoner.query.assemble import open_tokenizer

PROMPTS = ("The capital of France is", "Two plus three makes", "Water boils at")
NEW_TOKENS = 8
#: Logits kept of each step: the largest, and about so many evenly spaced ones. An error is measured against
#: the spread of the kept logits; the largest alone spread so little that sound int8 arithmetic seems wrong.
TOP, SPACED = 16, 512
CONTEXT_TOKENS = 128


class Step(msgspec.Struct, frozen=True):
    """Some logits before one greedy token: the `TOP` largest, largest first, then evenly spaced ones."""

    token_ids: tuple[int, ...]
    logits: tuple[float, ...]


class Recording(msgspec.Struct, frozen=True):
    """One prompt's greedy continuation. Token i of the answer is `steps[i].token_ids[0]`."""

    prompt: str
    prompt_ids: tuple[int, ...]
    steps: tuple[Step, ...]


class Embedding(msgspec.Struct, frozen=True):
    """One text's embedding, if the bundle has a preprocessor."""

    token_ids: tuple[int, ...]
    vector: tuple[float, ...]


class Recorded(msgspec.Struct, frozen=True):
    """Everything recorded of a bundle. `tolerance` is that of its decoder's golden vectors."""

    bundle_id: str
    configuration: str
    tolerance: float
    decoder: tuple[Recording, ...]
    encoder: tuple[Embedding, ...]


def open_component(bundle: Bundle, kind: str, cache_dir: Path) -> Activated:
    """Activates a component with one thread."""
    return activate(bundle, kind, threads=1, cache_dir=cache_dir)


def logits_along(model: DecoderModel, prompt_ids: list[int], fed: list[int] | None) -> list[np.ndarray]:
    """Logits before each of `NEW_TOKENS` tokens; feeds `fed`, or if that is None its own greedy choice."""
    cache = model.new_cache(CONTEXT_TOKENS)
    rows = [model.extend(cache, np.array(prompt_ids, np.int64)).logits[-1].copy()]
    for i in range(NEW_TOKENS - 1):
        token = int(rows[-1].argmax()) if fed is None else fed[i]
        rows.append(model.extend(cache, np.array([token], np.int64)).logits[-1].copy())
    cache.close()
    return rows


def record(path: Path, cache_dir: Path) -> Recorded:
    """Decodes every prompt greedily and embeds it."""
    bundle = open_bundle(path)
    component = bundle.component("reasoner")
    tolerance = parse_golden(
        bundle.read_bytes(component.golden, MAX_GOLDEN_BYTES), component.golden
    ).tolerance
    tokenizer = open_tokenizer(bundle, component)
    activated = open_component(bundle, "reasoner", cache_dir)
    recordings = []
    for prompt in PROMPTS:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        prompt_ids = [*bos, *tokenizer.encode(prompt)]
        steps = []
        for row in logits_along(activated.decoder, prompt_ids, None):
            spaced = np.arange(0, len(row), max(1, len(row) // SPACED))
            kept = np.concatenate([np.argsort(row)[::-1][:TOP], spaced])
            steps.append(Step(tuple(kept.tolist()), tuple(row[kept].tolist())))
        recordings.append(Recording(prompt, tuple(prompt_ids), tuple(steps)))
    activated.model.close()
    chosen = f"{activated.activation.variant_id} {activated.activation.session_options}"
    embeddings = record_embeddings(bundle, cache_dir)
    return Recorded(bundle.manifest.bundle_id, chosen, tolerance, tuple(recordings), embeddings)


def record_embeddings(bundle: Bundle, cache_dir: Path) -> tuple[Embedding, ...]:
    """Embeds every prompt; empty without a preprocessor."""
    component = bundle.manifest.component("preprocessor")
    if component is None:
        return ()
    tokenizer = open_tokenizer(bundle, component)
    model: EncoderModel = open_component(bundle, "preprocessor", cache_dir).encoder
    token_ids = [tokenizer.encode(prompt, add_special=True) for prompt in PROMPTS]
    vectors = model.embed(token_ids)
    model.close()
    return tuple(Embedding(tuple(ids), tuple(v.tolist())) for ids, v in zip(token_ids, vectors, strict=True))


def main() -> None:
    """Command line: records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache_dir:
        recorded = record(arguments.bundle, Path(cache_dir))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(msgspec.json.encode(recorded))


if __name__ == "__main__":
    main()
