"""Opens a bundle, trusting nothing in it.

After `open_bundle` returns: the manifest is canonical and matches its own digest; the directory holds
exactly the files that the manifest lists (besides `manifest.json` and `manifest.sig`), each a regular file of
the listed size (and SHA-256); no symlink exists inside; the figures of every spec are within bounds that no
real model exceeds; and every graph is one that the exporter writes, its weights in listed files. What is read
from the bundle later is what was checked, or refused: see `held`.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

from edge_reasoner.contract.bundle.graph_check import check_graph
from edge_reasoner.contract.bundle.held import HeldFile, HeldFolder, HeldGraph, Identity, read_checked
from edge_reasoner.contract.bundle.manifest import (
    MANIFEST_NAME,
    MAX_FILES,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    Component,
    DecoderSpec,
    EncoderSpec,
    FileEntry,
    Manifest,
    parse_manifest,
)
from edge_reasoner.contract.bundle.onnx_scan import MAX_GRAPH_BYTES, Known
from edge_reasoner.errors import BundleError

SIGNATURE_NAME = "manifest.sig"
#: (bytes hashed so far, bytes in all). Not the exporter's `Progress`, which names the step under way: hashing
#: is one step, and a caller here shows one bar of bytes.
ByteProgress = Callable[[int, int], None]

_CHUNK_BYTES = 1 << 20
_MAX_SIGNATURE_BYTES = 64 * 1024
#: (field, largest allowed): far above any model that exists, far below what breaks an allocation or an index
_SPEC_LIMITS = {"vocab_size": 1 << 22, "context_tokens": 1 << 24, "parameters": 1 << 43}
_DECODER_LIMITS = {**_SPEC_LIMITS, "hidden_size": 1 << 20}
_ENCODER_LIMITS = {**_SPEC_LIMITS, "dimension": 1 << 16}
_MAX_HEADS = 4096
_MAX_HEAD_DIM = 4096


@dataclass(frozen=True)
class Bundle:
    """A bundle whose content was checked. `root` is absolute with every symlink resolved."""

    root: Path
    manifest: Manifest
    #: the folder itself, held open
    folder: HeldFolder = field(compare=False, repr=False)
    #: path of a listed file -> what was checked
    seen: Mapping[str, Identity] = field(compare=False, repr=False)
    #: path of a graph -> the files of its weights
    weights: Mapping[str, tuple[str, ...]] = field(compare=False, repr=False)

    def entry(self, relative: str) -> FileEntry:
        """The manifest's entry of a file. Raises BundleError if the manifest does not list it."""
        for entry in self.manifest.entries:
            if entry.path == relative:
                return entry
        raise BundleError(f"{self.root}: the manifest lists no file {relative!r}")

    def path_of(self, relative: str) -> Path:
        """Absolute path of a listed file, to be shown. Raises BundleError if it is not listed."""
        return self.root / self.entry(relative).path

    def read_bytes(self, relative: str, limit_bytes: int) -> bytes:
        """Content of a listed file of at most `limit_bytes`, compared with its digest. Raises BundleError if
        it is larger, gone or another."""
        entry = self.entry(relative)
        if entry.size_bytes > limit_bytes:
            raise BundleError(f"{relative}: {entry.size_bytes} bytes; at most {limit_bytes} are allowed")
        return read_checked(self.folder, relative, entry.size_bytes, entry.sha256)

    def graph(self, relative: str) -> HeldGraph:
        """A graph for the runtime, its weights held open. Raises BundleError where they are not what was
        checked."""
        data = self.read_bytes(relative, MAX_GRAPH_BYTES)
        return HeldGraph(
            path=self.path_of(relative),
            data=data,
            root=self.folder,
            folder=self.folder.folder(posixpath.dirname(relative)),
            weights=tuple(HeldFile(self.folder, name, self.seen[name]) for name in self.weights[relative]),
        )

    def moved(self, root: Path) -> Bundle:
        """The same bundle, whose folder was renamed to `root`."""
        return replace(self, root=root, folder=self.folder.at(root))

    def component(self, kind: str) -> Component:
        """The component of that kind. Raises BundleError naming the kinds that exist."""
        for component in self.manifest.components:
            if component.kind == kind:
                return component
        kinds = ", ".join(c.kind for c in self.manifest.components) or "none"
        raise BundleError(f"{self.root}: no component {kind!r}; it has: {kinds}")


