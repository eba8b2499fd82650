"""Parameters that an endpoint refuses are renamed or dropped, once, and remembered."""

from __future__ import annotations

import json

import pytest
from support.hostile_cloud import GOOD, HEAD, scripted_cloud, status

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.errors import CloudProtocolError, CloudUnavailableError

ALL = SamplingParams(
    temperature=0.5,
    top_k=4,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    seed=3,
    stop=("lo",),
    max_tokens=50,
)


def _refusing(names: set[str], refusal: object, code: int = 400):
    """An endpoint that refuses requests with any of the names."""
    body = refusal if isinstance(refusal, bytes) else json.dumps(refusal).encode()
    return lambda head, sent: status(code, body=body) if names & set(json.loads(sent)) else GOOD


def _openai(message: str, param: str | None = None, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


@pytest.mark.parametrize(
    ("name", "refusal", "code"),
    [
        ("seed", _openai("no", "seed", "unsupported_parameter"), 400),
        ("stream_options", _openai("no", "stream_options.include_usage"), 400),
        ("top_k", _openai("Unrecognized request argument supplied: top_k"), 400),
        ("repetition_penalty", _openai("Property 'repetition_penalty' is unsupported"), 400),
        (
            "temperature",
            {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]},
            422,
        ),
        ("min_p", {"detail": "Unknown parameter: min_p"}, 422),
        ("top_p", {"message": "unknown field `top_p`"}, 400),
        (
            "stream_options",
            {"object": "error", "message": {"detail": [{"loc": ["body", "stream_options"]}]}},
            422,
        ),
        ("seed", {"message": "extraneous key [seed] is not permitted"}, 400),
        (
            "top_p",
            {"error": "Input validation error: `top_p` must be < 1.0", "error_type": "validation"},
            422,
        ),
        ("max_tokens", _openai("max_tokens: must be at least 64"), 400),
        ("seed", [{"error": {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}}], 400),
        ("stop", b"parameter stop is not allowed", 400),
        ("seed", _openai('upstream: {"error": {"message": "bad", "param": "seed"}}'), 400),
        ("top_k", {"error": {"message": "failed", "metadata": {"raw": '{"message": "no top_k here"}'}}}, 400),
        ("stream", _openai("'stream' does not support true with this model.", "stream"), 400),
        ("stream", _openai("Streaming is not supported for this model"), 400),
        ("stream", _openai("This model does not support streaming."), 400),
        ("stop", _openai("Stop sequences are not supported by this model"), 400),
        ("stop", {"error": "Argument not supported on this model: stop"}, 400),
        ("seed", {"type": "error", "error": {"message": "seed: Extra inputs are not permitted"}}, 400),
        ("top_k", _openai("Unsupported field: topK"), 400),
        ("top_k", _openai("参数top_k不支持"), 400),
        ("max_tokens", {"error": "`inputs` tokens + `max_new_tokens` must be <= 32"}, 422),
        # what would be taken is not what is refused
        ("top_k", b"unknown field `top_k`, expected one of `temperature`, `top_p`, `max_tokens`", 422),
        ("top_k", _openai("Unknown parameter top_k. Supported parameters: temperature, top_p"), 400),
        ("stream_options", _openai("property 'stream_options' is unsupported, did you mean 'stream'?"), 400),
        # where the name stands
        ("min_p", {"min_p": ["This field is not allowed."]}, 400),
        ("min_p", {"errors": {"$.min_p": ["could not be mapped"]}}, 400),
        ("top_k", {"error": {"message": {"top_k": ["is not allowed"]}}}, 422),
        ("top_k", {"error": {"issues": [{"code": "unrecognized_keys", "keys": ["top_k"]}]}}, 400),
        ("top_k", {"errors": [{"source": {"pointer": "/top_k"}, "title": "Invalid"}]}, 422),
        ("min_p", {"errors": [{"params": {"additionalProperty": "min_p"}}]}, 400),
        ("top_k", {"error": {"details": [{"fieldViolations": [{"field": "generation_config.top_k"}]}]}}, 400),
        ("seed", {"error": {"cause": '{"error": {"param": "seed"}}', "message": "failed"}}, 400),
        # other ways to refuse
        ("top_k", _openai("Unsupported parameter: 'top_k'"), 500),
        ("min_p", {"detail": "create() got an unexpected keyword argument 'min_p'"}, 500),
        ("stream", _openai("stream is not supported"), 501),
        ("seed", _openai("parameter 'seed' is not supported"), 403),
        ("temperature", _openai("'temperature' does not support 0.5 with this model", "temperature"), 200),
    ],
)
def test_a_refused_parameter_is_dropped(ask, name, refusal, code) -> None:
    """However the endpoint says it, what it names is left out of the next request, and nothing else."""
    with scripted_cloud(_refusing({name}, refusal, code)) as server:
        assert ask(server.url, ALL).text in ("Hello", "Hel")
        first, second = server.posts
    missing = {name, "stream_options"} if name == "stream" else {name}
    assert set(first) - set(second) == missing and set(second) < set(first)


