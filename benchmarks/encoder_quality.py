"""Size and quality of all-MiniLM-L6-v2 under every encoder recipe, on real sentences.

    python benchmarks/encoder_quality.py --model DIR [--data ../shared/data/questions]

For each recipe and each of its graphs: bytes written, the cosine between the graph's embeddings and those of
the float32 torch encoder (all sentences, and each source of sentences alone), and the deviation on the golden
vectors. Writes results/encoder_quality.json. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edge_export.checkpoint.bert import load_encoder
from edge_export.options import ExportOptions
from edge_export.pipeline import PLANNING
from edge_export.plan.encoder import EncoderPlan
from edge_export.plan.recipes import RECIPES
from edge_export.progress import silent
from edge_export.stages.lower import lower
from edge_export.stages.store import store
from edge_export.stages.values import Job, Lowered, Run, of
from edge_export.storage.encoder import StoredEncoder
from edge_export.storage.stage_cache import StageCache
from edge_export.verify.encoder import encoder_golden, encoder_quality
from edge_reasoner.backends.golden import try_encoder
from edge_reasoner.backends.onnxruntime.encoder import OrtEncoder
from edge_reasoner.backends.onnxruntime.session import runtime_version
from edge_reasoner.contract.profile.load import load_profile
from edge_reasoner.contract.profile.schema import DeviceProfile

#: file → (field with the sentence, how many sentences, taken at even distances)
SOURCES = {
    "arc_easy.jsonl": ("query", 120),
    "IFEval_prompts.jsonl": ("prompt", 60),
    "gsm8k_test.jsonl": ("question", 30),
    "cmath_dev.jsonl": ("input", 30),
    "gaokao-history.jsonl": ("question", 15),
}


def read_sentences(folder: Path) -> dict[str, list[str]]:
    """Sentences by source. Raises SystemExit where the data is absent."""
    sentences = {}
    for name, (field, count) in SOURCES.items():
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name} is absent: give --data the folder with {', '.join(SOURCES)}")
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        sentences[name] = [json.loads(line)[field] for line in lines[:: max(1, len(lines) // count)][:count]]
    return sentences


def lower_encoder(model: Path, recipe: str, profile: DeviceProfile, folder: Path) -> Lowered:
    """The encoder taken through the exporter's stages, as far as its graphs."""
    folder.mkdir()
    run = Run(silent, StageCache(None), folder)
    value: Any = Job(model=str(model), board=profile, options=ExportOptions(recipe=recipe))
    for stage in (*PLANNING, store, lower):
        value = stage(run, value)
    lowered: Lowered = value
    return lowered


def evaluate(
    model: Path,
    recipe: str,
    profile: DeviceProfile,
    sentences: Mapping[str, Sequence[str]],
    folder: Path,
) -> list[dict[str, Any]]:
    """One row for each graph of the recipe."""
    lowered = lower_encoder(model, recipe, profile, folder)
    checkpoint, plan = lowered.encoder, lowered.plan.to_dict()
    data = folder / f"graphs/{lowered.role}.data"
    golden = encoder_golden(
        checkpoint, data, of(StoredEncoder, lowered.stored), of(EncoderPlan, lowered.plan).cosine_tolerance
    )
    source_bytes = checkpoint.digest.size_bytes
    file_bytes = sum(file.stat().st_size for file in (folder / "graphs").iterdir())
    everything = [text for texts in sentences.values() for text in texts]
    rows = []
    for variant in lowered.variants:
        model = OrtEncoder(folder / variant.graph, lowered.spec, threads=1)
        rows.append(
            {
                "recipe": recipe,
                "graph": Path(variant.graph).name,
                "formats": sorted({str(record["format"]) for record in plan["matrices"]}),
                "weight_bytes": plan["weight_bytes"],
                "file_bytes": file_bytes,
                "bytes_saved_percent": round(100 * (1 - file_bytes / source_bytes), 2),
                **encoder_quality(checkpoint, model, everything),
                "mean_cosine_by_source": {
                    name: encoder_quality(checkpoint, model, texts)["mean_cosine"]
                    for name, texts in sentences.items()
                },
                "golden_error": try_encoder(model, golden, time.monotonic).error,
                "golden_tolerance": golden.tolerance,
            }
        )
        model.close()
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Writes through a temporary file beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
        stream.write(text)
    Path(stream.name).chmod(0o644)
    Path(stream.name).replace(path)


def main() -> None:
    """Command line."""
    root = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, default=root / "../../shared/data/questions")
    parser.add_argument("--out", type=Path, default=root / "results/encoder_quality.json")
    options = parser.parse_args()
    torch.set_num_threads(2)
    checkpoint, profile = load_encoder(options.model), load_profile("generic-x86")
    sentences = read_sentences(options.data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            rows += evaluate(options.model, recipe, profile, sentences, Path(folder) / recipe)
            for row in rows[-1:] if recipe.startswith("fp") else rows[-2:]:
                print(
                    f"{row['graph']:28} {recipe}: −{row['bytes_saved_percent']:.2f} % bytes, mean cosine "
                    f"{row['mean_cosine']:.5f} ± {row['mean_cosine_stderr']:.5f}, least "
                    f"{row['min_cosine']:.5f}, golden {row['golden_error']:.1e}"
                )
    document = {
        "onnxruntime": runtime_version(),
        "torch": torch.__version__,
        "source_bytes": checkpoint.digest.size_bytes,
        "source_sha256": checkpoint.digest.sha256,
        "sentences": {name: len(texts) for name, texts in sentences.items()},
        "rows": rows,
    }
    write_atomically(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
