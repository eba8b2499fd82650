"""Runs a bundle's golden vectors on every variant and activates it, in any Python with onnxruntime.

python replay_bundle.py BUNDLE CACHE      prints one JSON object
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from edge_reasoner.activation.activate import activate
from edge_reasoner.backends.golden import try_decoder
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.backends.onnxruntime.session import runtime_version
from edge_reasoner.contract.bundle.manifest import MAX_GOLDEN_BYTES, parse_golden
from edge_reasoner.contract.bundle.open import open_bundle


def _main(path: str, cache: str) -> None:
    bundle = open_bundle(path)
    component = bundle.component("reasoner")
    golden = parse_golden(bundle.read_bytes(component.golden, MAX_GOLDEN_BYTES), component.golden)
    trials = {}
    for variant in component.variants:
        model = OrtDecoder(bundle.path_of(variant.graph), component.spec, threads=1)
        trial = try_decoder(model, golden, time.monotonic)
        trials[variant.id] = {
            "reference": variant.reference,
            "error": trial.error,
            "problem": trial.problem,
        }
        model.close()
    active = activate(bundle, "reasoner", threads=1, cache_dir=Path(cache))
    active.model.close()
    chosen = active.activation.variant_id
    print(json.dumps({"runtime": runtime_version(), "chosen": chosen, "variants": trials}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
