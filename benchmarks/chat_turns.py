"""How long until the first token of each turn of a conversation, with a user who thinks between turns.

    python benchmarks/chat_turns.py BUNDLE [--conversations 5] [--pause-s 1]

Prints one JSON object: `ttft_ms` (medians over conversations, by turn), `prompt_tokens`, `cached_tokens` (of
the last conversation). Uses the public Python API only, so that `paired.py` can run it with other checkouts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from edge_reasoner import Reasoner

_SYSTEM = "You help the owner of coffee machine number {number}. Answer in a few words."
_TURNS = (
    "The machine shows error E17 after descaling, and water drips from the front. The tank is full and I have"
    " cleaned the filter twice this week. What should I look at first, and what is the likely reason?",
    "And if that does not help?",
    "Thank you. How often should the filter be changed?",
    "And the tank?",
)
_NEW_TOKENS = 80


def converse(reasoner: Reasoner, number: int, pause_s: float) -> list[Any]:
    """One conversation's answers."""
    session = reasoner.session(_SYSTEM.format(number=number))
    answers = []
    for prompt in _TURNS:
        answers.append(session.ask(prompt, max_tokens=_NEW_TOKENS))
        time.sleep(pause_s)
    return answers


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--conversations", type=int, default=5)
    parser.add_argument("--pause-s", type=float, default=1.0)
    options = parser.parse_args()
    with Reasoner.open(options.bundle, mode="offline") as reasoner:
        converse(reasoner, 0, 0.0)  # warm-up
        talks = [converse(reasoner, n + 1, options.pause_s) for n in range(options.conversations)]
    turns = list(zip(*talks, strict=True))
    found = {
        "ttft_ms": [statistics.median(answer.timings.ttft_ms for answer in turn) for turn in turns],
        "prompt_tokens": [turn[-1].usage.prompt_tokens for turn in turns],
        "cached_tokens": [turn[-1].usage.cached_tokens for turn in turns],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
