"""Tries a candidate where it can do no harm: in a child process with limits on time and memory.

A graph that passed every check may still hang, crash the library or take all memory; then the child is ended
and the candidate has failed. Where no child process can be started (an interpreter that is embedded in, or
frozen into, another program), candidates are tried in this process: what the checks at opening bound is
bounded there too, a crash or a hang is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from edge_reasoner.activation.child import TrialAnswer, TrialRequest, open_candidate, run_trial, variant_of
from edge_reasoner.activation.choice import Candidate
from edge_reasoner.backends.base import Backend
from edge_reasoner.backends.golden import Clock, Trial, golden_steps, longest_vector_tokens
from edge_reasoner.contract.bundle.manifest import Component, DecoderSpec, GoldenSet
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.errors import BackendError
from edge_reasoner.machine.confined import (
    ConfinedError,
    Limits,
    NoChildError,
    python_command,
    run_confined,
)
from edge_reasoner.machine.memory import available_bytes

#: what any trial may take, and beside it what a slow board needs for the files' bytes: reading them from a
#: card, repacking them, and reading them again for each step of the golden vectors
_BASE_S, _LOAD_BYTES_PER_S, _STEP_BYTES_PER_S = 60.0, 5e6, 2e8
_MOST_S = 1800.0
#: all candidates together, in shares of one's time
_TOTAL_SHARE = 4.0
#: memory of a trial: the interpreter, the library and activations; and weights, repacked in wider types
_BASE_BYTES, _BYTES_PER_STORED = 1_000_000_000, 4
#: address space that threads and allocators reserve without using it
_RESERVED_BYTES = 2_000_000_000
#: of the memory that is available now
_AVAILABLE_SHARE = 0.9
_LEAST_BYTES = 256_000_000


@dataclass(frozen=True)
class Confinement:
    """How candidates are confined. The defaults follow from the size of the model."""

    #: see `python_command`
    python: Sequence[str] = field(default_factory=python_command)
    #: most time for one candidate, and for all
    candidate_s: float | None = None
    total_s: float | None = None
    #: most memory that is not backed by files
    memory_bytes: int | None = None
    clock: Callable[[], float] = time.monotonic


@dataclass
class Trials:
    """The trials of one component's candidates."""

    bundle: Bundle
    component: Component
    golden: GoldenSet
    backends: Mapping[str, Backend]
    threads: int
    #: of the trials themselves, where they run in this process
    clock: Clock
    #: None: in this process
    confinement: Confinement | None
    _until_s: float | None = None

    def run(self, candidate: Candidate) -> Trial:
        """Tries one candidate. Raises BackendError or BundleError, saying in one line how it failed."""
        if self.confinement is not None:
            try:
                return self._confined(candidate, self.confinement)
            except NoChildError:
                self.confinement = None
        backend = self.backends[variant_of(self.component, candidate.variant_id).backend]
        model = open_candidate(self.bundle, self.component, backend, candidate, self.threads)
        try:
            return run_trial(model, self.golden, self.clock)
        finally:
            model.close()

    def _confined(self, candidate: Candidate, confinement: Confinement) -> Trial:
        descriptor = self.bundle.folder.descriptor
        if descriptor is None:
            raise NoChildError("this system opens no files below a descriptor")
        limits = self._limits(candidate, confinement)
        weights = self.bundle.weights[variant_of(self.component, candidate.variant_id).graph]
        request = TrialRequest(
            limits=limits,
            root=str(self.bundle.root).encode("utf-8", "replace").decode(),
            descriptor=descriptor,
            bundle_id=self.bundle.manifest.bundle_id,
            kind=self.component.kind,
            candidate=candidate,
            threads=self.threads,
            weights={name: self.bundle.seen[name] for name in weights},
        )
        try:
            said = run_confined(
                "edge_reasoner.activation.child",
                "main",
                msgspec.json.encode(request),
                limits,
                python=confinement.python,
                descriptors=(descriptor,),
                clock=confinement.clock,
            )
            return msgspec.json.decode(said, type=TrialAnswer).trial()
        except ConfinedError as error:
            raise BackendError(f"its test {error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BackendError("its test gave an answer that is none") from error

    def _limits(self, candidate: Candidate, confinement: Confinement) -> Limits:
        """Raises BackendError when the time of all candidates is over."""
        graph = variant_of(self.component, candidate.variant_id).graph
        files = (graph, *self.bundle.weights[graph])
        stored_bytes = sum(self.bundle.entry(name).size_bytes for name in files)
        wall_s = confinement.candidate_s
        if wall_s is None:
            steps_s = golden_steps(self.golden) * stored_bytes / _STEP_BYTES_PER_S
            wall_s = min(_MOST_S, _BASE_S + stored_bytes / _LOAD_BYTES_PER_S + steps_s)
        total_s = _TOTAL_SHARE * wall_s if confinement.total_s is None else confinement.total_s
        now_s = confinement.clock()
        self._until_s = now_s + total_s if self._until_s is None else self._until_s
        left_s = self._until_s - now_s
        if left_s <= 0:
            raise BackendError("not tried: the time for all tests is over")
        kv_bytes = room_bytes = 0
        if isinstance(spec := self.component.spec, DecoderSpec):
            kv_bytes = 2 * longest_vector_tokens(self.golden) * spec.kv_bytes_per_token
            room_bytes = spec.context_tokens * spec.kv_bytes_per_token
        memory_bytes = _BASE_BYTES + _BYTES_PER_STORED * stored_bytes + kv_bytes
        if confinement.memory_bytes is not None:
            memory_bytes = confinement.memory_bytes
        available = available_bytes()
        here = memory_bytes if available is None else max(_LEAST_BYTES, int(available * _AVAILABLE_SHARE))
        return Limits(
            wall_s=min(wall_s, left_s),
            cpu_s=min(wall_s, left_s) * self.threads + _BASE_S,
            memory_bytes=min(memory_bytes, here),
            reserved_bytes=memory_bytes + room_bytes + _RESERVED_BYTES,
        )