def test_a_refusal_in_a_stream_counts_too(ask) -> None:
    """A gateway that began a stream reports the refusal of the server behind it inside."""
    raw = json.dumps(_openai("Unsupported parameter: 'top_k'", "top_k"))
    event = {"choices": [], "error": {"code": 400, "message": "provider", "metadata": {"raw": raw}}}
    refusal = HEAD + b"data: " + json.dumps(event).encode() + b"\n\n"
    with scripted_cloud(lambda head, sent: refusal if "top_k" in json.loads(sent) else GOOD) as server:
        assert ask(server.url, ALL).text in ("Hello", "Hel")
        assert set(server.posts[0]) - set(server.posts[1]) == {"top_k"}


def test_a_server_that_is_down_keeps_its_parameters(ask) -> None:
    """A failure of the server that names a parameter in passing is no refusal of it."""
    body = json.dumps(_openai("worker crashed at max_tokens 50, temperature 0.5")).encode()
    with scripted_cloud(lambda head, sent: status(500, body=body)) as server:
        with pytest.raises(CloudUnavailableError):
            ask(server.url, ALL)
        assert server.posts[0] == server.posts[-1]


def test_max_tokens_has_two_names(ask) -> None:
    """The limit is kept under its other name."""
    refusal = _openai(
        "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens"
    )
    with scripted_cloud(_refusing({"max_tokens"}, refusal)) as server:
        ask(server.url, ALL)
        assert [post.get("max_completion_tokens") for post in server.posts] == [None, 50]
    both = _openai("unknown parameter: 'max_tokens' or 'max_completion_tokens'")
    with scripted_cloud(_refusing({"max_tokens", "max_completion_tokens"}, both)) as server:
        ask(server.url, ALL)
        assert not {"max_tokens", "max_completion_tokens"} & set(server.posts[-1])


def test_several_at_once(ask) -> None:
    """A refusal that lists several parameters costs one repetition."""
    detail = {"detail": [{"loc": ["body", name], "msg": "no"} for name in ("top_k", "min_p", "seed")]}
    with scripted_cloud(_refusing({"top_k", "min_p", "seed"}, detail, 422)) as server:
        ask(server.url, ALL)
        assert len(server.posts) == 2


def test_of_two_that_exclude_each_other_the_idle_one_goes(ask) -> None:
    """The temperature asked for is kept; top_p 1 said nothing."""
    refusal = _openai("`temperature` and `top_p` cannot both be specified for this model")
    both = {"temperature", "top_p"}
    with scripted_cloud(
        lambda head, sent: (
            status(400, body=json.dumps(refusal).encode()) if both <= set(json.loads(sent)) else GOOD
        )
    ) as server:
        ask(server.url, SamplingParams(temperature=0.5))
        assert server.posts[-1]["temperature"] == 0.5


