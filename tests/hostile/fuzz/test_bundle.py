"""Fuzzers of a bundle's parts: manifest (of this and the older schema), golden vectors, graphs, archives."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile.fuzz.mutate import FEW, MANY, check
from support import tiny_graphs as tiny
from support.tiny_bundle import TOKENS, decoder_golden, write_bundle

from edge_reasoner.contract.bundle.manifest import parse_golden, parse_manifest, to_canonical_json
from edge_reasoner.contract.bundle.onnx_scan import scan_graph
from edge_reasoner.contract.bundle.tar import unpack_bundle
from edge_reasoner.errors import BundleError

SCHEMA_1 = json.dumps(
    {
        "components": [{"files": [], "kind": "reasoner"}, {"kind": "preprocessor"}],
        "plan": {"recipe": "int8"},
        "profile": "raspberry-pi-5",
        "schema_version": 1,
        "source": {"name": "SmolLM2"},
    }
).encode()
WORDS = (
    b'"schema_version":1',
    b'"../x"',
    b'"reasoner"',
    b'"preprocessor"',
    b'"components"',
    b'"files"',
    b'"graphs/int4.onnx"',
    b"9007199254740993",
)


def fuzz_manifest(data: bytes) -> None:
    """Parses the bytes as they are: a manifest comes out whole, or one line says why not."""
    manifest = parse_manifest(data)
    assert to_canonical_json(manifest) == data


def fuzz_resealed_manifest(data: bytes) -> None:
    """As a forger would send them: canonical, with the digest of the changed content."""
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError("not JSON") from error
    if isinstance(plain, dict):
        plain["bundle_id"] = ""
        plain["bundle_id"] = hashlib.sha256(_canonical(plain)).hexdigest()
    manifest = parse_manifest(_canonical(plain))
    assert manifest.model is not None and len({e.path for e in manifest.entries}) == len(manifest.entries)


def fuzz_older_manifest(data: bytes) -> None:
    """An older schema is never accepted; what is said of it can be printed and typed."""
    try:
        parse_manifest(data)
    except BundleError as error:
        if "export the model again: " in str(error):
            assert str(error).isprintable() and len(str(error)) < 800
        return
    raise AssertionError("accepted")


def fuzz_golden(data: bytes) -> None:
    """Parses golden vectors."""
    golden = parse_golden(data, "golden.json")
    assert all(v.prefill_tokens <= len(v.token_ids) for v in golden.decoder)


def fuzz_graph(data: bytes) -> None:
    """Scans a graph for what it would open."""
    found = scan_graph(memoryview(data), "g.onnx")
    assert all(isinstance(name, str) for name in (*found.locations, *found.op_types))


def fuzz_tar(data: bytes) -> None:
    """Unpacks an archive: whole and verified, or nothing stays; and nothing is written elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        archive, cache = Path(folder, "b.tar"), Path(folder, "cache")
        archive.write_bytes(data)
        try:
            root = unpack_bundle(archive, cache).root
            assert root.parent == cache / "bundles" and (root / "manifest.json").is_file()
        except BundleError:
            assert not any(cache.rglob("*.json"))
            raise
        finally:
            assert {path.name for path in Path(folder).iterdir()} <= {"b.tar", "cache"}


def _canonical(plain: object) -> bytes:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace") + b"\n"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, tuple[Callable[[bytes], None], list[bytes]]]:
    """Every format's fuzzer and seeds, from one sound bundle."""
    logits = np.random.default_rng(0).normal(size=(len(TOKENS), tiny.VOCAB)).astype(np.float32)
    root = write_bundle(tmp_path_factory.mktemp("sound") / "bundle", decoder_golden(logits, 0.1))
    manifest = (root / "manifest.json").read_bytes()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            tar.add(file, file.relative_to(root).as_posix(), recursive=False)
    goldens = [(root / f"golden/{kind}.json").read_bytes() for kind in ("reasoner", "preprocessor")]
    graphs = [(root / f"graphs/{name}.onnx").read_bytes() for name in ("int4", "fp32", "encoder")]
    return {
        "manifest": (fuzz_manifest, [manifest]),
        "resealed": (fuzz_resealed_manifest, [manifest]),
        "older": (fuzz_older_manifest, [SCHEMA_1]),
        "golden": (fuzz_golden, goldens),
        "graph": (fuzz_graph, graphs),
        "tar": (fuzz_tar, [packed.getvalue()]),
    }


FORMATS = ("manifest", "resealed", "older", "golden", "graph", "tar")


@pytest.mark.parametrize("name", FORMATS)
def test_few(corpora, name):
    """A small corpus of mutations: only our own errors, in one line, quickly, in bounded memory."""
    check(*corpora[name], FEW, words=WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many(corpora, name):
    """The whole corpus."""
    check(*corpora[name], MANY, seed=1, words=WORDS)
