"""The tokenizer folder of a bundle: which files, how large, and what the strict config holds.

A tokenizer folder of a bundle holds

    tokenizer.json          the Hugging Face `tokenizers` definition (its truncation and padding are ignored)
    tokenizer_config.json   a `TokenizerConfig`: strict JSON, unknown fields refused
    chat_template.jinja     optional; see `contract/template/render.py`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_reasoner.contract.bundle.manifest import parse_strictly
from edge_reasoner.errors import BundleError, InputError, one_line

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
#: Gemma 3's tokenizer.json (262 k tokens with merges) is 33 MB.
MAX_TOKENIZER_BYTES = 96 * 1024 * 1024
MAX_TOKENIZER_CONFIG_BYTES = 64 * 1024

#: what the library raises besides bare exceptions
_FAULTS = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

TokenText = Annotated[str, Meta(min_length=1, max_length=200)]


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a tokenizer.json does not say: special tokens by role, as chat templates name them.

    `add_bos`: a raw prompt (no chat template) starts with `bos_token`. Templates write their own.
    """

    add_bos: bool = False
    bos_token: TokenText | None = None
    eos_token: TokenText | None = None
    unk_token: TokenText | None = None
    pad_token: TokenText | None = None

    def special_tokens(self) -> dict[str, str]:
        """The tokens that are set, under the names chat templates use (`bos_token`, `eos_token`, …)."""
        named = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "unk_token": self.unk_token,
            "pad_token": self.pad_token,
        }
        return {name: token for name, token in named.items() if token is not None}


def parse_tokenizer_config(data: bytes, where: str) -> TokenizerConfig:
    """Strictly parses `tokenizer_config.json`. Raises BundleError naming the field."""
    config = parse_strictly(data, TokenizerConfig, where, MAX_TOKENIZER_CONFIG_BYTES)
    if config.add_bos and config.bos_token is None:
        raise BundleError(f"{where}: add_bos is true but bos_token is not set")
    return config


@contextmanager
def tokenizer_faults(where: str, kind: type[InputError]) -> Iterator[None]:
    """Turns what the `tokenizers` library raises inside the block into one line of `kind`.

    The library has no error class of its own: it raises bare `Exception`s, and a panic inside it (on an
    inconsistent description) surfaces as a `BaseException` that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        bare = type(error) is Exception or isinstance(error, _FAULTS)
        if not bare and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{where}: not a usable tokenizer: {one_line(error)}") from error
