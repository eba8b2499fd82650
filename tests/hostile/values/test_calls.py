"""Every parameter of every public call, on a tiny bundle: an answer, or an error of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile.values.odd import check_odd
from support.answering_bundle import write_answering_bundle
from support.tiny_checkpoints import write_checkpoint

from edge_export import ExportOptions, export
from edge_reasoner import InferenceClient, Reasoner
from edge_reasoner.query.answer import Answer

URL = "http://127.0.0.1:1/v1"
SHORT = {"max_tokens": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle whose self-test has run."""
    return write_answering_bundle(tmp_path_factory.mktemp("bundles") / "tiny", exact=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The cache of everything here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _elsewhere(cache, tmp_path, monkeypatch) -> None:
    """Names of files that come out of odd values are made in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_REASONER_CACHE", str(cache))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def reasoner(bundle, cache):
    """Opened as usual."""
    with Reasoner.open(bundle, mode="local", cache_dir=cache, threads=1) as opened:
        yield opened


OPEN = (
    *("bundle", "cloud", "cloud_model", "protocol", "api_key_env", "cloud_limits", "price", "mode"),
    *("context_tokens", "policy", "power_w", "cache_dir", "environment"),
)


@pytest.mark.parametrize("parameter", OPEN)
def test_open(parameter, bundle, cache):
    """`Reasoner.open`, without the bundle's own work where it does not matter."""
    sound: dict[str, Any] = {"bundle": bundle, "cache_dir": cache, "cloud": URL, "mode": "cloud"}
    if parameter in ("bundle", "context_tokens"):
        sound |= {"mode": "local", "threads": 1}
    path = parameter in ("bundle", "cache_dir")
    check_odd(lambda **given: Reasoner.open(**given).close(), sound, parameter, path=path)


def test_open_threads(bundle, cache):
    """Counts that no machine has are refused before a thread is started."""
    sound = {"bundle": bundle, "cache_dir": cache, "mode": "local"}
    taken = check_odd(lambda **given: Reasoner.open(**given).close(), sound, "threads")
    assert taken == [1, None]


def _asked(reasoner: Reasoner, **given: Any) -> None:
    answer = reasoner.ask(**given)
    assert isinstance(answer, Answer)
    answer.to_dict()


@pytest.mark.parametrize("parameter", ["prompt", "params", "mode", "context_tokens", "seed", "stop", "odd"])
def test_ask(parameter, reasoner):
    """`ask`, by name too."""
    sound = {"prompt": "hi", **({} if parameter == "params" else SHORT)}
    check_odd(lambda **given: _asked(reasoner, **given), sound, parameter)


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "repetition_penalty", "top_k", "max_tokens"]
)
def test_ask_with_odd_sampling(name, reasoner):
    """Legal extremes answer."""
    sound = {"prompt": "hi", "temperature": 1.0, "context_tokens": 64, **SHORT}
    taken = check_odd(lambda **given: _asked(reasoner, **given), sound, name)
    assert taken
    if name == "temperature":
        texts = {reasoner.ask("hi", temperature=value, **SHORT).text for value in (0.0, 5e-324, 1e-30)}
        assert len(texts) == 1


@pytest.mark.parametrize("field", ["role", "content", "name", "tool_calls", "reasoning_content"])
def test_fields_of_messages(field, reasoner):
    """A message's fields, in every call that takes messages."""

    def ask(value: object) -> None:
        _asked(reasoner, prompt=[{"role": "user", "content": "hi", field: value}], **SHORT)

    check_odd(ask, {}, "value")


def test_stream_map_and_session(reasoner):
    """The other ways to ask."""
    check_odd(lambda prompt: reasoner.stream(prompt, **SHORT).result(), {}, "prompt")
    check_odd(lambda prompts: reasoner.map(prompts, **SHORT), {}, "prompts")
    check_odd(lambda system: reasoner.session(system).ask("hi", **SHORT), {}, "system")
    check_odd(lambda prompt: list(reasoner.session().stream(prompt, **SHORT)), {}, "prompt")
    check_odd(lambda messages: reasoner.prefill_ahead(messages), {}, "messages")


@pytest.mark.parametrize("parameter", ["api_key", "model_name", "endpoint"])
def test_client(parameter):
    """`InferenceClient`'s own parameters."""
    path = parameter == "endpoint"
    check_odd(lambda **given: InferenceClient(**given).close(), {"endpoint": URL}, parameter, path=path)


def test_infer(bundle):
    """What is asked of a client."""
    with InferenceClient(endpoint=bundle) as client:
        check_odd(client.infer, {"parameters": SHORT}, "prompt")
        check_odd(client.infer, {"prompt": "hi"}, "parameters")
        for name in ("attention_window", "temperature", "stop", "max_tokens"):
            check_odd(
                lambda value, name=name: client.infer("hi", {"attention_window": 64, **SHORT, name: value}),
                {},
                "value",
            )


@pytest.mark.parametrize("parameter", ["model", "profile", "out", "options", "progress", "cache"])
def test_export(parameter, tmp_path_factory, tmp_path):
    """The exporter's twin of its command; only `--dry-run` where it could succeed."""
    model = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(model, num_hidden_layers=1)
    sound = {
        "model": str(model),
        "profile": "generic-x86",
        "out": tmp_path / "out",
        "options": ExportOptions(dry_run=True, recipe="fp32"),
    }
    path = parameter in ("model", "profile", "out", "cache")
    check_odd(export, sound, parameter, path=path)
