"""One question to an endpoint, as most tests here ask it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud.base import CloudLimits, CloudOptions, CloudResult
from edge_reasoner.cloud.openai_protocol import OpenAIModel

#: far more time than a server on loopback takes, however busy the machine is
_LIMITS = CloudLimits(connect_s=20.0, read_s=20.0, total_s=60.0, attempts=2, backoff_base_s=0.01)
_DEFAULTS = SamplingParams()


@pytest.fixture
def ask() -> Callable[..., CloudResult]:
    """Asks the endpoint at a URL and gives the result."""

    def ask_one(url: str, params: SamplingParams = _DEFAULTS, **options) -> CloudResult:
        options = {"model": "m", "limits": _LIMITS, **options}
        model = OpenAIModel(CloudOptions(url, **options))
        try:
            return model.submit(ChatRequest(({"role": "user", "content": "hi"},), params=params)).result()
        finally:
            model.close()

    return ask_one
