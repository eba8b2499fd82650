"""Opening a checkpoint, whatever its format: the one place later stages start from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec

from edge_export.checkpoint import files
from edge_export.checkpoint.chat_template_files import find_chat_template
from edge_export.checkpoint.digest import WeightsDigest, digest_of
from edge_export.checkpoint.foreign import weights_beside
from edge_export.checkpoint.gguf_decoder import load_gguf_decoder
from edge_export.checkpoint.gguf_file import GgufFile, MetadataValue, gguf_architecture
from edge_export.checkpoint.gguf_tokenizer import build_tokenizer
from edge_export.checkpoint.hf_decoder import load_hf_decoder
from edge_export.checkpoint.safetensors_files import weights_files
from edge_export.checkpoint.tokenizer import limit_vocabulary, load_tokenizer_files
from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_export.model.config import DecoderConfig, TensorSource
from edge_export.model.tensors import parameter_count
from edge_reasoner.errors import CheckpointError
from edge_reasoner.files import exists

#: `model_type` or `general.architecture` of the encoders that the encoder loader takes
ENCODER_TYPES = frozenset({"bert"})


#: how llama.cpp names the parts of a file
_SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class _ModelType(msgspec.Struct):
    model_type: str = ""


@dataclass(frozen=True)
class DecoderCheckpoint:
    """An opened causal LM: configuration checked, weights not yet read."""

    config: DecoderConfig
    source: TensorSource
    format: Literal["safetensors", "gguf"]
    #: a human's name for the model
    name: str
    #: the file or directory it was opened from
    path: Path
    weights_files: tuple[Path, ...]
    #: as the checkpoint states it (an SPDX-like id where it follows the Hub's habit), or None
    licence: str | None = None
    chat_template: str | None = None
    #: what the loader had to interpret or leave out; whole sentences
    warnings: tuple[str, ...] = ()
    #: a GGUF file's, which hold its tokenizer
    metadata: Mapping[str, MetadataValue] | None = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> TokenizerFiles:
        """The tokenizer, cut to the tokens that are embedded; read on first use. Raises CheckpointError."""
        if self.metadata is None:
            files = load_tokenizer_files(self.path)
        else:
            files = build_tokenizer(self.metadata, str(self.path))
        return limit_vocabulary(files, self.config.vocab_size)

    @property
    def parameters(self) -> int:
        """Number of parameters; tied embeddings count once."""
        return parameter_count(self.config)

    @cached_property
    def digest(self) -> WeightsDigest:
        """SHA-256 and size of the weights files; read on first use (seconds per gigabyte)."""
        return digest_of(self.weights_files)


def _text(file: GgufFile, key: str) -> str | None:
    value = file.metadata.get(key)
    return value if isinstance(value, str) and value.strip() else None


def _load_gguf(path: Path) -> DecoderCheckpoint:
    file = GgufFile(path)
    opened = load_gguf_decoder(file)
    return DecoderCheckpoint(
        config=opened.config,
        source=opened.source,
        warnings=opened.warnings,
        format="gguf",
        name=_text(file, "general.name") or _readable(path.stem),
        path=path,
        weights_files=opened.weights_files,
        licence=_text(file, "general.license"),
        chat_template=_text(file, "tokenizer.chat_template"),
        metadata=file.metadata,
    )


def _load_directory(path: Path) -> DecoderCheckpoint:
    opened = load_hf_decoder(path)
    template = find_chat_template(path)
    return DecoderCheckpoint(
        config=opened.config,
        source=opened.source,
        warnings=(*opened.warnings, *template.warnings),
        format="safetensors",
        name=_directory_name(path),
        path=path,
        weights_files=opened.weights_files,
        licence=files.licence(path),
        chat_template=template.text,
    )


def _directory_name(path: Path) -> str:
    """The directory's name; of a Hub snapshot (…/models--owner--name/snapshots/revision), owner/name."""
    resolved = path.resolve()
    if resolved.parent.name == "snapshots":
        return _readable(resolved.parent.parent.name.removeprefix("models--").replace("--", "/"))
    return _readable(resolved.name)


def _readable(name: str) -> str:
    """A file name as text: UTF-8 whatever the locale, what is not UTF-8 replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def _without_model(directory: Path) -> str:
    """What a directory holds that is no model's."""
    nothing = "neither a config.json nor a .gguf file"
    if (directory / "adapter_config.json").is_file():
        return f"{nothing}: it is an adapter (LoRA); merge it into its model first"
    if (directory / "snapshots").is_dir():
        return f"{nothing}: it is a folder of the Hub's cache; give the one below snapshots/, or owner/name"
    hint = weights_beside(directory)
    return nothing if hint is None else f"{nothing}; {hint}"


def find_model(path: Path) -> Path:
    """What to open for MODEL: a .gguf file, or a directory with config.json.

    A safetensors file stands for its directory; a directory whose only model is one .gguf, for that file.
    Raises CheckpointError if there is nothing to open or more than one candidate.
    """
    if not exists(path):
        raise CheckpointError(f"{path}: there is no such file or directory")
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        names = ", ".join(file.name for file in ggufs[:8])
        if ggufs and all(_SPLIT_NAME.search(file.name) for file in ggufs):
            raise CheckpointError(
                f"{path}: the directory holds a GGUF file in parts ({names}); join them with "
                "`llama-gguf-split --merge` and give the result"
            )
        found = f"several GGUF files, name one: {names}" if ggufs else _without_model(path)
        raise CheckpointError(f"{path}: the directory holds {found}")
    if path.suffix == ".safetensors":
        return _directory_of(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: neither a file nor a directory")
    return path


def _directory_of(weights: Path) -> Path:
    """The directory whose weights the file is. Raises CheckpointError for another file that lies in it."""
    directory = find_model(weights.parent)
    if directory.is_dir():
        read = [file.name for file in weights_files(directory)]
        if weights.name not in read:
            raise CheckpointError(
                f"{weights}: not the model's weights, which are in {read[0]} (merge an adapter "
                "into them first)"
            )
    return directory


def detect(path: Path) -> Literal["decoder", "encoder"]:
    """Whether a checkpoint is a causal LM or a sentence encoder. Raises CheckpointError if it is neither."""
    model = find_model(path)
    if model.is_dir():
        kind = files.read_json(model / "config.json", _ModelType).model_type
    else:
        kind = gguf_architecture(model)
    return "encoder" if kind in ENCODER_TYPES else "decoder"


def load_checkpoint(path: Path) -> DecoderCheckpoint:
    """Open a causal LM: a `.gguf` file, or a Hugging Face directory with config.json and safetensors.

    Reads headers only. Raises CheckpointError for anything missing, corrupt, truncated or unsupported.
    """
    model = find_model(path)
    return _load_directory(model) if model.is_dir() else _load_gguf(model)