def open_bundle(
    path: str | os.PathLike[str],
    verify: Literal["full", "sizes"] = "full",
    *,
    progress: ByteProgress | None = None,
) -> Bundle:
    """Opens the bundle directory `path` and checks it.

    `verify="sizes"` skips hashing the files' content (for a bundle verified before, on a trusted disk);
    everything else is checked all the same. `progress` is called while hashing. Raises BundleError.
    """
    root = _root(Path(path))
    folder = HeldFolder(root)
    manifest = parse_manifest(folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES))
    for component in manifest.components:
        _check_spec(component)
        _check_tokenizer(component)
    entries = {entry.path: entry for entry in manifest.entries}
    _check_listing(folder, entries)
    total_bytes = sum(entry.size_bytes for entry in entries.values())
    done_bytes = 0

    def advance(count_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += count_bytes
        if progress is not None:
            progress(done_bytes, total_bytes)

    seen = {path: _check_file(folder, entry, verify, advance) for path, entry in entries.items()}
    weights = {}
    for component in manifest.components:
        known: Known = {}
        for graph in sorted({variant.graph for variant in component.variants}):
            weights[graph] = _check_graph(folder, graph, component, known)
    return Bundle(root, manifest, folder, seen, weights)


def _root(path: Path) -> Path:
    try:
        root = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise BundleError(f"{path}: no such bundle directory") from error
    if not root.is_dir():
        hint = "; unpack the .tar first (edge-reasoner bundle unpack)" if path.suffix == ".tar" else ""
        raise BundleError(f"{path}: not a bundle directory{hint}")
    return root


def _check_listing(folder: HeldFolder, entries: dict[str, FileEntry]) -> None:
    """The directory holds exactly the listed files; but for manifest and signature."""
    present: set[str] = set()
    root = folder.path
    for name in _walk(folder):
        present.add(name)
        if name == SIGNATURE_NAME:
            folder.read(name, _MAX_SIGNATURE_BYTES)
        elif name != MANIFEST_NAME and name not in entries:
            raise BundleError(f"{root}: file {name!r} is not listed in {MANIFEST_NAME}")
    for name in entries:
        if name not in present:
            raise BundleError(f"{root}: file {name!r} is missing")


def _walk(root: HeldFolder) -> Iterator[str]:
    """Relative POSIX paths of all files, in a bounded walk that follows and accepts no symlink."""
    folders, seen = [""], 0
    while folders:
        folder = folders.pop()
        try:
            for item in root.folder(folder).scan():
                seen += 1
                if seen > 2 * MAX_FILES:
                    raise BundleError(f"{root.path}: more than {2 * MAX_FILES} files and folders")
                name = posixpath.join(folder, item.name)
                if item.is_symlink():
                    raise BundleError(f"{root.path}: {name!r} is a symlink; a bundle holds plain files only")
                if item.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif item.is_file(follow_symlinks=False):
                    yield name
                else:
                    raise BundleError(f"{root.path}: {name!r} is not a regular file")
        except OSError as error:
            raise BundleError(f"{root.path / folder}: {error.strerror or error}") from error


def _check_file(
    folder: HeldFolder, entry: FileEntry, verify: str, advance: Callable[[int], None]
) -> Identity:
    """The identity of a file that is as listed, and was so all the time."""
    with folder.open(entry.path) as file:
        identity = Identity.of(os.fstat(file.fileno()))
        if identity.size_bytes != entry.size_bytes:
            raise BundleError(
                f"{entry.path}: {identity.size_bytes} bytes, the manifest says {entry.size_bytes}"
            )
        if verify == "full":
            _check_hash(file, entry, advance)
        if Identity.of(os.fstat(file.fileno())) != identity:
            raise BundleError(f"{entry.path}: was changed while it was checked")
    return identity


def _check_hash(file: BinaryIO, entry: FileEntry, advance: Callable[[int], None]) -> None:
    digest = hashlib.sha256()
    try:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    except OSError as error:
        raise BundleError(f"{entry.path}: cannot be read: {error.strerror or error}") from error
    if digest.hexdigest() != entry.sha256:
        raise BundleError(f"{entry.path}: its content does not match the manifest's SHA-256")


def _check_spec(component: Component) -> None:
    where, spec = f"{MANIFEST_NAME}: component {component.kind!r}: spec", component.spec
    limits = _DECODER_LIMITS if isinstance(spec, DecoderSpec) else _ENCODER_LIMITS
    for name, limit in limits.items():
        if (value := getattr(spec, name)) > limit:
            raise BundleError(f"{where}: {name} is {value}; at most {limit} is allowed")
    if isinstance(spec, EncoderSpec):
        return
    if not spec.kv_heads:
        raise BundleError(f"{where}: kv_heads has 0 layers; 1 to {MAX_LAYERS} are allowed")
    for name, values, limit in (
        ("kv_heads", spec.kv_heads, _MAX_HEADS),
        ("head_dim", spec.head_dim, _MAX_HEAD_DIM),
    ):
        if max(values) > limit:
            raise BundleError(f"{where}: {name} has {max(values)}; at most {limit} is allowed")
    bos = () if spec.bos_token_id is None else (spec.bos_token_id,)
    for name, token_ids in (("eos_token_ids", spec.eos_token_ids), ("bos_token_id", bos)):
        if (highest := max(token_ids, default=0)) >= spec.vocab_size:
            raise BundleError(
                f"{where}: {name}: {highest} is outside the vocabulary of {spec.vocab_size} tokens"
            )


def _check_tokenizer(component: Component) -> None:
    name = f"{component.tokenizer}/tokenizer.json"
    if not any(entry.path == name for entry in component.files):
        raise BundleError(
            f"{MANIFEST_NAME}: component {component.kind!r}: tokenizer: {name!r} is not among its files"
        )


def _check_graph(folder: HeldFolder, graph: str, component: Component, known: Known) -> tuple[str, ...]:
    """The files of the graph's weights: it is what the exporter writes, and they are the component's."""
    if not graph.endswith(".onnx"):
        raise BundleError(f"{MANIFEST_NAME}: graph {graph!r} must end in .onnx")
    listed = {entry.path: entry for entry in component.files}
    entry = listed[graph]
    if entry.size_bytes > MAX_GRAPH_BYTES:
        raise BundleError(f"{graph}: {entry.size_bytes} bytes; a graph has at most {MAX_GRAPH_BYTES}")
    data = read_checked(folder, graph, entry.size_bytes, entry.sha256)
    sizes = {path: entry.size_bytes for path, entry in listed.items()}
    return check_graph(data, graph, component.spec, sizes, known)
