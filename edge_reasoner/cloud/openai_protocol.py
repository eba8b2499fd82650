"""Client of the OpenAI chat-completions protocol, for endpoints that may be down, slow, broken or hostile."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

from edge_reasoner.chat.model import Cancellation, ChatPiece, ChatRequest, PulledStream, thought_of
from edge_reasoner.chat.thinking import Split, ThinkingSplitter
from edge_reasoner.cloud.answer import AnswerUnderWay, only_thought
from edge_reasoner.cloud.base import CloudOptions, CloudResult, CloudStream
from edge_reasoner.cloud.dialect import MAX_REPAIRS, Dialect, encode, request_body
from edge_reasoner.cloud.faults import Fault, parse_fault
from edge_reasoner.cloud.line import Line
from edge_reasoner.cloud.model_list import ListedModel, first_chat_model
from edge_reasoner.cloud.pump import pumped
from edge_reasoner.cloud.redact import scrubbed, shown_url
from edge_reasoner.cloud.replies import FailedAnswerError, read_answer
from edge_reasoner.cloud.resolver import Resolve
from edge_reasoner.cloud.retry import RetryError, is_passing, named_status, retry_after_s
from edge_reasoner.cloud.transport import Reply, Transport
from edge_reasoner.errors import (
    CloudError,
    CloudProtocolError,
    CloudUnavailableError,
    InputError,
    NoAnswerError,
    one_line,
)
from edge_reasoner.privacy.screen import ScreenedBody

_MAX_MODEL_LIST_BYTES = 16 * 1024 * 1024
_MAX_FAULT_BYTES = 64 * 1024
_NAME_A_MODEL = "name the model with cloud_model (--cloud-model)"
_NO_TEXT_KINDS = ("text/html", "image/", "audio/", "video/")

_Pieces = Generator[str, None, CloudResult]


class _RefusedError(Exception):
    """The endpoint refused a request as it was; another wording of it may do."""

    def __init__(self, error: CloudError, status: int, fault: Fault) -> None:
        super().__init__(str(error))
        self.error, self.status, self.fault = error, status, fault


class OpenAIModel:
    """One endpoint and model. Thread-safe; connections are pooled."""

    def __init__(
        self,
        options: CloudOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
        now: Callable[[], float] = time.time,
        resolve: Resolve = socket.getaddrinfo,
    ) -> None:
        """Checks the URL's form and sends nothing. Raises InputError.

        A key, a proxy or certificates that cannot be used are a CloudError of the first answer. `sleep`:
        between attempts; None: until then, or until the answer is given up. `now`: seconds since 1970.
        """
        self._transport = Transport(options, clock, resolve)
        self._url = self._transport.url
        self._options = options
        self._limits = options.limits
        self._dialect = Dialect()
        self._listed: ListedModel | None = None
        self._list_lock = threading.Lock()
        self._clock, self._sleep, self._uniform, self._now = clock, sleep, uniform, now

    @property
    def name(self) -> str:
        """The model that is asked for; empty while the endpoint has not said which it serves."""
        return self._options.model or (self._listed.id if self._listed else "")

    @property
    def context_tokens(self) -> int | None:
        """What the endpoint's list of models says, where it was asked for and says it."""
        return self._listed.context_tokens if self._listed else None

    def submit(self, request: ChatRequest) -> CloudStream:
        """Starts an answer: see `ChatModel.submit`. Sends nothing before the first piece is asked for.

        Retries within the limits while nothing was yielded. Raises InputError at once: a raw text, or
        messages that are no JSON; PrivacyVetoError, at once or before anything is sent; CloudUnavailableError
        or CloudProtocolError from the stream, also in mid-answer. None of them, nor anything in the answer,
        holds the API key.
        """
        if request.text is not None:
            raise InputError("a cloud endpoint takes messages; it cannot continue a raw text")
        self._options.screen.checked(encode(request_body(self._options.model or "", request)))
        cancellation = Cancellation()
        return PulledStream(self._pieces(request, cancellation), cancellation)

    def close(self) -> None:
        """Closes connections."""
        self._transport.close()

    def _pieces(self, request: ChatRequest, cancellation: Cancellation) -> _Pieces:
        """The answer as its reader sees it: within the total time, cancellable, errors without secrets."""
        end_s = self._clock() + self._limits.total_s
        line = Line(end_s, self._clock)
        answer = AnswerUnderWay(self._transport.answer_redactor, self._limits, self._clock)
        texts = PulledStream(
            pumped(
                self._tried(request, line, answer),
                line=line,
                deadline_s=lambda: min(end_s, answer.settled_s),
                late=lambda: self._late(answer),
                cancelled=answer.cancelled,
                cancellation=cancellation,
            )
        )
        splitter = ThinkingSplitter()
        try:
            for received in texts:
                text = splitter.push(received)
                if (thought := thought_of(received) + splitter.take_thought()) or text:
                    yield ChatPiece(text, thought)
            rest = splitter.finish()
            if (thought := splitter.take_thought()) or rest:
                yield ChatPiece(rest, thought)
            return self._split(texts.result(), splitter.split())
        except CloudError as error:
            failed = scrubbed(error, self._transport.redactor)
        finally:
            texts.close()
        # outside of the handler: what a secret was cut out of must not hang on it as its context
        raise failed

    def _split(self, result: CloudResult, split: Split) -> CloudResult:
        """The result with its thinking, from markers in the text and from fields beside it, apart from its
        answer. Raises NoAnswerError where that is all there is."""
        thoughts = "\n\n".join(filter(None, (result.thinking, split.thinking)))
        if thoughts and not split.answer.strip() and result.finish_reason != "cancelled":
            raise NoAnswerError(f"{self._url}: {only_thought(result.finish_reason)}")
        return replace(result, text=split.answer, thinking=thoughts or None)

    def _late(self, answer: AnswerUnderWay) -> CloudResult:
        if answer.complete:
            return self._concluded(answer)
        raise CloudUnavailableError(f"{self._url}: not done within {self._limits.total_s:g} s")

    def _tried(self, request: ChatRequest, line: Line, answer: AnswerUnderWay) -> _Pieces:
        """Attempts, each in the words that the endpoint takes, until one succeeds."""
        body = request_body(self._model_name(line), request)
        changes: dict[str, str | None] = {}
        attempt = repairs = 0
        while True:
            sent = self._dialect.apply(body, changes)
            answer.begin(sent, stop=request.params.stop if "stop" not in sent else ())
            try:
                yield from self._once(self._options.screen.checked(encode(sent)), line, answer)
                return self._concluded(answer)
            except (_RefusedError, RetryError) as failed:
                asked = self._dialect.repair(failed.status, failed.fault, sent, request.extra)
                if asked is not None and repairs < MAX_REPAIRS and not answer.shown:
                    changes |= asked
                    repairs += 1
                    continue
                if isinstance(failed, _RefusedError):
                    raise failed.error from failed
                if answer.complete:
                    # it was whole before the connection broke
                    return self._concluded(answer)
                if answer.shown:
                    raise failed.error from failed
                self._back_off(attempt, failed, line)
                attempt += 1

    def _once(self, body: ScreenedBody, line: Line, answer: AnswerUnderWay) -> Iterator[str]:
        with self._transport.exchange("POST", "/chat/completions", body, line) as reply:
            if not 200 <= reply.status < 300:
                raise self._refusal(reply)
            kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind.startswith(_NO_TEXT_KINDS):
                hint = self._path_hint()
                raise CloudProtocolError(
                    f"{self._url}: content type {one_line(kind, 80)!r}; expected text/event-stream{hint}"
                )
            chunks = reply.chunks(self._limits.response_bytes)
            try:
                yield from read_answer(chunks, answer, self._limits)
                reply.let_end(chunks)
            except FailedAnswerError as error:
                raise self._failure(error, reply, answer) from error
            except CloudProtocolError as error:
                raise CloudProtocolError(f"{self._url}: {error}") from error
            except CloudUnavailableError as error:
                raise RetryError(CloudUnavailableError(f"{self._url}: {error}")) from error

    def _failure(self, error: FailedAnswerError, reply: Reply, answer: AnswerUnderWay) -> Exception:
        """The exception for a failure inside a reply that looked like success: gateways report with status
        200 what the server behind them refuses."""
        failed, fault = CloudProtocolError(f"{self._url}: {error}"), error.fault
        if answer.shown:
            return failed
        status = named_status(fault)
        if status is not None and is_passing(status, fault):
            wait_s = retry_after_s(reply.headers, self._now)
            return RetryError(CloudUnavailableError(str(failed)), wait_s, status, fault)
        return _RefusedError(failed, reply.status, fault)

    def _concluded(self, answer: AnswerUnderWay) -> CloudResult:
        try:
            return answer.result(self.name)
        except CloudProtocolError as error:
            raise type(error)(f"{self._url}: {error}") from error

    def _refusal(self, reply: Reply) -> Exception:
        """The exception for a reply that is no answer."""
        status = reply.status
        fault = parse_fault(reply.start_of_body(_MAX_FAULT_BYTES, self._limits.settle_s))
        text = f"{self._url}: HTTP {status}{fault.shown}"
        if status == 429 or is_passing(status, fault):
            error = CloudUnavailableError(text)
            if not is_passing(status, fault):
                return error
            return RetryError(error, retry_after_s(reply.headers, self._now), status, fault)
        if 300 <= status < 400:
            place = one_line(shown_url(reply.headers.get("location", "")))
            text += f": redirects are not followed{f'; it points to {place}' if place else ''}"
        elif status in (401, 403) and self._options.api_key_env:
            text += f" (the key is read from {self._options.api_key_env})"
        elif status in (404, 405):
            about_model = "model" in fault.message.lower() or any("model" in code for code in fault.codes)
            text += f"; {_NAME_A_MODEL}" if about_model else self._path_hint()
        return _RefusedError(CloudProtocolError(text), status, fault)

    def _path_hint(self) -> str:
        if self._url.endswith("/v1"):
            return "; is that the URL of the API?"
        return f"; the URL of an API mostly ends in /v1: try {self._url}/v1"

    def _model_name(self, line: Line) -> str:
        if self._options.model is not None:
            return self._options.model
        with line.locked(self._list_lock):
            if self._listed is None:
                self._listed = self._first_model(line)
            return self._listed.id

    def _first_model(self, line: Line) -> ListedModel:
        attempt = 0
        while True:
            try:
                with self._transport.exchange("GET", "/models", None, line) as reply:
                    if reply.status != 200:
                        raise self._refusal(reply)
                    body = reply.body(_MAX_MODEL_LIST_BYTES)
                return first_chat_model(body)
            except _RefusedError as refused:
                asked = f"{refused.error}; it does not list its models: {_NAME_A_MODEL}"
                raise CloudProtocolError(asked) from refused
            except CloudProtocolError as error:
                hint = "" if self._url.endswith("/v1") else self._path_hint()
                raise CloudProtocolError(f"{self._url}/models: {error}; {_NAME_A_MODEL}{hint}") from error
            except RetryError as failed:
                self._back_off(attempt, failed, line)
                attempt += 1

    def _back_off(self, attempt: int, failed: RetryError, line: Line) -> None:
        """Waits before the next attempt, or raises what failed if there is none."""
        limits = self._limits
        if failed.wait_s is not None and failed.wait_s > limits.retry_after_cap_s:
            asked = f"{failed.error}; it asked to wait {failed.wait_s:.0f} s, more than "
            raise CloudUnavailableError(f"{asked}{limits.retry_after_cap_s:g} s") from failed
        if attempt + 1 >= limits.attempts:
            raise failed.error from failed
        # full jitter: many devices that lost the same cloud must not come back together
        wait_s = self._uniform(0.0, min(limits.backoff_cap_s, limits.backoff_base_s * 2**attempt))
        wait_s += failed.wait_s or 0.0
        if wait_s >= line.left_s():
            raise failed.error from failed
        (self._sleep or line.wait)(wait_s)
