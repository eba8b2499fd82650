"""Opening trusts nothing: every damaged or forged bundle is refused with one clear line."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_graphs as tiny
from support.tiny_bundle import TOKENS, decoder_golden, relist, reseal, write_bundle

from edge_reasoner.contract.bundle.onnx_scan import scan_graph
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.contract.bundle.tar import unpack_bundle
from edge_reasoner.errors import BundleError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A bundle that opens."""
    logits = np.random.default_rng(0).normal(size=(len(TOKENS), tiny.VOCAB)).astype(np.float32)
    root = write_bundle(tmp_path_factory.mktemp("sound") / "bundle", decoder_golden(logits, 0.1))
    open_bundle(root)
    return root


@pytest.fixture
def root(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "bundle")


def refused(call, *arguments, **options) -> str:
    """The one line with which it is refused."""
    with pytest.raises(BundleError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 700
    return message


def test_sound_bundle_reads_only_what_it_lists(sound):
    """A sound bundle opens both ways, reports progress, and gives listed files only, within a limit."""
    seen = []
    bundle = open_bundle(sound, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert open_bundle(str(sound), verify="sizes") == bundle
    name = "tokenizer/reasoner/tokenizer.json"
    assert bundle.read_bytes(name, 100) == bundle.path_of(name).read_bytes()
    assert "at most 3" in refused(bundle.read_bytes, name, 3)
    assert "lists no file" in refused(bundle.path_of, "manifest.json")
    assert "it has: reasoner, preprocessor" in refused(bundle.component, "gate")


FILES = [
    "manifest.json",
    "graphs/int4.onnx",
    "graphs/int4.onnx.data",
    "golden/reasoner.json",
    "tokenizer/reasoner/tokenizer.json",
    "graphs/encoder.onnx",
]


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_flipped_byte(root, name, where):
    """One flipped bit at the start, the middle or the end of any file is found."""
    data = bytearray((root / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (root / name).write_bytes(data)
    assert name in refused(open_bundle, root)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_missing_truncated_or_longer_file(root, name, verify):
    """A file that is gone, shorter or longer is found even without hashing."""
    data = (root / name).read_bytes()
    for changed in (data[:-1], data + b"x", b""):
        (root / name).write_bytes(changed)
        assert name in refused(open_bundle, root, verify)
    (root / name).unlink()
    assert name in refused(open_bundle, root, verify)


def test_extra_files(root):
    """Nothing but the listed files, the manifest and its signature may lie in the directory."""
    (root / "manifest.sig").write_bytes(b"signature")
    open_bundle(root)
    (root / "manifest.sig").write_bytes(b"x" * 70_000)
    assert "manifest.sig" in refused(open_bundle, root)
    (root / "manifest.sig").unlink()
    for extra in ("report.html", "graphs/evil.so", "tokenizer/reasoner/chat_template.jinja"):
        (root / extra).write_text("x")
        assert f"{extra!r} is not listed" in refused(open_bundle, root)
        (root / extra).unlink()


def test_links_and_special_files(root, tmp_path):
    """Symlinks in place of a file or a folder, and a fifo, are refused; a link to the whole bundle is not."""
    (tmp_path / "link").symlink_to(root)
    assert open_bundle(tmp_path / "link").root == root.resolve()
    name = root / "tokenizer/reasoner/tokenizer.json"
    shutil.move(name, tmp_path / "outside.json")
    name.symlink_to(tmp_path / "outside.json")
    assert "symlink" in refused(open_bundle, root)
    name.unlink()
    os.mkfifo(name)
    assert "not a regular file" in refused(open_bundle, root)
    name.unlink()
    shutil.move(tmp_path / "outside.json", name)
    shutil.move(root / "golden", tmp_path / "golden")
    (root / "golden").symlink_to(tmp_path / "golden")
    assert "symlink" in refused(open_bundle, root)
    manifest = root / "manifest.json"
    shutil.move(manifest, tmp_path / "manifest.json")
    manifest.symlink_to(tmp_path / "manifest.json")
    refused(open_bundle, root)


def test_not_a_bundle(tmp_path):
    """A path that is absent, a file, or a folder without a manifest."""
    assert "no such bundle" in refused(open_bundle, tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "not a bundle directory" in refused(open_bundle, tmp_path / "file")
    (tmp_path / "b.tar").write_text("x")
    assert "unpack the .tar first" in refused(open_bundle, tmp_path / "b.tar")
    assert "manifest.json" in refused(open_bundle, tmp_path)


def test_oversized_and_deep_manifest(root):
    """A huge manifest is refused unread, deep nesting without a crash."""
    (root / "manifest.json").write_bytes(b"[" * (5 << 20))
    assert "larger than" in refused(open_bundle, root)
    (root / "manifest.json").write_bytes(b'{"plan":' + b"[" * 100_000)
    refused(open_bundle, root)


def component(plain: dict) -> dict:
    return plain["components"][0]


FORGED = {
    "unknown field": (lambda m: m.update(evil=1), "unknown field"),
    "unknown nested field": (lambda m: component(m)["spec"].update(hook="x"), "unknown field"),
    "missing field": (lambda m: component(m).pop("licence"), "licence"),
    "no source": (lambda m: component(m).pop("source"), "source"),
    "source of the bundle": (lambda m: m.update(source=component(m)["source"]), "unknown field"),
    "wrong type": (lambda m: m.update(version="1"), "version"),
    "version 0": (lambda m: m.update(version=0), "version"),
    "schema": (lambda m: m.update(schema_version=3), "schema_version 3"),
    "schema 0": (lambda m: m.update(schema_version=0), "schema_version 0"),
    "schema as text": (lambda m: m.update(schema_version="2"), "schema_version"),
    "unknown kind": (lambda m: component(m).update(kind="rootkit"), "kind"),
    "duplicate kind": (lambda m: m["components"].append(m["components"][0]), "twice"),
    "nameless backend": (lambda m: component(m)["variants"][0].update(backend=""), "backend"),
    "no variants": (lambda m: component(m).update(variants=[]), "variants"),
    "context 2^53": (lambda m: component(m)["spec"].update(context_tokens=2**53), "at most 16777216"),
    "context 2^64": (lambda m: component(m)["spec"].update(context_tokens=2**64), "context_tokens"),
    "vocabulary": (lambda m: component(m)["spec"].update(vocab_size=2**53), "vocab_size"),
    "head width": (lambda m: component(m)["spec"].update(head_dim=[2**53, 16]), "head_dim"),
    "many layers": (
        lambda m: component(m)["spec"].update(kv_heads=[1] * 9999, head_dim=[8] * 9999),
        "length <= 1024",
    ),
    "many variants": (
        lambda m: component(m).update(
            variants=[{**component(m)["variants"][0], "id": f"v{i}"} for i in range(12_000)]
        ),
        "length <= 16",
    ),
    "many options": (
        lambda m: component(m)["variants"][0].update(session_options={f"k{i}": "1" for i in range(17)}),
        "length <= 16",
    ),
    "no layers": (lambda m: component(m)["spec"].update(kv_heads=[], head_dim=[]), "0 layers"),
    "layer mismatch": (lambda m: component(m)["spec"].update(head_dim=[16]), "differ in length"),
    "bad eos": (lambda m: component(m)["spec"].update(eos_token_ids=[96]), "outside the vocabulary"),
    "negative size": (lambda m: component(m)["files"][0].update(size_bytes=-1), "size_bytes"),
    "hash": (lambda m: component(m)["files"][0].update(sha256="0" * 64), "SHA-256"),
    "many files": (
        lambda m: component(m)["files"].extend(
            {"path": f"f{i}", "size_bytes": 0, "sha256": "0" * 64} for i in range(4200)
        ),
        "at most 4096",
    ),
    "listed twice": (lambda m: component(m)["files"].append(component(m)["files"][0]), "twice"),
    "bundle's file listed twice": (
        lambda m: m.update(files=[component(m)["files"][0]]),
        "listed twice",
    ),
    "bundle's file is not there": (
        lambda m: m.update(files=[{"path": "report.html", "size_bytes": 1, "sha256": "0" * 64}]),
        "'report.html' is missing",
    ),
    "graph unlisted": (lambda m: component(m)["variants"][0].update(graph="graphs/x.onnx"), "not among"),
    "graph is data": (
        lambda m: component(m)["variants"][0].update(graph="graphs/int4.onnx.data"),
        "must end in .onnx",
    ),
    "tokenizer elsewhere": (lambda m: component(m).update(tokenizer="golden"), "not among its files"),
    "tokenizer outside": (lambda m: component(m).update(tokenizer="../x"), "must be relative"),
}
for bad in ("../etc/passwd", "/etc/passwd", "a/../../b", "./a", "a//b", "a\\b", "a\x00b", "..", "a b"):
    entry = {"path": bad, "size_bytes": 0, "sha256": "0" * 64}
    FORGED[f"path {bad!r}"] = (
        lambda m, entry=entry: component(m)["files"].append(entry),
        "must be relative",
    )
    FORGED[f"bundle's path {bad!r}"] = (
        lambda m, entry=entry: m.update(files=[entry]),
        "must be relative",
    )


@pytest.mark.parametrize("name", list(FORGED))
def test_forged_manifest(root, name):
    """A manifest with a correct digest but absurd or hostile content is refused before anything is used."""
    change, expected = FORGED[name]
    reseal(root, change)
    assert expected in refused(open_bundle, root)


def test_manifest_that_is_not_canonical(root):
    """Spaces, reordering or a duplicate key change the bytes but not the meaning: refused."""
    path = root / "manifest.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text), indent=1) + "\n")
    assert "canonical" in refused(open_bundle, root)
    path.write_text('{"version":1,' + text[1:])
    assert "canonical" in refused(open_bundle, root)


@pytest.mark.parametrize(
    "location",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "*/_ORT_MEM_ADDR_/*",
        "encoder.onnx.data",
        "..\\x",
        "",
        "sub/../x",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_external_data_that_escapes(root, location, nested):
    """A graph, hashes correct, that would make the runtime open anything unlisted is refused."""
    path = root / "graphs/int4.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = location
    if nested:
        inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
        node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
        model.graph.node.append(node)
        model.graph.initializer.remove(tensor)
    path.write_bytes(model.SerializeToString())
    relist(root, "graphs/int4.onnx")
    wanted = "attribute: field 6" if nested else "refers to external data"  # no graph inside another
    assert wanted in refused(open_bundle, root)


def test_operator_that_opens_files(root):
    """EPContext names a file of its own: refused."""
    path = root / "graphs/int4.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("EPContext", [], ["y"], domain="com.microsoft"))
    path.write_bytes(model.SerializeToString())
    relist(root, "graphs/int4.onnx")
    assert "'EPContext' is not allowed" in refused(open_bundle, root)


def test_scan_finds_what_onnx_wrote(sound):
    """The scanner and the onnx package agree on a real graph's operators and locations."""
    data = (sound / "graphs/int4.onnx").read_bytes()
    model = onnx.load_from_string(data)
    found = scan_graph(memoryview(data), "g")
    assert set(found.op_types) == {node.op_type for node in model.graph.node}
    locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert set(found.locations) == locations == {"int4.onnx.data"}


@given(data=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_scan_of_any_bytes(data):
    """Arbitrary bytes either scan or are refused; nothing else happens."""
    try:
        scan_graph(memoryview(data), "g")
    except BundleError as error:
        assert "\n" not in str(error)


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scan_of_a_damaged_graph(sound, position, byte):
    """One changed byte of a real graph either scans or is refused."""
    data = bytearray((sound / "graphs/int4.onnx").read_bytes())
    data[position % len(data)] = byte
    try:
        scan_graph(memoryview(bytes(data)), "g")
    except BundleError as error:
        assert "not a readable ONNX file" in str(error)


def test_deeply_nested_graph():
    """Thousands of nested subgraphs end in an error, not in a stack overflow: none is even looked into."""
    payload = b""
    for _ in range(2000):
        for tag in (0x32, 0x2A, 0x0A):
            payload = bytes([tag]) + varint(len(payload)) + payload
    payload = b"\x08\x0a\x3a" + varint(len(payload)) + payload + b"\x42\x04\x0a\x00\x10\x15"
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        scan_graph(memoryview(payload), "g")


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# --- .tar ---------------------------------------------------------------------------------------------------


def pack(root, path, extra=(), skip=()):
    """A tar of the bundle; `extra` are (TarInfo, bytes)."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            name = file.relative_to(root).as_posix()
            if name not in skip:
                tar.add(file, f"./{name}", recursive=False)
        for info, data in extra:
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name, data=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def test_tar_unpacks_once(root, tmp_path):
    """A sound tar is unpacked under its bundle id, verified, and reused; a damaged copy is replaced."""
    archive = pack(root, tmp_path / "b.tar")
    target = unpack_bundle(archive, tmp_path / "cache").root
    bundle = open_bundle(target)
    assert target.name == bundle.manifest.bundle_id
    assert unpack_bundle(archive, tmp_path / "cache").root == target
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    (target / "golden/reasoner.json").write_text("x")
    assert unpack_bundle(archive, tmp_path / "cache").root == target and open_bundle(target) == bundle
    assert [p.name for p in target.parent.iterdir()] == [target.name]


BAD_MEMBERS = {
    "unlisted": (member("evil.txt", b"x"), "is not what"),
    "escapes": (member("../evil.txt", b"x"), "must be relative"),
    "absolute": (member("/var/evil.txt", b"x"), "must be relative"),
    "symlink": (member("evil", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a plain file"),
    "hard link": (member("evil", type=tarfile.LNKTYPE, linkname="manifest.json"), "not a plain file"),
    "fifo": (member("evil", type=tarfile.FIFOTYPE), "not a plain file"),
    "device": (member("evil", type=tarfile.CHRTYPE), "not a plain file"),
    "sparse": (member("evil", type=tarfile.GNUTYPE_SPARSE), ""),
    "twice": (member("manifest.json", b"x"), "twice"),
    "header bomb": (member("evil", pax_headers={"comment": "x" * (2 << 20)}), "tar header claims"),
}


@pytest.mark.parametrize("name", list(BAD_MEMBERS))
def test_hostile_tar_member(root, tmp_path, name):
    """Anything but listed plain files is refused and nothing is left behind, inside or outside the cache."""
    (info, data), expected = BAD_MEMBERS[name]
    archive = pack(root, tmp_path / "b.tar", extra=[(info, data)])
    assert expected in refused(unpack_bundle, archive, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*"))
    assert not (tmp_path / "evil.txt").exists()


def test_hostile_tar(root, tmp_path):
    """Not a tar, compressed, truncated, without a manifest or a file, or with a size that lies."""
    archive = tmp_path / "b.tar"
    cache = tmp_path / "cache"
    refused(unpack_bundle, tmp_path / "absent.tar", cache)
    archive.write_bytes(b"")
    refused(unpack_bundle, archive, cache)
    archive.write_bytes(b"x" * 5000)
    assert "not a readable .tar" in refused(unpack_bundle, archive, cache)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, ".")
    assert "not a readable .tar" in refused(unpack_bundle, archive, cache)
    data = pack(root, archive).read_bytes()
    for cut in (600, len(data) // 2, len(data) - 12_000):
        archive.write_bytes(data[:cut])
        refused(unpack_bundle, archive, cache)
    assert "holds no manifest" in refused(unpack_bundle, pack(root, archive, skip=["manifest.json"]), cache)
    assert "missing" in refused(unpack_bundle, pack(root, archive, skip=["graphs/int4.onnx.data"]), cache)
    big = tarfile.TarInfo("graphs/big")
    big.size = 1 << 40
    archive.write_bytes(big.tobuf(tarfile.GNU_FORMAT) + data)
    refused(unpack_bundle, archive, cache)
    assert not cache.exists() or not list(cache.rglob("*"))


def test_tar_with_a_flipped_byte(root, tmp_path):
    """Content that does not match the manifest never reaches the cache under its final name."""
    archive = pack(root, tmp_path / "b.tar")
    data = bytearray(archive.read_bytes())
    payload = (root / "graphs/int4.onnx.data").read_bytes()
    data[bytes(data).index(payload) + 100] ^= 1
    archive.write_bytes(data)
    assert "SHA-256" in refused(unpack_bundle, archive, tmp_path / "cache")
    assert not list((tmp_path / "cache/bundles").iterdir())
