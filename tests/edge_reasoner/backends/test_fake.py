"""The fake decoder's own script; the protocol itself is checked in test_conformance.py."""

import numpy as np
from support.sequences import OneSequence

from edge_reasoner.backends.fake import FakeDecoder


def test_uniform_by_default():
    """Without a script every token is equally likely."""
    sequence = OneSequence(FakeDecoder(vocab_size=7, context_tokens=4))
    assert np.ptp(sequence.extend(np.array([1, 2], np.int64))) == 0.0


def test_script_by_position_and_by_function():
    """A mapping names the token at a position; a function sees all cached tokens."""
    sequence = OneSequence(FakeDecoder(9, 8, script={2: 5}))
    assert sequence.extend(np.array([1, 2], np.int64)).argmax() == 5
    assert np.ptp(sequence.extend(np.array([5], np.int64))) == 0.0
    sequence = OneSequence(model := FakeDecoder(9, 8, script=lambda tokens: (tokens[-1] + 1) % 9))
    rows = sequence.extend(np.array([3, 8, 2], np.int64), 3)
    assert rows.argmax(axis=1).tolist() == [4, 0, 3]
    assert (model.calls, model.fed_tokens, sequence.cache.tokens) == (1, 3, [3, 8, 2])