def test_what_was_refused_is_remembered() -> None:
    """A later request over the same client begins with what the endpoint takes."""
    with scripted_cloud(_refusing({"seed"}, _openai("no", "seed"))) as server:
        model = OpenAIModel(CloudOptions(server.url, model="m"))
        for _ in range(3):
            model.submit(ChatRequest(({"role": "user", "content": "hi"},), params=ALL)).result()
        model.close()
        assert ["seed" in post for post in server.posts] == [True, False, False, False]


def test_a_refused_value_is_remembered_as_a_value() -> None:
    """Temperature 0 is refused, 1 is not: only 0 is left out next time. A limit is never remembered."""

    def reply(head: bytes, body: bytes) -> bytes:
        sent = json.loads(body)
        if sent.get("temperature", 1) != 1:
            text = "Unsupported value: 'temperature' does not support 0. Only the default (1) is supported."
            return status(400, body=json.dumps(_openai(text, "temperature", "unsupported_value")).encode())
        if sent.get("max_tokens", 0) > 100:
            text = "max_tokens is too large: at most 100 are supported"
            return status(400, body=json.dumps(_openai(text, "max_tokens")).encode())
        return GOOD

    with scripted_cloud(reply) as server:
        model = OpenAIModel(CloudOptions(server.url, model="m"))
        for temperature, limit in ((0.0, 9), (0.0, 9), (1.0, 900), (1.0, 9)):
            params = SamplingParams(temperature=temperature, max_tokens=limit)
            model.submit(ChatRequest(({"role": "user", "content": "hi"},), params=params)).result()
        model.close()
        sent = [(post.get("temperature"), post.get("max_tokens")) for post in server.posts]
    assert sent == [(0.0, 9), (None, 9), (None, 9), (1.0, 900), (1.0, None), (1.0, 9)]


def test_stop_strings_hold_where_the_endpoint_knows_none(ask) -> None:
    """Dropped stop strings are applied here."""
    with scripted_cloud(_refusing({"stop"}, _openai("no", "stop"))) as server:
        result = ask(server.url, SamplingParams(stop=("lo",)))
    assert (result.text, result.finish_reason) == ("Hel", "stop")


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (_openai("Invalid messages: reduce max_tokens", "messages"), "reduce max_tokens"),
        ({"detail": [{"loc": ["body", "messages"], "msg": "no such thing"}]}, "no such thing"),
        (_openai("please stop: no seed money for a stream"), "please stop"),
        (b"<html>max_tokens</html>", "HTTP 400"),
    ],
)
def test_other_refusals_are_shown_and_not_repeated(ask, refusal, said) -> None:
    """A refusal that is about no parameter ends the request at once."""
    body = refusal if isinstance(refusal, bytes) else json.dumps(refusal).encode()
    with scripted_cloud(lambda head, sent: status(400, body=body)) as server:
        with pytest.raises(CloudProtocolError, match=said):
            ask(server.url, ALL)
        assert len(server.posts) == 1


def test_fields_of_the_caller_are_never_touched() -> None:
    """What was asked for by name is refused openly; an endpoint that refuses everything is bounded."""
    with scripted_cloud(_refusing({"seed"}, _openai("no", "seed"))) as server:
        model = OpenAIModel(CloudOptions(server.url, model="m"))
        request = ChatRequest(({"role": "user", "content": "hi"},), extra={"seed": 5})
        with pytest.raises(CloudProtocolError):
            model.submit(request).result()
        model.close()
    everything = _openai(
        "'seed' 'stop' temperature top_p top_k min_p repetition_penalty max_tokens stream_options"
    )
    with scripted_cloud(lambda head, sent: status(400, body=json.dumps(everything).encode())) as server:
        model = OpenAIModel(CloudOptions(server.url, model="m"))
        with pytest.raises(CloudProtocolError):
            model.submit(ChatRequest(({"role": "user", "content": "hi"},), params=ALL)).result()
        model.close()
        assert len(server.posts) <= 13
