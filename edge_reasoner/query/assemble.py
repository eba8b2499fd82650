"""From an opened bundle to the parts that answer: shared by the `Reasoner` and the reference cloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from edge_reasoner.activation.activate import activate
from edge_reasoner.activation.store import Activation
from edge_reasoner.contract.bundle.manifest import Component, ComponentKind, DecoderSpec, Manifest
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.contract.bundle.tokenizer_files import (
    MAX_TOKENIZER_BYTES,
    MAX_TOKENIZER_CONFIG_BYTES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TokenizerConfig,
    parse_tokenizer_config,
)
from edge_reasoner.contract.template.render import MAX_TEMPLATE_BYTES, TEMPLATE_FILE, ChatTemplate
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.engine.loop import Engine, EngineLimits
from edge_reasoner.engine.prefix import CacheLimits
from edge_reasoner.engine.tokens import TextTokenizer
from edge_reasoner.errors import BundleError, TemplateError
from edge_reasoner.files import decode_text
from edge_reasoner.machine.allowance import allowance
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.device import DeviceParts

#: Where the model's own context is longer, this bounds the KV cache unless the caller asks for more.
DEFAULT_CONTEXT_TOKENS = 4096
#: KV caches are kept in this part of the memory: 1/4
_CACHE_SHARE = 4


@dataclass(frozen=True)
class Machine:
    """What opening a component needs of the world around it."""

    threads: int
    #: None: nothing is cached
    cache_dir: Path | None
    clock: Callable[[], float] = time.perf_counter
    now: Callable[[], datetime] = datetime.now


class _Closable(Protocol):
    def close(self) -> None: ...


def default_threads() -> int:
    """Threads that the machine's `allowance` gives this process."""
    return allowance().threads


def open_local_model(
    bundle: Bundle,
    machine: Machine,
    *,
    kind: ComponentKind = "reasoner",
    context_tokens: int | None = None,
    has_cloud: bool = False,
) -> tuple[LocalModel, Activation]:
    """Opens a decoder component. Raises BundleError, TemplateError and what `activate` raises.

    With `has_cloud` a template that cannot be used is no error yet: it excludes the local model from each
    chat.
    """
    component = bundle.component(kind)
    spec = component.spec
    if not isinstance(spec, DecoderSpec):
        raise BundleError(f"{bundle.root}: component {kind!r} is not a decoder")
    tokenizer = open_tokenizer(bundle, component)
    template: ChatTemplate | TemplateError | None
    try:
        template = _open_template(bundle, component, tokenizer.config, machine)
    except TemplateError as error:
        if not has_cloud:
            raise
        template = error
    activated = activate(bundle, kind, threads=machine.threads, cache_dir=machine.cache_dir)
    with closed_on_failure(activated.model):
        engine = Engine(
            activated.decoder,
            tokenizer,
            name=component.name,
            eos_token_ids=spec.eos_token_ids,
            clock=machine.clock,
            limits=EngineLimits(caches=CacheLimits(bytes=_cache_bytes())),
            kv_bytes_per_token=spec.kv_bytes_per_token,
            context_tokens=context_tokens or min(spec.context_tokens, DEFAULT_CONTEXT_TOKENS),
        )
    bos = spec.bos_token_id if spec.bos_token_id is not None else tokenizer.bos_id
    model = LocalModel(engine, template, bos_token_id=bos)
    return model, activated.activation


def _cache_bytes() -> int | None:
    """What kept KV caches may take of the memory that this process may use; None where that is unknown."""
    memory_bytes = allowance().memory_bytes
    return None if memory_bytes is None else memory_bytes // _CACHE_SHARE


def open_device(
    bundle: Bundle, machine: Machine, *, context_tokens: int | None = None, has_cloud: bool = False
) -> DeviceParts:
    """Everything that answers on the device. Raises what `open_local_model` and `open_preprocessor` raise."""
    model, activation = open_local_model(bundle, machine, context_tokens=context_tokens, has_cloud=has_cloud)
    with closed_on_failure(model):
        preprocessor = open_preprocessor(bundle, machine)
    return DeviceParts(model, preprocessor, activation, _predicted_power_w(bundle.manifest))


def open_preprocessor(bundle: Bundle, machine: Machine) -> Preprocessor:
    """The bundle's preprocessor; without such a component one that computes features only."""
    component = bundle.manifest.component("preprocessor")
    if component is None:
        return Preprocessor(None, None, clock=machine.clock)
    tokenizer = open_tokenizer(bundle, component)
    activated = activate(bundle, "preprocessor", threads=machine.threads, cache_dir=machine.cache_dir)
    return Preprocessor(activated.encoder, tokenizer, clock=machine.clock)


@contextmanager
def closed_on_failure(opened: _Closable) -> Iterator[None]:
    """What was opened is closed where the step after it fails: the caller never gets to hold it."""
    try:
        yield
    except BaseException:
        opened.close()
        raise


def open_tokenizer(bundle: Bundle, component: Component) -> TextTokenizer:
    """The component's tokenizer. Raises BundleError."""
    path = f"{component.tokenizer}/{TOKENIZER_FILE}"
    config_path = f"{component.tokenizer}/{TOKENIZER_CONFIG_FILE}"
    config = TokenizerConfig()
    if _has(component, config_path):
        config = parse_tokenizer_config(
            bundle.read_bytes(config_path, MAX_TOKENIZER_CONFIG_BYTES), config_path
        )
    return TextTokenizer.from_files(
        bundle.read_bytes(path, MAX_TOKENIZER_BYTES),
        config,
        where=path,
        vocab_size=component.spec.vocab_size,
    )


def _open_template(
    bundle: Bundle, component: Component, config: TokenizerConfig, machine: Machine
) -> ChatTemplate | None:
    path = f"{component.tokenizer}/{TEMPLATE_FILE}"
    if not _has(component, path):
        return None
    source = decode_text(bundle.read_bytes(path, MAX_TEMPLATE_BYTES), path, error=TemplateError)
    return ChatTemplate(source, special_tokens=config.special_tokens(), clock=machine.clock, now=machine.now)


def _has(component: Component, path: str) -> bool:
    return any(entry.path == path for entry in component.files)


def _predicted_power_w(manifest: Manifest) -> float | None:
    component = manifest.component("reasoner")
    predicted = None if component is None else component.predicted
    if predicted is None or predicted.joules_per_token is None or predicted.decode_tps is None:
        return None
    return predicted.joules_per_token * predicted.decode_tps
