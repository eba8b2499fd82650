"""With the owner's rules in force no planted secret leaves, in any field, on any way, nor in any error."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hostile.privacy.planting import MESSAGE_FIELDS, Plant, Secret, chat, compact, readings, secrets
from support.hostile_cloud import GOOD, HostileCloud, hostile_cloud, send
from support.local_models import scripted_model

from edge_reasoner.batch import BatchRow, run_batch
from edge_reasoner.bench.eval import ask_questions
from edge_reasoner.bench.questions import Question
from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.client import InferenceClient
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudLimits, CloudOptions
from edge_reasoner.errors import EdgeReasonerError, InputError
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.device import Device
from edge_reasoner.reasoner import Reasoner
from edge_reasoner.server.reference import serving

HARD = (
    "Prove step by step: if a train covers 120 km in 1.5 h, then 80 km in 2 h, how many minutes does it need "
    "for 7 stops, and why?"
)
LIMITS = CloudLimits(connect_s=20.0, read_s=20.0, total_s=60.0, attempts=1)
SHORT = SamplingParams(max_tokens=4)
SEED = 20261125


@contextlib.contextmanager
def _reasoner(cloud, **options) -> Iterator[Reasoner]:
    local = scripted_model({"": "the fox"}, context_tokens=4096)
    device = Device.of(local, Preprocessor(None, None, clock=time.perf_counter))
    with Reasoner(device, cloud, **options) as made:
        yield made


class Ways:
    """Every way from a caller to the cloud at `url`; each gives what the caller got to read."""

    def __init__(self, url: str, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._numbers = folder, itertools.count()
        enter = stack.enter_context
        self._auto = enter(_reasoner(self._client(url)))
        self._cloud = enter(_reasoner(self._client(url), mode="cloud"))
        self._nested = enter(_reasoner(enter(_reasoner(self._client(url), mode="cloud"))))
        self._direct = stack.enter_context(contextlib.closing(self._client(url)))
        self._inference = enter(InferenceClient(None, "m", url))
        gateway = enter(serving(enter(_reasoner(self._client(url)))))
        self._http = enter(httpx.Client(base_url=gateway + "/", timeout=60, trust_env=False))
        self._url = url

    @staticmethod
    def _client(url: str, model: str = "m"):
        return connect(CloudOptions(url, model=model, limits=LIMITS))

    def ask(self, messages: list[dict], params: SamplingParams) -> str:
        return str(self._auto.ask(messages, params=params).to_dict())

    def ask_cloud(self, messages: list[dict], params: SamplingParams) -> str:
        return str(self._cloud.ask(messages, params=params).to_dict())

    def stream(self, messages: list[dict], params: SamplingParams) -> str:
        return "".join(self._auto.stream(messages, params=params))

    def map(self, messages: list[dict], params: SamplingParams) -> str:
        return str([answer.to_dict() for answer in self._auto.map([messages], params=params)])

    def submit(self, messages: list[dict], params: SamplingParams) -> str:
        request = ChatRequest(tuple(messages), params=params, extra={"user": "me"})
        return str(self._cloud.submit(request).result().to_dict())

    def nested(self, messages: list[dict], params: SamplingParams) -> str:
        return str(self._nested.ask(messages, params=params).to_dict())

    def client(self, messages: list[dict], params: SamplingParams) -> str:
        return self._direct.submit(ChatRequest(tuple(messages), params=params)).result().text

    def gateway(self, messages: list[dict], params: SamplingParams) -> str:
        body = {"model": "tiny", "messages": messages, "max_tokens": 4, "stop": list(params.stop) or None}
        plain = json.dumps(body).encode("utf-8", "replace")
        reply = self._http.post(
            "chat/completions", content=plain, headers={"Content-Type": "application/json"}
        )
        # a field that the service does not take is named to who sent it
        return reply.text if reply.status_code == 200 else ""

    def session(self, messages: list[dict], params: SamplingParams) -> str:
        """Each user's turn in order; local answers come between."""
        with self._auto.session(_text(messages[0])) as session:
            asked = [_text(message) for message in messages[1:] if message.get("role") == "user"]
            modes = ["local"] * (len(asked) - 1) + ["auto"]
            answers = [
                session.ask(text, params=params, mode=mode) for text, mode in zip(asked, modes, strict=True)
            ]
        return str([answer.to_dict() for answer in answers])

    def batch(self, messages: list[dict], params: SamplingParams) -> str:
        rows = [BatchRow(1, "row", _text(messages[-1]))]
        out = self._folder / f"{next(self._numbers)}.jsonl"
        run_batch(self._cloud, rows, out, name="run", params=params, advance=lambda _: None)
        row = json.loads(out.read_text(encoding="utf-8"))
        return str(row)

    def eval(self, messages: list[dict], params: SamplingParams) -> str:
        question = Question(1, _text(messages[-1]), "", "exact", expected="5")
        return str(ask_questions(self._cloud, [question], params, lambda: None))

    def inference(self, messages: list[dict], params: SamplingParams) -> str:
        given = {"max_tokens": 4, "stop": list(params.stop)}
        return self._inference.infer(_text(messages[-1]), given).choices[0].text

    def fields(self, plant: Plant) -> str:
        """Fields that a caller of the client adds, by key and value; and the model's name."""
        secret = plant.secret.text
        added = {
            "extra": {"user": secret},
            "extra key": {secret: "x"},
            "extra nested": {"metadata": {"a": [{"b": secret}]}},
            "extra number": {"number": secret},
        }
        model = secret if plant.field == "model" else "m"
        with contextlib.closing(self._client(self._url, model)) as client:
            messages = ({"role": "user", "content": HARD},)
            extra = added.get(plant.field, {})
            return client.submit(ChatRequest(messages, params=SHORT, extra=extra)).result().text


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


