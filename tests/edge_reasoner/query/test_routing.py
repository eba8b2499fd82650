"""What reasoning models think on a query's way: not judged, not an answer, told beside it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

import pytest
from support.hostile_cloud import HEAD, HostileCloud, event, hostile_cloud, scripted_cloud, send
from support.local_models import TEMPLATE, scripted_model

from edge_reasoner.chat.model import Cancellation, ChatModel, ChatPiece, PulledStream
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudLimits, CloudOptions, CloudResult
from edge_reasoner.contract.template.render import ChatTemplate
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.errors import NoAnswerError
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
PLAIN = "Paris is the capital."
#: as a stream of doubtful quality would be, were it judged
LOOP = "the fox the fox the fox the fox the fox the fox"
THOUGHT = f"<think>\n{LOOP}\n</think>\n\n{PLAIN}"
ENDLESS = f"<think>\n{LOOP}"
LIMITS = CloudLimits(connect_s=5, read_s=5, total_s=20, attempts=1)


@contextlib.contextmanager
def _reasoner(
    answers: Mapping[str, str], cloud: ChatModel | None = None, *, template: str = TEMPLATE, **options
) -> Iterator[Reasoner]:
    local = scripted_model(answers, template=template)
    with Reasoner(_device(local), cloud, **options) as reasoner:
        yield reasoner


def _device(local: LocalModel) -> Device:
    return Device.of(local, Preprocessor(None, None, clock=time.perf_counter))


def _cloud(server: HostileCloud) -> ChatModel:
    return connect(CloudOptions(server.url, model="big", limits=LIMITS))


def _reply(*parts: bytes, finish: str = "stop") -> bytes:
    return HEAD + b"".join(parts) + event(None, finish) + b"data: [DONE]\n\n"


def _thought_event(text: str) -> bytes:
    return event(text).replace(b'"content"', b'"reasoning_content"')


GOOD = _reply(_thought_event("so it "), _thought_event("is"), event("42"))
ONLY_THOUGHTS = {
    "markers": _reply(event("<think>"), event("hm"), finish="length"),
    "field": _reply(_thought_event("hm"), finish="length"),
    "a lone closing marker": _reply(event("hm\n</think>\n")),
}


def test_thinking_is_not_judged() -> None:
    """Confidence and statistics are those of the answer alone, however the thinking went."""
    with _reasoner({"capital": PLAIN}) as plain, _reasoner({"capital": THOUGHT}) as thinking:
        expected, answer = plain.ask(EASY), thinking.ask(EASY)
    assert (answer.text, answer.thinking, expected.thinking) == (PLAIN, LOOP, None)
    judged, wanted = answer.decision.features, expected.decision.features
    assert judged["answer_tokens"] == wanted["answer_tokens"] and judged["answer_repetition"] == 0
    assert answer.confidence == pytest.approx(expected.confidence, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"policy": Policy(threshold=0.0)}], ids=["usual", "content"])
def test_a_device_that_only_thinks_hands_over(options) -> None:
    """It is no answer, however low the threshold; nothing of the thinking was told."""
    with (
        hostile_cloud(send(GOOD)) as server,
        _reasoner({"capital": ENDLESS}, _cloud(server), **options) as both,
    ):
        answer = both.ask(EASY)
        assert (answer.source, answer.text, answer.thinking) == ("cloud", "42", "so it is")
        pieces = list(both.stream(EASY))
        assert pieces[0].kind == "handover"
        assert "".join(piece.thought for piece in pieces) == "so it is" and "".join(pieces) == "42"


@pytest.mark.parametrize("mode", ["local", "offline", "auto"])
def test_a_device_alone_that_only_thinks_says_so(mode: str) -> None:
    """Without a cloud the answer is empty, and marked."""
    with _reasoner({"capital": ENDLESS}, mode=mode) as alone:
        answer = alone.ask(EASY)
    assert (answer.text, answer.thinking) == ("", LOOP) and answer.confidence < 0.5
    assert "gave no answer" in answer.note


@pytest.mark.parametrize("reply", ONLY_THOUGHTS.values(), ids=list(ONLY_THOUGHTS))
def test_a_cloud_that_only_thinks_has_failed(reply: bytes) -> None:
    """The device answers in its place; with mode cloud it is an error that says what helps."""
    with hostile_cloud(send(reply)) as server, _reasoner({"train": "the fox"}, _cloud(server)) as both:
        answer = both.ask(HARD)
        assert (answer.source, answer.text, answer.thinking) == ("degraded", "the fox", None)
        assert "gave no answer" in answer.note
        with pytest.raises(NoAnswerError, match="allow more tokens"):
            both.ask(HARD, mode="cloud")


def test_a_tier_that_only_thinks_has_failed() -> None:
    """So does another Reasoner as the cloud, in process and over HTTP."""
    with _reasoner({"train": ENDLESS}) as above, _reasoner({"train": "the fox"}, above) as device:
        assert (answer := device.ask(HARD)).source == "degraded" and answer.text == "the fox"
    above = scripted_model({"train": ENDLESS})
    with (
        serving(ReferenceModel(above)) as url,
        _reasoner({"train": "the fox"}, connect(CloudOptions(url))) as device,
    ):
        assert (answer := device.ask(HARD)).source == "degraded" and "gave no answer" in answer.note


def test_thinking_is_told_while_it_comes() -> None:
    """Pieces carry it apart from their text, and add up to what the answer has: on the device and beyond."""
    with _reasoner({"capital": THOUGHT}, mode="local") as device:
        pieces = list(device.stream(EASY))
    told = [piece.thought for piece in pieces if piece.thought]
    assert "".join(told) == pieces[-1].answer.thinking == LOOP and len(told) > 10
    assert "".join(pieces) == PLAIN and {piece.kind for piece in pieces} == {"local", "end"}
    # the first token of the answer is what counts
    assert pieces[-1].answer.timings.ttft_ms <= pieces[-1].answer.timings.total_ms
    with hostile_cloud(send(GOOD)) as server, _reasoner({}, _cloud(server), mode="cloud") as both:
        assert [(str(piece), piece.thought) for piece in both.stream(EASY)][:2] == [
            ("", "so it "),
            ("", "is"),
        ]


def test_tiers_keep_the_thinking() -> None:
    """A device in front of our own server, itself a Reasoner, has the thinking of the tier that answered."""
    gateway = Reasoner(_device(scripted_model({"train": THOUGHT})), mode="local")
    with (
        serving(ReferenceModel(gateway, "gateway")) as url,
        _reasoner({}, connect(CloudOptions(url))) as device,
    ):
        answer = device.ask(HARD)
        assert (answer.source, answer.text, answer.thinking) == ("cloud", PLAIN, LOOP)
        pieces = list(device.stream(HARD))
        assert "".join(pieces) == PLAIN and "".join(piece.thought for piece in pieces) == LOOP


class _Thinker:
    """A cloud that thinks until nobody wants it any more."""

    name, context_tokens = "thinker", None

    def submit(self, request):
        cancellation = Cancellation()
        return PulledStream(self._pieces(cancellation), cancellation)

    def _pieces(self, cancellation):
        while not cancellation.wanted:
            yield ChatPiece("", "hm ")
        return CloudResult("", "hm", "thinker", "cancelled", None)

    def close(self):
        pass


def test_cancelling_a_cloud_that_thinks() -> None:
    """It ends as cancelled: the device does not start in its place."""
    with _reasoner({"train": "the fox"}, _Thinker()) as both:
        stream = both.stream(HARD)
        assert next(stream).thought == "hm "
        stream.cancel()
        answer = stream.result()
    assert (answer.source, answer.finish_reason, answer.text) == ("cloud", "cancelled", "")


_ASKS = TEMPLATE.replace(
    "{{ m.content }}", "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
)


def test_the_next_turn_leaves_thinking_out() -> None:
    """A prompt has earlier thinking only if the template asks for it; the cloud never gets it."""
    turns = [EASY, "And the capital again?"]
    with _reasoner({"capital": THOUGHT}) as device, device.session() as chat:
        asked = [chat.ask(turn).usage.prompt_tokens for turn in turns]
    with _reasoner({"capital": PLAIN}) as device, device.session() as chat:
        assert [chat.ask(turn).usage.prompt_tokens for turn in turns] == asked
    with _reasoner({"capital": THOUGHT}, template=_ASKS) as device, device.session() as chat:
        assert chat.ask(turns[0]).usage.prompt_tokens == asked[0]
        assert chat.ask(turns[1]).usage.prompt_tokens > asked[1] + len(LOOP.split())
        messages = [*chat.messages, {"role": "user", "content": "So?"}]
    # the template of a family that thinks: what was thought before earlier questions is left out
    qwen = Path(__file__).parents[1] / "contract" / "template" / "templates" / "qwen3.jinja"
    template = ChatTemplate(qwen.read_text(), special_tokens={}, clock=time.monotonic, now=datetime.now)
    assert LOOP not in template.render(messages) and PLAIN in template.render(messages)
    with (
        scripted_cloud(lambda head, body: GOOD) as server,
        _reasoner({}, _cloud(server), mode="cloud") as both,
        both.session() as chat,
    ):
        assert [chat.ask(turn).thinking for turn in turns] == ["so it is"] * 2
        assert server.posts[1]["messages"][1] == {"role": "assistant", "content": "42"}
