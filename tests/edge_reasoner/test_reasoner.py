"""The Reasoner on a scripted local model and real (misbehaving) clouds over loopback."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.hostile_cloud import GOOD, HEAD, event, hang, hostile_cloud, reset, send, status
from support.local_models import scripted_model

from edge_reasoner.chat.model import ChatModel, ChatRequest
from edge_reasoner.client import InferenceClient
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudLimits, CloudOptions, CloudPrice
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.engine.prefix import MIN_CHUNK_TOKENS
from edge_reasoner.errors import (
    BackendError,
    CloudUnavailableError,
    ContextOverflowError,
    InputError,
    TemplateError,
)
from edge_reasoner.gate.policy import Policy
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.device import Device
from edge_reasoner.reasoner import Reasoner
from edge_reasoner.server.reference import ReferenceModel, serving

EASY = "What is the capital of France?"
HARD = (
    "Prove step by step: if a train covers 120 km in 1.5 h, then 80 km in 2 h, and each stop takes 5 more "
    "minutes than the last, how many minutes does it need for 7 stops, and why?"
)
ANSWERS = {"capital": "Paris is the capital.", "train": "the fox", "longer": "the quick brown fox jumps " * 6}
#: far more time than a server on loopback takes, however busy the machine is
LIMITS = CloudLimits(connect_s=20.0, read_s=20.0, total_s=60.0, attempts=2, backoff_base_s=0.01)
#: for clouds that fall silent
IMPATIENT = replace(LIMITS, read_s=0.4, total_s=1.5)


@contextlib.contextmanager
def _reasoner(
    url: str | None = None,
    *,
    sure: bool = True,
    context_tokens: int = 512,
    limits: CloudLimits = LIMITS,
    **options,
) -> Iterator[Reasoner]:
    cloud = None if url is None else connect(CloudOptions(url, model="big", limits=limits))
    local = scripted_model(ANSWERS, sure=sure, context_tokens=context_tokens)
    preprocessor = Preprocessor(None, None, clock=time.perf_counter)
    with Reasoner(Device.of(local, preprocessor), cloud, **options) as reasoner:
        yield reasoner


def test_easy_question_stays_local() -> None:
    """A sure answer to a plain question is given locally; the cloud hears nothing of it."""
    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url, power_w=5.0) as reasoner:
        answer = reasoner.ask(EASY)
        assert (answer.text, answer.source, answer.model) == ("Paris is the capital.", "local", "tiny")
        assert answer.decision.route == "local" and answer.confidence > 0.5 and answer.decision.reasons
        assert answer.cost.usd == 0.0 and answer.cost.joules > 0 and not server.requests


def test_hard_question_goes_to_the_cloud() -> None:
    """A prompt that the gate calls hopeless is not even tried locally; reasons and price are told."""
    usage = event(None, usage={"prompt_tokens": 100, "completion_tokens": 50})
    reply = HEAD + event("42") + event(None, "stop") + usage + b"data: [DONE]\n\n"
    with (
        hostile_cloud(send(reply)) as server,
        _reasoner(server.url, price=CloudPrice(1.0, 2.0)) as reasoner,
    ):
        answer = reasoner.ask(HARD)
    assert (answer.text, answer.source, answer.confidence) == ("42", "cloud", None)
    assert answer.decision.route == "cloud" and "maths" in " ".join(answer.decision.reasons)
    assert answer.cost.usd == pytest.approx(200e-6) and answer.usage.completion_tokens == 50


def test_unsure_answer_is_handed_over_unseen() -> None:
    """A noisy local start is thrown away before anything was shown; the stream says that it hands over."""
    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url, sure=False) as reasoner:
        pieces = list(reasoner.stream(EASY, max_tokens=64))
        assert [p.kind for p in pieces] == ["handover", "cloud", "cloud", "end"]
        assert "".join(pieces) == "Hello" and pieces[-1].answer.source == "cloud"
        assert reasoner.ask(EASY, max_tokens=8).source == "cloud"


def test_stream_commits_and_is_not_retracted() -> None:
    """Nothing is shown during the first tokens; after the commitment every piece is local, to the end."""
    with (
        hostile_cloud(send(GOOD)) as server,
        _reasoner(server.url, policy=Policy(early_tokens=5)) as reasoner,
    ):
        pieces = list(reasoner.stream("Tell me the longer one"))
        answer = pieces[-1].answer
        assert {p.kind for p in pieces[:-1]} == {"local"} and "".join(pieces) == answer.text
        assert len(pieces) > 10 and len(pieces[0]) >= 5 and not server.requests


@pytest.mark.parametrize(
    "act",
    [hang(), reset(), send(status(429)), send(status(401)), send(b"junk"), send(HEAD + b"data: {x\n\n")],
    ids=["hang", "reset", "429", "401", "junk", "garbage"],
)
def test_failing_cloud_degrades(act) -> None:
    """Whatever the cloud does, mode auto gives the local answer, marked degraded, with the cause."""
    with hostile_cloud(act) as server, _reasoner(server.url, limits=IMPATIENT) as reasoner:
        answer = reasoner.ask(HARD)
        assert (answer.text, answer.source) == ("the fox", "degraded")
        assert answer.decision.route == "cloud" and "cloud failed" in answer.note
        pieces = list(reasoner.stream(HARD))
        assert "".join(pieces) == "the fox" and pieces[-1].answer.source == "degraded"


def test_cloud_that_breaks_off_after_text() -> None:
    """Shown cloud text stays; an honest note follows, then the local answer, which alone is the Answer."""
    with hostile_cloud(reset(HEAD + event("The first st"))) as server, _reasoner(server.url) as reasoner:
        pieces = list(reasoner.stream(HARD))
    assert [p.kind for p in pieces] == ["cloud", "degraded", *["local"] * (len(pieces) - 3), "end"]
    assert "answered on the device" in pieces[1] and pieces[-1].answer.text == "the fox"
    assert pieces[-1].answer.source == "degraded"


def test_handed_over_whole_answer_is_the_fallback() -> None:
    """An answer judged at its end is kept while the cloud is asked, and given when the cloud fails."""
    with hostile_cloud(reset()) as server, _reasoner(server.url, sure=False) as reasoner:
        answer = reasoner.ask(EASY, max_tokens=8)
        assert (answer.source, answer.usage.completion_tokens) == ("degraded", 8)


def test_no_thread_for_the_cloud_degrades(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no thread for the request, the device answers, with the cause."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if "cloud" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url) as reasoner:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        answer = reasoner.ask(HARD)
        assert (answer.text, answer.source) == ("the fox", "degraded")
        assert "can't start new thread" in answer.note


def test_modes() -> None:
    """local never asks, offline marks what it would have asked, cloud only asks."""
    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url) as reasoner:
        assert reasoner.ask(HARD, mode="local").source == "local"
        assert reasoner.ask(HARD, mode="offline").source == "degraded"
        assert reasoner.ask(EASY, mode="offline").source == "local"
        assert not server.requests
        assert reasoner.ask(EASY, mode="cloud").source == "cloud"
        with pytest.raises(InputError, match="auto, local, cloud, offline"):
            reasoner.ask(EASY, mode="edge")
    with (
        hostile_cloud(send(status(503))) as server,
        _reasoner(server.url, mode="cloud") as reasoner,
        pytest.raises(CloudUnavailableError),
    ):
        reasoner.ask(EASY)
    with _reasoner() as reasoner:
        assert reasoner.ask(HARD).source == "local"
        with pytest.raises(InputError, match="no cloud"):
            reasoner.ask(EASY, mode="cloud")


def test_private_prompts_never_leave() -> None:
    """A prompt with a private pattern, anywhere in the chat, is answered here or not at all."""
    secret = "my password is hunter2. " + HARD
    chat = [
        {"role": "user", "content": secret},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": HARD},
    ]
    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url) as reasoner:
        for prompt in (secret, chat):
            answer = reasoner.ask(prompt)
            assert answer.source == "local" and "password" in " ".join(answer.decision.reasons)
        with pytest.raises(InputError, match="password"):
            reasoner.ask(secret, mode="cloud")
        with _reasoner(server.url, policy=Policy(local_only=True)) as kept:
            assert kept.ask(HARD).source == "local"
        assert not server.requests


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": ["my password is hunter2. ", HARD]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "my password "}, {"text": "is hunter2. " + HARD}],
        },
        {"role": "user", "content": HARD, "name": "my password is hunter2"},
        {"role": "user", "content": HARD, "more": {"in": ["my password is hunter2"]}},
    ],
)
def test_nothing_of_a_message_escapes_the_rules(message: dict) -> None:
    """Texts in parts and fields beside the content are read like the content: what is private stays."""
    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url) as reasoner:
        assert reasoner.ask([message]).source == "local"
        asked = reasoner.submit(ChatRequest((message,))).result()
        assert asked.source == "local" and not server.requests


def test_what_was_read_is_what_is_sent() -> None:
    """Text parts reach device and cloud as one string; parts without text are refused."""
    parts = [{"type": "text", "text": EASY[:9], "image_url": "my password is hunter2"}, EASY[9:]]
    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url) as reasoner:
        assert reasoner.ask([{"role": "user", "content": parts}]).text == "Paris is the capital."
        reasoner.ask([{"role": "user", "content": parts}], mode="cloud")
        (request,) = server.requests
        assert EASY.encode() in request and b"password" not in request
        with pytest.raises(InputError, match="text parts"):
            reasoner.ask([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])


def test_long_prompts() -> None:
    """What does not fit here goes to the cloud; where that is impossible, one clear error."""
    long = "the quick brown fox " * 200
    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url, context_tokens=128) as reasoner:
        answer = reasoner.ask(long)
        assert answer.source == "cloud" and "do not fit" in answer.decision.reasons[0]
        with pytest.raises(ContextOverflowError, match="mode is local"):
            reasoner.ask(long, mode="local")
    with (
        hostile_cloud(reset()) as server,
        _reasoner(server.url, context_tokens=128) as reasoner,
        pytest.raises(ContextOverflowError, match="the cloud failed"),
    ):
        reasoner.ask(long)


def test_session_keeps_the_cache() -> None:
    """A second turn finds the first in the KV cache; the conversation grows turn by turn."""
    with _reasoner() as reasoner, reasoner.session(system="Be brief.") as chat:
        first = chat.ask(EASY).usage
        assert first.cached_tokens == 0
        reasoner.ask("about a train")  # another query in between takes nothing away
        second = chat.ask("And the capital again?").usage
        # whole chunks of the first prompt at least; more, where the second was fed ahead in time
        assert MIN_CHUNK_TOKENS <= second.cached_tokens < second.prompt_tokens
        assert "".join(chat.stream("capital?")) == "Paris is the capital."
        assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]
        with pytest.raises(InputError):
            chat.ask("")
        assert len(chat.messages) == 7


def test_map_keeps_the_order() -> None:
    """Results come in the order of the prompts, whatever order they were computed in."""
    with _reasoner() as reasoner:
        answers = reasoner.map(["the longer one, please: " + "x" * 50, EASY, "about a train"])
    assert [a.text for a in answers] == [
        ANSWERS["longer"],
        ANSWERS["capital"],
        ANSWERS["train"],
    ]


def test_threads_take_turns() -> None:
    """Eight threads get their own answers; who waited says so in queue_ms."""
    results: dict[int, str] = {}
    with _reasoner() as reasoner:

        def work(index: int) -> None:
            results[index] = reasoner.ask("capital" if index % 2 else "train", mode="local").text

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        [t.start() for t in threads]
        [t.join(30) for t in threads]
    assert results == {i: ANSWERS["capital" if i % 2 else "train"] for i in range(8)}


def test_streams_of_one_thread_do_not_wait_for_each_other() -> None:
    """Asking while a stream of the same thread is open simply works; the stream goes on afterwards."""
    with _reasoner() as reasoner:
        stream = reasoner.stream(EASY)
        first = next(stream)
        assert reasoner.ask("about a train").text == ANSWERS["train"]
        assert first + "".join(stream) == ANSWERS["capital"]
        assert stream.result().text == ANSWERS["capital"]


def _plain_preprocessor() -> Preprocessor:
    return Preprocessor(None, None, clock=time.perf_counter)


def test_a_template_that_fails_leaves_the_cloud() -> None:
    """Messages that the local template refuses go to the cloud; without one the refusal is said."""
    broken = "{{ raise_exception('only images') }}"
    with (
        Reasoner(Device.of(scripted_model({}, template=broken), _plain_preprocessor())) as reasoner,
        pytest.raises(TemplateError, match="only images"),
    ):
        reasoner.ask(EASY)
    above = scripted_model({"capital": "from above"})
    with Reasoner(Device.of(scripted_model({}, template=broken), _plain_preprocessor()), above) as reasoner:
        answer = reasoner.ask(EASY)
        assert (answer.source, answer.text) == ("cloud", "from above")
        assert any("only images" in reason for reason in answer.decision.reasons)
        assert reasoner.ask(EASY, mode="cloud").text == "from above"


def test_a_local_failure_leaves_the_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that fails before anything was shown hands over; alone, or in mode local, it is an error."""

    def fail(self, *arguments, **options):
        raise BackendError("out of memory")

    monkeypatch.setattr(LocalModel, "submit_ids", fail)
    with hostile_cloud(send(GOOD)) as server, _reasoner(server.url) as reasoner:
        answer = reasoner.ask(EASY)
        assert answer.source == "cloud" and any("out of memory" in r for r in answer.decision.reasons)
        with pytest.raises(BackendError, match="out of memory"):
            reasoner.ask(EASY, mode="local")


