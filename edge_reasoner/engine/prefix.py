"""KV caches kept between answers, so that a prompt that begins like an earlier one is not computed again.

**What is promised.** An answer does not depend on what was cached: tokens and statistics are the same, bit
for bit, warm or cold. Kernels do not promise that a token's keys and values come out alike from calls of
different lengths (one token at a time takes other kernels than many do), so prompts are always fed in the
same chunks, whose borders depend on the position alone (`chunk_end`), and only whole chunks that were fed as
a prompt are reused. Tokens of an answer, and the last, partial chunk, are fed again as part of the next
turn's prompt; where a conversation is known to go on, the loop does that ahead while nothing else is asked
(`Engine.prefill_ahead`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.base import DecoderModel, KVCache
from edge_reasoner.chat.checks import check_integer
from edge_reasoner.errors import BackendError

#: Shortest and longest chunk. A short one at the start lets short system prompts share. Long ones are fed
#: somewhat faster (256 by 5 %, measured on SmolLM2), but what follows the last border is fed again each turn.
MIN_CHUNK_TOKENS = 32
MAX_CHUNK_TOKENS = 64
#: A token's computing costs as much as copying the cache of far more tokens than this.
_TOKENS_COPIED_PER_TOKEN_SAVED = 32


def chunk_end(position: int) -> int:
    """The chunk border that follows `position`: 32, 64, then every 64 tokens."""
    size = MIN_CHUNK_TOKENS
    while size < MAX_CHUNK_TOKENS and position >= 2 * size:
        size *= 2
    return (position // size + 1) * size


@dataclass(frozen=True)
class CacheLimits:
    """Bounds of the caches that are kept, in use or not. Raises InputError.

    `bytes` None: bounded by their number alone. One answer is always possible, whatever it needs.
    """

    count: int = 8
    bytes: int | None = None

    def __post_init__(self) -> None:
        check_integer("count", self.count, 1)
        if self.bytes is not None:
            check_integer("bytes", self.bytes, 0)


@dataclass(frozen=True)
class HiddenMark:
    """Hidden states up to a position of a prompt: sum over its tokens, and the last; float32 [hidden]."""

    total: NDArray[np.float32]
    last: NDArray[np.float32]


@dataclass(eq=False)
class CachedSequence:
    """A cache and the tokens in it. `borders`: where reuse may begin, ascending."""

    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    borders: list[int] = field(default_factory=list)
    busy: bool = True
    #: tokens that its memory was touched for, and those that an answer under way may need
    touched_tokens: int = 0
    reserved_tokens: int = 0
    used_at: int = 0
    _hidden: dict[int, HiddenMark] = field(default_factory=dict)

    @property
    def held_tokens(self) -> int:
        """Tokens that its memory counts for."""
        return max(self.touched_tokens, self.reserved_tokens)

    def mark_border(self) -> None:
        """What is cached now ends with a whole chunk of a prompt."""
        self.borders.append(len(self.tokens))

    def mark_hidden(self, mark: HiddenMark) -> None:
        """Keeps the hidden states of all that is cached now."""
        self._hidden[len(self.tokens)] = mark

    def hidden_at(self, position: int) -> HiddenMark | None:
        """The hidden states of the first `position` tokens, where they were kept."""
        return self._hidden.get(position)

    def reusable(self, prompt: Sequence[int], *, hidden: bool) -> int:
        """How many tokens of `prompt` need not be fed: at least one is left to feed."""
        common = _common_prefix(self.tokens, prompt[:-1])
        usable = (b for b in reversed(self.borders) if b <= common and (not hidden or b in self._hidden))
        return next(usable, 0)

    def rewind(self, length_tokens: int) -> None:
        """Forgets what follows the first `length_tokens` tokens."""
        self.cache.rewind(length_tokens)
        del self.tokens[length_tokens:]
        self.borders = [border for border in self.borders if border <= length_tokens]
        self._hidden = {at: mark for at, mark in self._hidden.items() if at <= length_tokens}

    def fork(self, length_tokens: int) -> CachedSequence:
        """A second cache with the first `length_tokens` tokens."""
        twin = CachedSequence(self.cache.fork(), list(self.tokens), list(self.borders))
        twin._hidden = dict(self._hidden)
        twin.touched_tokens = len(self.tokens)
        twin.rewind(length_tokens)
        return twin


class CachePool:
    """The caches of one model. Belongs to the loop's thread."""

    def __init__(
        self, model: DecoderModel, limits: CacheLimits, bytes_per_token: int, context_tokens: int
    ) -> None:
        """`bytes_per_token`: of one cache; 0 where that is unknown. `context_tokens`: room of each cache."""
        self._model = model
        self._context_tokens = context_tokens
        self._limits = limits
        self._bytes_per_token = bytes_per_token
        self._sequences: list[CachedSequence] = []
        self._ticks = 0

    def take(self, prompt: Sequence[int], total_tokens: int, *, hidden: bool) -> CachedSequence | None:
        """A sequence that holds as much of `prompt` as can be reused, for an answer that takes up to
        `total_tokens` with its prompt; None: no room now, but once others have finished.

        A cache that would lose half of what can be reused of it, or more, is left for the conversation that
        it belongs to, as long as there is room for another. Raises BackendError: no memory for a first cache.
        """
        best, reuse = self._best(prompt, hidden)
        if best is None or best.busy or 2 * reuse <= best.borders[-1]:
            if self._make_room(total_tokens, best, new=True):
                worth = best is not None and reuse * _TOKENS_COPIED_PER_TOKEN_SAVED >= len(best.tokens)
                made = self._made(best if worth else None, reuse)
                self._sequences.append(made)
                return _lend(made, total_tokens)
            if best is None or best.busy:
                return None
        if not self._make_room(total_tokens, best, new=False):
            return None
        best.rewind(reuse)
        return _lend(best, total_tokens)

    def cached_tokens(self, prompt: Sequence[int], *, hidden: bool) -> int:
        """How many tokens of a prompt, or of the beginning of one, are kept in whole chunks."""
        return max((s.reusable(prompt, hidden=hidden) for s in self._sequences), default=0)

    def give_back(self, sequence: CachedSequence) -> None:
        """The answer is done; what it cached stays for the next."""
        self._ticks += 1
        sequence.busy, sequence.used_at = False, self._ticks
        sequence.touched_tokens = max(sequence.touched_tokens, len(sequence.tokens))
        sequence.reserved_tokens = 0

    def drop(self, sequence: CachedSequence) -> None:
        """Releases a cache whose state is not known any more."""
        self._sequences.remove(sequence)
        sequence.cache.close()

    def close(self) -> None:
        """Releases all of them."""
        while self._sequences:
            self.drop(self._sequences[-1])

    def _made(self, origin: CachedSequence | None, length_tokens: int) -> CachedSequence:
        """A fork of `origin`, or an empty one. Raises BackendError."""

        def make() -> CachedSequence:
            if origin is not None:
                return origin.fork(length_tokens)
            return CachedSequence(self._model.new_cache(self._context_tokens))

        try:
            return make()
        except BackendError:
            # no memory: what is kept for later goes first
            free = [sequence for sequence in self._sequences if not sequence.busy and sequence is not origin]
            if not free:
                raise
            for sequence in free:
                self.drop(sequence)
            return make()

    def _best(self, prompt: Sequence[int], hidden: bool) -> tuple[CachedSequence | None, int]:
        """The sequence with most to reuse, if any has something; of equals a free one, then the shortest."""
        best, best_key = None, (0, False, 0)
        for sequence in self._sequences:
            reuse = sequence.reusable(prompt, hidden=hidden)
            key = (reuse, not sequence.busy, -len(sequence.tokens))
            if reuse and key > best_key:
                best, best_key = sequence, key
        return best, best_key[0]

    def _make_room(self, total_tokens: int, kept: CachedSequence | None, *, new: bool) -> bool:
        """Drops free caches, longest unused first, until the answer fits; none if it cannot. `kept` stays.

        With nothing in use it always fits, if need be beyond the limit: `kept` is then the only other.
        """
        busy = [s for s in self._sequences if s.busy and s is not kept]
        free = sorted(
            (s for s in self._sequences if not s.busy and s is not kept),
            key=lambda s: s.used_at,
            reverse=True,
        )
        staying = busy if kept is None else [*busy, kept]
        if not self._fits(staying, total_tokens, None if new else kept):
            if any(s.busy for s in staying) or (new and kept is not None):
                return False
            for sequence in free:
                self.drop(sequence)
            return True
        while not self._fits([*staying, *free], total_tokens, None if new else kept):
            self.drop(free.pop())
        return True

    def _fits(
        self, sequences: Sequence[CachedSequence], total_tokens: int, reused: CachedSequence | None
    ) -> bool:
        """Whether an answer of `total_tokens` fits beside these, in `reused` or a cache of its own."""
        others = [s for s in sequences if s is not reused]
        tokens = sum(s.held_tokens for s in others)
        tokens += total_tokens if reused is None else max(total_tokens, reused.held_tokens)
        fits_bytes = self._limits.bytes is None or tokens * self._bytes_per_token <= self._limits.bytes
        return fits_bytes and len(others) < self._limits.count


def _lend(sequence: CachedSequence, total_tokens: int) -> CachedSequence:
    sequence.busy, sequence.reserved_tokens = True, total_tokens
    return sequence


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
