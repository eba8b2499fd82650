"""Opens a bundle, trusting nothing in it.

After `open_bundle` returns: the manifest is canonical and matches its own digest; the directory holds
exactly the files that the manifest lists (besides `manifest.json` and `manifest.sig`), each a regular file of
the listed size (and SHA-256); no symlink exists inside; the figures of every spec are within bounds that no
real model exceeds; and every graph is one that the exporter writes, its weights in listed files.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from edge_reasoner.contract.bundle.graph_check import check_graph
from edge_reasoner.contract.bundle.manifest import (
    MANIFEST_NAME,
    MAX_FILES,
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
_MAX_LAYERS = 1024
_MAX_HEADS = 4096
_MAX_HEAD_DIM = 4096


@dataclass(frozen=True)
class Bundle:
    """A bundle whose content was checked. `root` is absolute with every symlink resolved."""

    root: Path
    manifest: Manifest

    def entry(self, relative: str) -> FileEntry:
        """The manifest's entry of a file. Raises BundleError if the manifest does not list it."""
        for entry in self.manifest.entries:
            if entry.path == relative:
                return entry
        raise BundleError(f"{self.root}: the manifest lists no file {relative!r}")

    def path_of(self, relative: str) -> Path:
        """Absolute path of a listed file. Raises BundleError if the manifest does not list it."""
        return self.root / self.entry(relative).path

    def read_bytes(self, relative: str, limit_bytes: int) -> bytes:
        """Content of a listed file of at most `limit_bytes`. Raises BundleError if it is larger or gone."""
        entry = self.entry(relative)
        if entry.size_bytes > limit_bytes:
            raise BundleError(f"{relative}: {entry.size_bytes} bytes; at most {limit_bytes} are allowed")
        with _open_regular(self.root, relative) as file:
            data = file.read(entry.size_bytes + 1)
        if len(data) != entry.size_bytes:
            raise BundleError(f"{relative}: its size changed since the bundle was opened")
        return data

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
    manifest = parse_manifest(_read_small(root, MANIFEST_NAME, MAX_MANIFEST_BYTES))
    for component in manifest.components:
        _check_spec(component)
        _check_tokenizer(component)
    entries = {entry.path: entry for entry in manifest.entries}
    _check_listing(root, entries)
    total_bytes = sum(entry.size_bytes for entry in entries.values())
    done_bytes = 0

    def advance(count_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += count_bytes
        if progress is not None:
            progress(done_bytes, total_bytes)

    for entry in entries.values():
        with _open_regular(root, entry.path) as file:
            if (size_bytes := os.fstat(file.fileno()).st_size) != entry.size_bytes:
                raise BundleError(f"{entry.path}: {size_bytes} bytes, the manifest says {entry.size_bytes}")
            if verify == "full":
                _check_hash(file, entry, advance)
    for component in manifest.components:
        known: Known = {}
        for graph in sorted({variant.graph for variant in component.variants}):
            _check_graph(root, graph, component, known)
    return Bundle(root, manifest)


def _root(path: Path) -> Path:
    try:
        root = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise BundleError(f"{path}: no such bundle directory") from error
    if not root.is_dir():
        hint = "; unpack the .tar first (edge-reasoner bundle unpack)" if path.suffix == ".tar" else ""
        raise BundleError(f"{path}: not a bundle directory{hint}")
    return root


def _open_regular(root: Path, relative: str) -> BinaryIO:
    """Opens a file for reading unless it is missing, a symlink or not regular."""
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        descriptor = os.open(root / relative, flags)
    except OSError as error:
        raise BundleError(f"{root / relative}: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{root / relative}: not a regular file")
    return os.fdopen(descriptor, "rb")


def _read_small(root: Path, relative: str, limit_bytes: int) -> bytes:
    with _open_regular(root, relative) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise BundleError(f"{relative}: larger than the {limit_bytes} bytes allowed")
    return data


def _check_listing(root: Path, entries: dict[str, FileEntry]) -> None:
    """The directory holds exactly the listed files; but for manifest and signature."""
    present: set[str] = set()
    for name in _walk(root):
        present.add(name)
        if name == SIGNATURE_NAME:
            _read_small(root, name, _MAX_SIGNATURE_BYTES)
        elif name != MANIFEST_NAME and name not in entries:
            raise BundleError(f"{root}: file {name!r} is not listed in {MANIFEST_NAME}")
    for name in entries:
        if name not in present:
            raise BundleError(f"{root}: file {name!r} is missing")


def _walk(root: Path) -> Iterator[str]:
    """Relative POSIX paths of all files, in a bounded walk that follows and accepts no symlink."""
    folders, seen = [""], 0
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as scan:
                for item in scan:
                    seen += 1
                    if seen > 2 * MAX_FILES:
                        raise BundleError(f"{root}: more than {2 * MAX_FILES} files and folders")
                    name = posixpath.join(folder, item.name)
                    if item.is_symlink():
                        raise BundleError(f"{root}: {name!r} is a symlink; a bundle holds plain files only")
                    if item.is_dir(follow_symlinks=False):
                        folders.append(name)
                    elif item.is_file(follow_symlinks=False):
                        yield name
                    else:
                        raise BundleError(f"{root}: {name!r} is not a regular file")
        except OSError as error:
            raise BundleError(f"{root / folder}: {error.strerror or error}") from error


def _check_hash(file: BinaryIO, entry: FileEntry, advance: Callable[[int], None]) -> None:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        advance(len(chunk))
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
    if not 1 <= len(spec.kv_heads) <= _MAX_LAYERS:
        raise BundleError(
            f"{where}: kv_heads has {len(spec.kv_heads)} layers; 1 to {_MAX_LAYERS} are allowed"
        )
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


def _check_graph(root: Path, graph: str, component: Component, known: Known) -> None:
    """It is what the exporter writes, and all that it would make the runtime open is the component's."""
    if not graph.endswith(".onnx"):
        raise BundleError(f"{MANIFEST_NAME}: graph {graph!r} must end in .onnx")
    listed = {entry.path: entry.size_bytes for entry in component.files}
    check_graph(_read_small(root, graph, MAX_GRAPH_BYTES), graph, component.spec, listed, known)
