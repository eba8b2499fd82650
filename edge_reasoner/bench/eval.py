"""Scores a bundle on questions with known answers.

Choices are scored by the log-likelihood that the local model gives to " " + choice after the question
(without a chat template), as EleutherAI's harness does: `acc` takes the largest sum, `acc_norm`, the
headline, the largest sum per character of the choice. A cloud's likelihoods cannot be read, so with modes
auto and cloud choices are asked as lettered questions and the letter is read from the answer. Open questions
are generated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_reasoner.activation.activate import activate
from edge_reasoner.backends.base import DecoderModel, KVCache
from edge_reasoner.bench.questions import Question, is_correct, lettered_prompt
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.contract.bundle.manifest import DecoderSpec
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.errors import BackendError, BundleError, ContextOverflowError, InputError, NoAnswerError
from edge_reasoner.query.answer import Answer
from edge_reasoner.query.assemble import DEFAULT_CONTEXT_TOKENS, Machine, open_tokenizer
from edge_reasoner.reasoner import Reasoner

Advance = Callable[[], None]
NORMALIZATION = "log-likelihood per character of the choice"


@dataclass(frozen=True)
class Result:
    """How one question went. `by_sum`: right by the unnormalized sum (scored choices only)."""

    metric: str
    source: str
    correct: bool
    by_sum: bool | None = None
    usd: float | None = 0.0


class ChoiceScorer:
    """Scores choices with one cache of a decoder: the question is fed once."""

    def __init__(
        self,
        model: DecoderModel,
        cache: KVCache,
        encode: Callable[[str], list[int]],
        bos_token_id: int | None,
    ) -> None:
        """`encode`: text → token ids, nothing added; `bos_token_id` begins every text, if any."""
        self._model, self._cache = model, cache
        self._encode = encode
        self._bos = [] if bos_token_id is None else [bos_token_id]

    def score(self, context: str, continuations: Sequence[str]) -> list[float]:
        """Natural log-likelihood of each continuation after `context`.

        A continuation's tokens are those of the joined text beyond the number that `context` alone has.
        Raises InputError for an empty context or continuation, ContextOverflowError, BackendError.
        """
        start = len(self._bos) + len(self._encode(context))
        if start == 0:
            raise InputError("a choice can only be scored after a question of at least one token")
        sequences = [[*self._bos, *self._encode(context + text)] for text in continuations]
        limit = self._cache.context_tokens
        for sequence in sequences:
            if len(sequence) <= start:
                raise InputError("a choice gives no token of its own")
            if len(sequence) > limit:
                raise ContextOverflowError(f"question and choice have {len(sequence)} tokens; {limit} fit")
        # The question goes in with the first choice; the others rewind to what all share, less one token: fed
        # again, it gives the logits for their first own token.
        shared = min(_common_prefix(sequences), start - 1)
        kept, scores = 0, []
        for sequence in sequences:
            self._cache.rewind(kept)
            fed = np.asarray(sequence[kept:-1], np.int64)
            logits = self._model.extend(self._cache, fed, len(sequence) - start).logits
            scores.append(_log_likelihood(logits, sequence[start:]))
            kept = shared
        return scores

    def judge(self, question: Question) -> Result:
        """The question's result, by the normalized score."""
        scores = self.score(question.context, [f" {choice}" for choice in question.choices])
        lengths = [len(choice) for choice in question.choices]
        best = int(np.argmax([score / length for score, length in zip(scores, lengths, strict=True)]))
        by_sum = int(np.argmax(scores)) == question.gold
        return Result("choice", "local", best == question.gold, by_sum)


def score_choices(
    bundle: Bundle, machine: Machine, questions: Sequence[Question], advance: Advance
) -> list[Result]:
    """Results of choice questions by the local model's likelihoods. Raises as opening a bundle does."""
    component = bundle.component("reasoner")
    spec = component.spec
    if not isinstance(spec, DecoderSpec):
        raise BundleError(f"{bundle.root}: component 'reasoner' is not a decoder")
    tokenizer = open_tokenizer(bundle, component)
    activated = activate(bundle, "reasoner", threads=machine.threads, cache_dir=machine.cache_dir)
    bos = spec.bos_token_id if spec.bos_token_id is not None else tokenizer.bos_id
    results = []
    with closing(activated.decoder) as model:
        cache = model.new_cache(min(spec.context_tokens, DEFAULT_CONTEXT_TOKENS))
        scorer = ChoiceScorer(model, cache, tokenizer.encode, bos)
        for question in questions:
            try:
                results.append(scorer.judge(question))
            except InputError as error:
                raise type(error)(f"line {question.line}: {error}") from error
            advance()
    return results


def ask_questions(
    reasoner: Reasoner, questions: Sequence[Question], params: SamplingParams, advance: Advance
) -> list[Result]:
    """Results of generated answers, each from wherever the reasoner's mode sends it. Raises as `ask` does.

    What a model thinks is not judged; one that thinks and gives no answer is wrong.
    """
    results = []
    for question in questions:
        prompt = lettered_prompt(question) if question.choices else question.text
        try:
            answer: Answer = reasoner.ask(prompt, params=params)
        except InputError as error:
            raise type(error)(f"line {question.line}: {error}") from error
        except NoAnswerError:
            # what it cost is not known
            results.append(Result(question.metric, "cloud", correct=False, usd=None))
            advance()
            continue
        correct = is_correct(question, answer.text)
        results.append(Result(question.metric, answer.source, correct, None, answer.cost.usd))
        advance()
    return results


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """The figures of `eval --json`. `stderr` is the sample standard error of the mean, None for one row.

    `acc` and `acc_norm` are of the scored choices alone (None without any); `usd` is None where a cloud
    answered whose price is not known.
    """
    scored = [result for result in results if result.by_sum is not None]
    costs = [result.usd for result in results]
    known = [usd for usd in costs if usd is not None]
    metrics = sorted({result.metric for result in results})
    return {
        **_figures([result.correct for result in results]),
        "metric": metrics[0] if len(metrics) == 1 else "mixed",
        "acc": _mean([bool(result.by_sum) for result in scored]),
        "acc_norm": _mean([result.correct for result in scored]),
        "normalization": NORMALIZATION if scored else None,
        "by_metric": _groups(results, lambda result: result.metric),
        "by_source": _groups(results, lambda result: result.source),
        "escalated_share": _mean([result.source == "cloud" for result in results]),
        "usd": sum(known) if len(known) == len(costs) else None,
    }


def _groups(results: Sequence[Result], key: Callable[[Result], str]) -> Mapping[str, Mapping[str, Any]]:
    return {
        name: _figures([result.correct for result in results if key(result) == name])
        for name in sorted({key(result) for result in results})
    }


def _figures(correct: Sequence[bool]) -> dict[str, Any]:
    count, accuracy = len(correct), _mean(correct)
    stderr = None
    if accuracy is not None and count > 1:
        stderr = math.sqrt(accuracy * (1 - accuracy) / (count - 1))
    return {"n": count, "accuracy": accuracy, "stderr": stderr}


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    count = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def _log_likelihood(logits: np.ndarray[Any, np.dtype[np.float32]], targets: Sequence[int]) -> float:
    """Sum of log-softmax at the targets; `logits` float32 [targets, vocab]."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        top = float(row.max())
        if not math.isfinite(top):
            raise BackendError("the model's logits are not finite")
        mass = float(np.exp(row - np.float32(top)).sum(dtype=np.float64))
        total += float(row[target]) - top - math.log(mass)
    return total
