"""A complete tiny bundle on disk, sealed with the real manifest code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
from support import tiny_graphs as tiny

from edge_reasoner.contract.bundle.manifest import (
    Component,
    DecoderGolden,
    EncoderGolden,
    FileEntry,
    GoldenCheck,
    GoldenSet,
    Manifest,
    Source,
    Variant,
    seal,
    to_canonical_json,
)

TOKENS = tuple(np.random.default_rng(11).integers(0, tiny.VOCAB, 40).tolist())
PREFILL_TOKENS = 32


def decoder_golden(logits: np.ndarray, tolerance: float) -> GoldenSet:
    """Checks at one position inside the prefill, at its end and after; `logits` float32 [40, vocab]."""
    checks = []
    for position in (20, PREFILL_TOKENS - 1, PREFILL_TOKENS, len(TOKENS) - 1):
        ids = np.argsort(logits[position])[::-2]
        checks.append(
            GoldenCheck(
                position=position,
                argmax=int(logits[position].argmax()),
                token_ids=tuple(ids.tolist()),
                logits=tuple(logits[position][ids].tolist()),
            )
        )
    vector = DecoderGolden(token_ids=TOKENS, prefill_tokens=PREFILL_TOKENS, checks=tuple(checks))
    return GoldenSet(schema_version=1, tolerance=tolerance, decoder=(vector,))


def encoder_golden(w: dict[str, np.ndarray], tolerance: float = 1e-4) -> GoldenSet:
    """Two inputs of different length with numpy's embeddings."""
    vectors = []
    for ids in (TOKENS[:5], TOKENS[5:20]):
        mean = w["embed"][list(ids)].mean(0)
        vectors.append(EncoderGolden(token_ids=ids, embedding=tuple((mean / np.linalg.norm(mean)).tolist())))
    return GoldenSet(schema_version=1, tolerance=tolerance, encoder=tuple(vectors))


def variant(name: str, **changes) -> Variant:
    """A CPU variant whose graph is `graphs/<name>.onnx`."""
    fields = {
        "id": name,
        "backend": "onnxruntime",
        "execution_provider": "CPUExecutionProvider",
        "graph": f"graphs/{name}.onnx",
        "minimum_runtime": "1.20",
        "ram_floor_bytes": 1000,
    }
    return Variant(**{**fields, **changes})


def write_bundle(
    root: Path,
    golden: GoldenSet,
    variants: tuple[Variant, ...] = (variant("int4"), variant("fp32", reference=True)),
    models: dict | None = None,
    encoder: bool = True,
) -> Path:
    """Writes a decoder (a graph per variant) and, if asked, an encoder component; seals the manifest."""
    w = tiny.weights()
    if models is None:
        models = {"int4": tiny.decoder_model(w, 4), "fp32": tiny.decoder_model(w, 0)}
    for name, model in models.items():
        tiny.save(model, root / "graphs" / f"{name}.onnx")
    _write(root / "golden/reasoner.json", to_canonical_json(golden))
    _write(root / "tokenizer/reasoner/tokenizer.json", b'{"version": "1.0"}\n')
    components = [_component(root, "reasoner", tiny.decoder_spec(), variants)]
    if encoder:
        tiny.save(tiny.encoder_model(w), root / "graphs/encoder.onnx")
        _write(root / "golden/preprocessor.json", to_canonical_json(encoder_golden(w)))
        _write(root / "tokenizer/preprocessor/tokenizer.json", b'{"version": "1.1"}\n')
        components.append(_component(root, "preprocessor", tiny.encoder_spec(), (variant("encoder"),)))
    write_manifest(root, manifest(tuple(components)))
    return root


def manifest(components: tuple[Component, ...]) -> Manifest:
    """A sealed manifest of those components."""
    return seal(
        Manifest(
            schema_version=2,
            bundle_id="",
            version=1,
            profile="generic-x86",
            profile_sha256="0" * 64,
            components=components,
        )
    )


def write_manifest(root: Path, value: Manifest) -> None:
    """Writes `manifest.json` as it is."""
    (root / "manifest.json").write_bytes(to_canonical_json(value))


def reseal(root: Path, change) -> None:
    """Rewrites the manifest after `change(plain dict)`, with a correct digest: what a forger would do."""
    import json

    plain = json.loads((root / "manifest.json").read_bytes())
    change(plain)
    plain["bundle_id"] = ""
    blank = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    plain["bundle_id"] = hashlib.sha256(blank).hexdigest()
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (root / "manifest.json").write_text(text + "\n", encoding="utf-8")


def relist(root: Path, relative: str) -> None:
    """Makes the manifest list the file's present size and hash."""
    data = (root / relative).read_bytes()

    def change(plain: dict) -> None:
        for component in plain["components"]:
            for entry in component["files"]:
                if entry["path"] == relative:
                    entry["size_bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()

    reseal(root, change)


def add_files(root: Path, files: dict[str, bytes]) -> None:
    """Writes files and lists them in the manifest, in the component that their path names."""
    for relative, data in files.items():
        (root / relative).write_bytes(data)

    def change(plain: dict) -> None:
        for component in plain["components"]:
            mine = {p: d for p, d in files.items() if p.split("/")[1] == component["kind"]}
            kept = [entry for entry in component["files"] if entry["path"] not in mine]
            new = [
                {"path": p, "size_bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
                for p, d in mine.items()
            ]
            component["files"] = sorted(kept + new, key=lambda entry: entry["path"])

    reseal(root, change)


def _component(root: Path, kind: str, spec, variants: tuple[Variant, ...]) -> Component:
    graphs = [name for v in variants for name in (v.graph, f"{v.graph}.data")]
    paths = sorted({*graphs, f"golden/{kind}.json", f"tokenizer/{kind}/tokenizer.json"})
    return Component(
        kind=kind,
        name="tiny",
        version=1,
        licence="Apache-2.0",
        source=Source(name="tiny", format="gguf", sha256="0" * 64, size_bytes=1),
        tools={"test": "1"},
        plan={},
        spec=spec,
        variants=variants,
        golden=f"golden/{kind}.json",
        tokenizer=f"tokenizer/{kind}",
        files=tuple(_entry(root, path) for path in paths),
    )


def _entry(root: Path, relative: str) -> FileEntry:
    data = (root / relative).read_bytes()
    return FileEntry(path=relative, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def with_tolerance(golden: GoldenSet, tolerance: float) -> GoldenSet:
    """The same vectors with another tolerance."""
    return msgspec.structs.replace(golden, tolerance=tolerance)
