"""MODEL as given on the command line → a path: local, or downloaded from the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edge_reasoner.errors import CheckpointError, one_line
from edge_reasoner.files import exists
from edge_reasoner.machine.quiet import silence_telemetry

silence_telemetry(os.environ)  # the library reads it while it is imported: no later place is early enough
from huggingface_hub import snapshot_download  # noqa: E402
from huggingface_hub.errors import (  # noqa: E402
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:/([A-Za-z0-9._/-]+\.gguf))?")
#: The Hub library's own error derives from that of its HTTP library, which has changed before (requests,
#: httpx, httpx2), so it is found through it. The rest is what an answer that is no Hub's answer leads to.
_HUB_FAILURES: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError, LookupError)
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", "LICENSE*"]
_UNWANTED = ["onnx/*", "openvino/*", "original/*", "*.bin", "*.h5"]


def _download(repository: str, file: str | None) -> Path:
    # One file too comes as a snapshot: hf_hub_download retries for 20 s when nobody listens.
    wanted = _WANTED if file is None else [file]
    snapshot = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    if file is not None and not (snapshot / file).is_file():
        raise CheckpointError(f"{repository}: the Hub's repository has no file {file!r}")
    return snapshot if file is None else snapshot / file


def resolve_model(model: str) -> Path:
    """The local path of MODEL: an existing path, `owner/name` or `owner/name/file.gguf` on the Hub.

    Downloads (or finds in the Hub's cache) what is not local. Raises CheckpointError in one line.
    """
    if not model.strip():
        raise CheckpointError("the model is an empty name; a path or a Hub id (owner/name) is needed")
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # "~" of a user that is not there
        path = Path(model)
    if exists(path):
        return path
    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise CheckpointError(
            f"{model[:200]}: there is no such file or directory, and it is not a Hub id (owner/name or "
            "owner/name/file.gguf)"
        )
    try:
        return _download(match[1], match[2])
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model}: the Hub wants its licence accepted first; then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{model}: not a local path, and the Hub has no such public model") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model}: not a local path, not in the Hub's cache, and the Hub cannot be reached"
        ) from error
    except _HUB_FAILURES as error:
        raise CheckpointError(
            f"{model}: not a local path, and the Hub did not deliver it: {one_line(error, 200)}"
        ) from error
