"""The end of the service: nobody waits for the model, and every stream ends as the protocol has it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from support.talking_model import TalkingModel

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.server.reference import serving

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 60.0
BODY = {"model": "talking", "messages": [{"role": "user", "content": "x"}]}

_SERVICE = """
    import sys, threading, time
    from support.talking_model import TalkingModel
    from edge_reasoner.server.reference import serve

    def script(request, cancellation):
        print("started", flush=True)
        yield "one"
        if sys.argv[1] == "stuck":
            threading.Event().wait()
        while not cancellation.wanted:
            time.sleep(0.02)

    serve(TalkingModel(script), port=0, ready=lambda url: print(url, flush=True))
"""


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process that serves a model which, after its first piece, waits: `param` says for what."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SERVICE), request.param],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""},
    )  # fmt: skip
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("service", ["patient"], indirect=True)
def test_a_signal_ends_open_streams_cleanly(service, number) -> None:
    """An open stream ends with an error event and as a whole reply, a request under way gets a 503, and the
    process ends as the signal has it, with nothing on standard error but a KeyboardInterrupt's own."""
    process, url = service
    whole: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: whole.append(httpx.post(f"{url}/chat/completions", json=BODY, timeout=TIMEOUT_S))
    )
    asking.start()
    with httpx.stream(
        "POST", f"{url}/chat/completions", json={**BODY, "stream": True}, timeout=TIMEOUT_S
    ) as reply:
        lines = reply.iter_lines()
        while '"one"' not in next(lines):
            pass
        assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        process.send_signal(number)
        rest = [line for line in lines if line]
    asking.join(TIMEOUT_S)
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == (503, "server_error") and "[DONE]" not in "".join(rest)
    assert whole[0].status_code == 503 and whole[0].json()["error"]["message"] == "the service ends"
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -number
    assert number == signal.SIGINT or not said


@pytest.mark.parametrize("service", ["stuck"], indirect=True)
def test_a_second_signal_ends_at_once(service) -> None:
    """A model that never comes back holds up neither the streams' end nor, the second time, the process."""
    process, url = service
    with httpx.stream(
        "POST", f"{url}/chat/completions", json={**BODY, "stream": True}, timeout=TIMEOUT_S
    ) as reply:
        lines = reply.iter_lines()
        while '"one"' not in next(lines):
            pass
        process.send_signal(signal.SIGINT)
        assert any('"code":503' in line for line in lines), "told although the model is stuck"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
        assert process.returncode == -signal.SIGINT


def test_the_real_client_hears_of_the_end() -> None:
    """`openai` raises in the middle of a stream that the end cut short: it is not taken for an answer."""
    heard: list[str] = []

    def script(request, cancellation):
        yield "one"
        while not cancellation.wanted:
            time.sleep(0.02)

    with openai.OpenAI(base_url="http://127.0.0.1:1", api_key="x", max_retries=0) as client:
        with serving(TalkingModel(script)) as base:
            chunks = client.with_options(base_url=base).chat.completions.create(**BODY, stream=True)
            heard.append(next(chunks).choices[0].delta.content)
            heard.append(next(chunks).choices[0].delta.content)
        with pytest.raises(openai.APIError, match="the service ends"):
            list(chunks)
    assert heard == ["", "one"]


class Panic(BaseException):
    """As a library's panic comes: no Exception."""


@pytest.mark.parametrize(
    "kind", [Panic, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError]
)
@pytest.mark.parametrize("when", ["submit", "first", "later"])
@pytest.mark.parametrize("stream", [False, True])
def test_whatever_the_model_raises_is_answered(kind: type[BaseException], when: str, stream: bool) -> None:
    """At once, in the answer, streamed or not; the next request is answered too."""

    def script(request: ChatRequest, cancellation):
        if request.params.max_tokens == 7:
            yield "fine"
            return
        if when == "later":
            yield "one"
        raise kind("secret")

    class Model(TalkingModel):
        def submit(self, request):
            if when == "submit" and request.params.max_tokens != 7:
                raise kind("secret")
            return super().submit(request)

    with serving(Model(script)) as base, httpx.Client(base_url=base, timeout=10) as client:
        reply = client.post("/chat/completions", json={**BODY, "stream": stream})
        assert reply.status_code == 500 or (stream and when == "later")
        assert "the model failed" in reply.text and "secret" not in reply.text
        fine = client.post("/chat/completions", json={**BODY, "max_tokens": 7})
        assert fine.json()["choices"][0]["message"]["content"] == "done"