#: way → fields that a secret can be in there
_TURNS = ("content", "system", "first turn")
_TEXTS = ("content", "part")
WAYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("ask", "ask_cloud", "stream", "map", "submit", "nested", "client", "gateway"), MESSAGE_FIELDS
    ),
    **dict.fromkeys(
        ("ask ", "ask_cloud ", "submit ", "client ", "gateway ", "inference ", "batch "), ("stop",)
    ),
    "session": _TURNS,
    **dict.fromkeys(("batch", "eval", "inference"), _TEXTS),
    "fields": ("extra", "extra key", "extra nested", "extra number", "model"),
}
PLACES = [(way.strip(), field) for way, fields in WAYS.items() for field in fields]


def plants(count: int) -> list[Plant]:
    """That many different secrets, dealt over all ways and fields."""
    rng = random.Random(SEED)
    drawn = [secret for secret, _ in zip(secrets(rng), range(count), strict=False)]
    places = PLACES * (count // len(PLACES) + 1)
    rng.shuffle(places)
    return [Plant(secret, field, way) for secret, (way, field) in zip(drawn, places, strict=False)]


def _send(ways: Ways, plant: Plant) -> str:
    """What the caller got to read: an answer, or an error."""
    secret, way = plant.secret.text, plant.way
    try:
        if way == "fields":
            return ways.fields(plant)
        params = SamplingParams(max_tokens=4, stop=(secret,) if plant.field == "stop" else ())
        send_it: Callable[[list[dict], SamplingParams], str] = getattr(ways, way)
        return send_it(chat(plant.field, secret, HARD), params)
    except InputError as error:
        return str(error)


def _leaks(secret: Secret, data: bytes) -> bool:
    return any(secret.core in compact(text) for text in readings(data))


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[tuple[HostileCloud, Ways]]:
    """A cloud that writes down every byte, and all ways to it."""
    with hostile_cloud(send(GOOD)) as server, contextlib.ExitStack() as stack:
        yield server, Ways(server.url, tmp_path, stack)


def _plant_all(server: HostileCloud, ways: Ways, planted: list[Plant]) -> None:
    for plant in planted:
        before = len(server.requests)
        said = _send(ways, plant)
        for request in server.requests[before:]:
            assert not _leaks(plant.secret, request), plant
        if plant.field != "role":
            # the device's template names the role that it does not know
            assert plant.secret.core not in compact(said), (plant, said)
    everything = b"".join(server.requests)
    assert not any(plant.secret.core.encode() in everything for plant in planted)


@pytest.mark.parametrize("way", sorted({way for way, _ in PLACES}))
def test_each_way_leads_to_the_cloud(recorded, way: str) -> None:
    """The control: without a secret the same request arrives, so that its absence says something."""
    server, ways = recorded
    _send(ways, Plant(Secret("none", "nothing", "-"), "none", way))
    assert len(server.requests) == 1 and b"how many minutes" in server.requests[0]


def test_the_search_finds_what_is_there() -> None:
    """The control of the control: each secret is seen in a request that does hold it."""
    for plant in plants(300):
        body = json.dumps(
            {"content": f"x {plant.secret.text} y"}, ensure_ascii=len(plant.secret.text) % 2 == 0
        )
        assert _leaks(plant.secret, b"POST / HTTP/1.1\r\n\r\n" + body.encode()), plant


def test_sixty_planted_secrets_stay(recorded) -> None:
    """Over all kinds, and every way once at least."""
    server, ways = recorded
    planted = plants(72)
    assert len({plant.way for plant in planted}) > 8 and len({plant.secret.kind for plant in planted}) == 6
    _plant_all(server, ways, planted)


@pytest.mark.slow
def test_a_thousand_planted_secrets_stay(recorded) -> None:
    """Over kinds, spellings, fields, turns and ways; each place is planted several times."""
    server, ways = recorded
    planted = plants(1000)
    assert {(plant.way, plant.field) for plant in planted} == set(PLACES)
    _plant_all(server, ways, planted)


def test_every_error_of_the_cloud_is_without_the_prompt(recorded) -> None:
    """What an endpoint repeats of a request cannot be more than was sent: a vetoed prompt is in no note."""
    server, ways = recorded
    for plant in plants(12):
        with contextlib.suppress(EdgeReasonerError):
            said = ways.ask([{"role": "user", "content": f"{HARD} {plant.secret.text}"}], SHORT)
            assert plant.secret.core not in compact(said)
    assert not server.requests