def test_tiers_nest() -> None:
    """A Reasoner is another one's cloud, in process and over HTTP; what degraded above is told below."""
    gateway = Reasoner(Device.of(scripted_model({"train": "five hours"}), _plain_preprocessor()), _nobody())
    with Reasoner(Device.of(scripted_model(ANSWERS), _plain_preprocessor()), gateway) as device:
        answer = device.ask(HARD)
        assert (answer.source, answer.text, answer.model) == ("cloud", "five hours", "tiny")
        assert answer.note is not None and "the cloud failed" in answer.note
        assert "".join(device.stream(HARD)) == "five hours"
    gateway = Reasoner(
        Device.of(scripted_model({"train": "five hours"}), _plain_preprocessor()), mode="local"
    )
    with (
        serving(ReferenceModel(gateway, "gateway")) as url,
        Reasoner(
            Device.of(scripted_model(ANSWERS), _plain_preprocessor()), connect(CloudOptions(url))
        ) as device,
    ):
        answer = device.ask(HARD)
        assert (answer.source, answer.text, answer.model) == ("cloud", "five hours", "gateway")


def _nobody() -> ChatModel:
    """An endpoint where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    return connect(CloudOptions(f"http://127.0.0.1:{port}/v1", model="m", limits=LIMITS))


def test_bad_arguments() -> None:
    """Unknown and illegal parameters, empty prompts and malformed messages are refused."""
    with _reasoner() as reasoner:
        with pytest.raises(InputError, match="'temprature'; allowed are temperature"):
            reasoner.ask(EASY, temprature=1)
        with pytest.raises(InputError, match="max_tokens"):
            reasoner.ask(EASY, max_tokens=0)
        for prompt in (
            "",
            [],
            [{"content": "x"}],
            [{"role": "user"}],
            [{"role": "user", "content": [{"type": "image"}]}],
        ):
            with pytest.raises(InputError):
                reasoner.ask(prompt)


def test_answer_is_json_as_contracted() -> None:
    """`to_dict` is JSON and has the contract's fields."""
    with _reasoner() as reasoner:
        got = json.loads(json.dumps(reasoner.ask(EASY).to_dict()))
    assert set(got) >= {
        "text",
        "source",
        "model",
        "confidence",
        "decision",
        "usage",
        "timings",
        "cost",
        "finish_reason",
    }
    assert set(got["decision"]) >= {"route", "score", "threshold", "reasons", "features"}
    assert set(got["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens"}
    assert set(got["timings"]) == {
        "queue_ms",
        "preprocess_ms",
        "ttft_ms",
        "total_ms",
        "prefill_tps",
        "decode_tps",
    }
    assert set(got["cost"]) == {"usd", "joules"}


def test_base_model_continues_the_raw_prompt() -> None:
    """Without a chat template the prompt is continued as it is."""
    model = scripted_model({}, template=None)
    assert model.prompt_ids([{"role": "user", "content": "the fox"}]) == model.tokenizer.encode("the fox")


@pytest.mark.parametrize("prompt", [5, ["a text"], b"bytes", [["role", "user"]], {"role": "user"}])
def test_a_prompt_is_a_text_or_messages(prompt: object) -> None:
    """Anything else is refused in the project's own words."""
    with _reasoner() as reasoner, pytest.raises(InputError, match="a text, or a list of messages"):
        reasoner.ask(prompt)


def test_its_name_and_context_are_those_of_the_model_it_asks_first() -> None:
    """The local model's; in mode cloud, the cloud's, as far as it has told them. One name for one thing."""
    with hostile_cloud(send(GOOD)) as server:
        with _reasoner(server.url) as reasoner:
            assert (reasoner.name, reasoner.context_tokens) == ("tiny", 512)
        with _reasoner(server.url, mode="cloud") as reasoner:
            assert (reasoner.name, reasoner.context_tokens) == ("big", None)
            assert not server.requests
    with _reasoner(mode="local") as reasoner:
        assert reasoner.name == reasoner.ask(EASY).model == "tiny"


def test_arguments_of_another_type() -> None:
    """Each is named in one line: no traceback from deep inside."""
    for make, name in (
        (lambda: Reasoner.open("bundle", cloud=5), "cloud=5"),
        (lambda: Reasoner.open(5), "bundle=5"),
        (lambda: InferenceClient(endpoint=5), "endpoint=5"),
        (lambda: InferenceClient(model_name=5), "model_name=5"),
    ):
        with pytest.raises(InputError, match=name):
            make()
