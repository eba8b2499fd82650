"""Mode auto answers whatever its cloud does: no exception, in time, and nothing is left behind.

The soak asks clouds that misbehave in every way of `misbehaviour.py`, in an order that a seed decides.
Threads, sockets, descriptors and memory are counted before and after.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hostile.cloud.misbehaviour import (
    BRIEF,
    ENDLESS,
    IMPATIENT,
    PATIENCE_S,
    Act,
    Misbehaving,
    client_threads,
    deaf,
    misbehaving,
    read_request,
    replies,
    settled,
)
from hostile.fuzz.mutate import mutations
from hostile.fuzz.test_cloud import REPLIES, WORDS
from support.hostile_cloud import GOOD, HEAD, event
from support.local_models import scripted_model

from edge_reasoner.cloud.base import CloudLimits, CloudOptions, CloudPrice
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.errors import InputError
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.device import Device
from edge_reasoner.reasoner import Reasoner

HARD = (
    "Prove step by step: if a train covers 120 km in 1.5 h, then 80 km in 2 h, and each stop takes 5 more "
    "minutes than the last, how many minutes does it need for 7 stops, and why?"
)
WAYS = BRIEF | {name: act for name, act in ENDLESS.items() if act is not deaf}
_WORKERS = 8


@contextlib.contextmanager
def _reasoner(
    url: str, limits: CloudLimits = IMPATIENT, environment: Mapping[str, str] | None = None
) -> Iterator[Reasoner]:
    device = Device.of(
        scripted_model({"train": "the fox"}), Preprocessor(None, None, clock=time.perf_counter)
    )
    options = CloudOptions(url, "m", limits=limits, environment=environment or {})
    with Reasoner(device, OpenAIModel(options, resolve=_nowhere), price=CloudPrice(1e6, 1e6)) as made:
        yield made


def _nowhere(host: str, *_arguments: object) -> list:
    """No name is known here; those that are none fail as they do in the system's resolver."""
    host.encode("idna")
    raise socket.gaierror(-2, "Name or service not known")


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def _soak(queries: int, seed: int, warm_up: int = 0) -> dict[str, int]:
    """Asks, several at a time; returns how much each count has grown since each way was met once, and
    `warm_up` more questions were asked: the allocator keeps some memory for each thread that once was."""
    names = list(WAYS)
    rng = random.Random(seed)
    # each way once, then at random
    order = [*names, *(rng.choice(names) for _ in range(warm_up + queries))]
    acts = iter([WAYS[name] for name in order])
    lock = threading.Lock()

    def choose(_number: int) -> Act:
        with lock:
            # attempts ask more often than questions are asked
            return next(acts, None) or WAYS[rng.choice(names)]

    def ask(reasoner: Reasoner) -> str:
        begun_s = time.monotonic()
        answer = reasoner.ask(HARD)
        assert time.monotonic() - begun_s < IMPATIENT.total_s + PATIENCE_S
        assert answer.source in ("cloud", "degraded") and answer.text.strip()
        assert "could not be read" not in (answer.note or "")
        return answer.source

    with (
        misbehaving(choose, by_number=True) as server,
        _reasoner(server.url) as reasoner,
        ThreadPoolExecutor(_WORKERS) as pool,
    ):
        list(pool.map(lambda _: ask(reasoner), range(len(names) + warm_up)))
        before = _counts(server)
        sources = set(pool.map(lambda _: ask(reasoner), range(queries)))
        after = _counts(server)
    assert sources == {"cloud", "degraded"}
    return {name: after[name] - before[name] for name in after}


def _counts(server: Misbehaving) -> dict[str, int]:
    """Once all that ends has ended."""
    settled(lambda: not client_threads() and server.open == 0)
    settled(lambda: not any(thread.name == "misbehaving-served" for thread in threading.enumerate()))
    gc.collect()
    return {
        "threads": len(client_threads()),
        "sockets": server.open,
        "descriptors": _descriptors(),
        "objects": len(gc.get_objects()),
        "rss": _rss_bytes(),
    }


