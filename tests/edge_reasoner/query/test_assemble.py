"""From a bundle to its parts: what was opened is closed where a later step fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny_bundle
from support.answering_bundle import write_answering_bundle

from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.errors import BundleError, EdgeReasonerError, InputError
from edge_reasoner.reasoner import Reasoner


@pytest.fixture
def open_models(monkeypatch: pytest.MonkeyPatch) -> list[OrtDecoder]:
    """Decoders that were opened and not closed since."""
    found: list[OrtDecoder] = []
    opened, closed = OrtDecoder.__init__, OrtDecoder.close

    def open_(self: OrtDecoder, *arguments: Any, **options: Any) -> None:
        opened(self, *arguments, **options)
        found.append(self)

    def close(self: OrtDecoder) -> None:
        closed(self)
        if self in found:
            found.remove(self)

    monkeypatch.setattr(OrtDecoder, "__init__", open_)
    monkeypatch.setattr(OrtDecoder, "close", close)
    return found


@pytest.mark.parametrize(
    ("broken", "options", "error"),
    [(False, {"context_tokens": 10**6}, InputError), (True, {}, BundleError)],
)
def test_nothing_stays_open_after_a_failure(
    broken: bool, options: dict, error: type[EdgeReasonerError], open_models: list[OrtDecoder], tmp_path: Path
) -> None:
    """A context that is too long, and a broken preprocessor: the decoder, open by then, is closed."""
    root = write_answering_bundle(tmp_path / "bundle")
    with Reasoner.open(root, cache_dir=tmp_path / "cache"):
        assert len(open_models) == 1
    if broken:
        (root / "tokenizer/preprocessor/tokenizer.json").write_text("{}")
        tiny_bundle.relist(root, "tokenizer/preprocessor/tokenizer.json")
    with pytest.raises(error):
        Reasoner.open(root, cache_dir=tmp_path / "cache", **options)
    assert open_models == []


@pytest.mark.parametrize("threads", [1025, 10**5])
def test_threads_beyond_any_machine_are_refused(threads: int, tmp_path: Path) -> None:
    """Bad input, said before the library starts them."""
    root = write_answering_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match="1024 are the most"):
        Reasoner.open(root, cache_dir=tmp_path / "cache", threads=threads)