def _check_flat(growth: Mapping[str, int], rss_bytes: int) -> None:
    assert growth["threads"] == growth["sockets"] == 0, growth
    assert growth["descriptors"] <= 0, growth
    assert growth["objects"] < 1000, growth
    assert growth["rss"] < rss_bytes, growth


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux tells")
def test_a_short_soak() -> None:
    """100 questions to a cloud that misbehaves in more than 70 ways."""
    assert len(WAYS) >= 50
    _check_flat(_soak(100, seed=1), 64 << 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux tells")
def test_a_long_soak() -> None:
    """2,000 questions: nothing has grown since the ones before."""
    _check_flat(_soak(2000, seed=2, warm_up=1500), 32 << 20)


@pytest.mark.parametrize("name", WAYS)
def test_each_way_ends_in_an_answer(name: str) -> None:
    """With mode auto there is always one, from the cloud or from the device, as a whole and as a stream."""
    with misbehaving(WAYS[name]) as server, _reasoner(server.url, replace(IMPATIENT, attempts=1)) as reasoner:
        pieces = list(reasoner.stream(HARD))
        answer = pieces[-1].answer
        assert answer is not None and answer.text.strip()
        assert "could not be read" not in (answer.note or "") and "\n" not in (answer.note or "")
        json.dumps(answer.to_dict()).encode()


def test_a_text_of_5_megabytes_without_counts() -> None:
    """More than an answer may have is a failure of the cloud; what came is counted; the device answers."""
    many = b"".join(event("word " * 2000) for _ in range(500))
    roomy = CloudLimits(connect_s=20, read_s=20, total_s=60, attempts=1)
    for limits, source in ((roomy, "degraded"), (replace(roomy, answer_chars=10_000_000), "cloud")):
        with (
            misbehaving(replies(HEAD + many + event(finish="stop"))) as server,
            _reasoner(server.url, limits) as reasoner,
        ):
            answer = reasoner.ask(HARD)
            assert answer.source == source and answer.cost.usd is not None and answer.cost.usd > 0


@pytest.mark.parametrize(
    "host",
    [
        *("a" * 64 + ".example", "a..example", ".example", "x" * 300, "a." * 130 + "b", "xn--a", "-", "_"),
        *(
            "\u00df" * 40 + ".example",
            "\u05d0b.example",
            "1.2.3.4.5",
            "256.256.256.256",
            "0x7f.1",
            "[::ffff:1]",
        ),
        *("h:0x50", "h:1e3", "h:", "h:65535", "\u3002example", "%00", "h%2e%2e", "a_b.example"),
    ],
)
def test_odd_hosts(host: str) -> None:
    """Such a URL is refused when it is given, or its cloud does not answer."""
    for scheme in ("http", "https"):
        try:
            with _reasoner(f"{scheme}://{host}/v1") as reasoner:
                answer = reasoner.ask(HARD)
        except InputError as error:
            assert "cloud URL" in str(error) and "\n" not in str(error)
        else:
            assert answer.source == "degraded" and "could not be read" not in answer.note


@pytest.mark.parametrize("name", ["https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"])
@pytest.mark.parametrize(
    "value",
    [
        *(
            "://",
            "http://",
            "http://[",
            "http://h:99999",
            "http://h:-1",
            "ftp://h",
            "socks4://h",
            "//h",
            "\x00",
            "/dev/zero",
            "socks5://127.0.0.1:9",
        ),
        *(
            "http://" + "a" * 70 + ".example",
            "http://a..b",
            "http://u:p@",
            "http://\u00df\u05d0",
            "\ud800",
        ),
        *(
            "/dev/null",
            "/proc/self/mem",
            "/",
            "a" * 5000,
            "\u00b2:\u00b2",
            "10.0.0.0/99",
            "[",
            "%",
            "http://127.0.0.1:9",
        ),
    ],
)
def test_odd_environments(name: str, value: str) -> None:
    """Whatever the variables of proxies and certificates say, the device answers."""
    url = "https://127.0.0.9.example/v1"
    environment = {name: value, "OPENAI_API_KEY": "sk-not-a-real-key"}
    with _reasoner(url, replace(IMPATIENT, attempts=1), environment) as reasoner:
        answer = reasoner.ask(HARD)
        assert answer.source == "degraded" and "could not be read" not in answer.note
        assert "\n" not in answer.note and "sk-not" not in answer.note


def _damaged(bodies: Iterator[bytes]) -> Act:
    """Serves the next damaged reply on every connection."""
    lock = threading.Lock()

    def act(connection: socket.socket) -> None:
        with lock:
            data = next(bodies)
        read_request(connection)
        connection.sendall(data)

    return act


_CHUNKED = HEAD.replace(b"Connection", b"Transfer-Encoding: chunked\r\nConnection")
_SEEDS = [
    GOOD,
    *(HEAD + reply for reply in REPLIES),
    _CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(REPLIES[0]), REPLIES[0]),
]
_HTTP_WORDS = (
    b"HTTP/1.1",
    b"Content-Length: 5",
    b"Transfer-Encoding: chunked",
    b"\r\n\r\n",
    b"200",
    b"100",
    b"429",
)


def _fuzz(count: int, seed: int) -> None:
    bodies = mutations(_SEEDS, 10 * count, seed=seed, words=(*WORDS, *_HTTP_WORDS))
    limits = replace(IMPATIENT, connect_s=20.0, read_s=20.0, total_s=60.0, attempts=1)
    with misbehaving(_damaged(bodies)) as server, _reasoner(server.url, limits) as reasoner:
        for _ in range(count):
            answer = reasoner.ask(HARD)
            assert answer.source in ("cloud", "degraded") and answer.text.strip()
            assert "could not be read" not in (answer.note or "")
        assert settled(lambda: server.open == 0 and not client_threads())


def test_few_damaged_exchanges() -> None:
    """Replies damaged from the status line to the last byte, over the whole way of a question."""
    _fuzz(200, seed=0)


@pytest.mark.slow
def test_many_damaged_exchanges() -> None:
    """The same with many more."""
    _fuzz(5000, seed=1)
