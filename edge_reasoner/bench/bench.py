"""Measures a bundle on this machine: loading, first token, prefill, decode, memory, bandwidth.

Prompts are random token ids of exact number, drawn with a seed; end-of-answer tokens are ignored, so every
run makes exactly the tokens asked for. Runs share nothing but the loaded model; the first is discarded. What
depends on a fresh process (cold start, peak memory) is measured in one, with the files in the page cache.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from edge_reasoner.activation.activate import Activated, activate
from edge_reasoner.chat.checks import check_integer, refuse
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.contract.bundle.graph_bytes import graph_bytes
from edge_reasoner.contract.bundle.manifest import DecoderSpec
from edge_reasoner.contract.bundle.open import Bundle, open_bundle
from edge_reasoner.engine.loop import Engine, EngineLimits
from edge_reasoner.engine.prefix import CacheLimits
from edge_reasoner.errors import BackendError, BundleError, InputError
from edge_reasoner.machine.allowance import allowance
from edge_reasoner.query.assemble import DEFAULT_CONTEXT_TOKENS, Machine, open_tokenizer

MAX_REPEATS = 1000
_LOADS = 3
_FRESH_TIMEOUT_S = 1800.0
#: read of what the fresh process wrote to its standard error
_MAX_SAID_BYTES = 1 << 16
_FIRST_TOKEN = "first-token"
_FRESH = "import sys\nfrom edge_reasoner.bench.bench import run_fresh\nrun_fresh(sys.stdin.readline())\n"


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. Raises InputError for what makes no sense."""

    prompt_tokens: int = 512
    new_tokens: int = 128
    repeats: int = 5
    concurrency: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"prompt_tokens": 1 << 20, "new_tokens": 1 << 20, "repeats": MAX_REPEATS}
        for name, most in limits.items():
            check_integer(name, getattr(self, name), 1, most)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        check_integer("concurrency", self.concurrency, 1)
        if self.concurrency > 1:
            refuse("concurrency", self.concurrency, "1: only 1 answer at a time can be measured")


@dataclass(frozen=True)
class _Run:
    """Warm figures of one run."""

    prefill_tps: float | None
    decode_tps: float | None
    ttft_ms: float


def bench(
    bundle: Bundle,
    machine: Machine,
    options: BenchOptions,
    *,
    machine_gbps: Callable[[], float],
    advance: Callable[[str], None],
    python: Sequence[str] = (sys.executable,),
) -> dict[str, Any]:
    """The figures that `bench --json` prints; medians over the repeats; MB are 10⁶ bytes.

    `machine_gbps` measures the machine's read bandwidth; `advance` is told what is measured next. Raises
    InputError (the tokens do not fit), BackendError, and what opening the bundle raises.
    """
    component = bundle.component("reasoner")
    spec = component.spec
    if not isinstance(spec, DecoderSpec):
        raise BundleError(f"{bundle.root}: component 'reasoner' is not a decoder")
    context = _context_tokens(spec, options)
    open_tokenizer(bundle, component)  # a broken one is said before anything is measured
    advance("self-test")
    _open(bundle, machine).model.close()  # the choice of kernels is made once, not measured
    advance("fresh process")
    cold_ms, peak_bytes = _measure_fresh(bundle, machine, spec, options, context, python)
    advance("loading")
    load_ms, activated = _measure_loads(bundle, machine, context)
    try:
        runs = _measure_runs(bundle, activated, spec, options, context, machine.clock, advance)
    finally:
        activated.model.close()
    advance("memory bandwidth")
    read_gbps, allowed = machine_gbps(), allowance()
    return {
        "load_ms": load_ms,
        "cold_first_token_ms": cold_ms,
        "peak_rss_mb": peak_bytes / 1e6,
        "machine_gbps": read_gbps,
        "threads": machine.threads,
        "allowance": msgspec.to_builtins(allowed) | {"reason": allowed.reason()},
        **_speed(bundle, activated.activation.variant_id, spec, options, runs),
        "session_options": activated.activation.session_options,
        "runtime": activated.activation.machine.runtime,
        "cpu": activated.activation.machine.cpu,
        "model": bundle.manifest.model,
        "bundle_id": bundle.manifest.bundle_id,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "concurrency": options.concurrency,
        "repeats": options.repeats,
    }


def _speed(
    bundle: Bundle, variant_id: str, spec: DecoderSpec, options: BenchOptions, runs: Sequence[_Run]
) -> dict[str, Any]:
    """The runs' medians and the bandwidth that they come to."""
    variants = bundle.component("reasoner").variants
    size = graph_bytes(bundle, next(v.graph for v in variants if v.id == variant_id))
    # a step reads the weights and the KV cache as filled on average
    kv_bytes = spec.kv_bytes_per_token * (options.prompt_tokens + options.new_tokens / 2)
    streamed_bytes = size.streamed + kv_bytes
    decode_tps = _median([run.decode_tps for run in runs])
    return {
        "prefill_tps": _median([run.prefill_tps for run in runs]),
        "decode_tps": decode_tps,
        "ttft_ms": statistics.median(run.ttft_ms for run in runs),
        "weight_bytes": size.stored,
        "streamed_bytes_per_token": streamed_bytes,
        "effective_gbps": None if decode_tps is None else streamed_bytes * decode_tps / 1e9,
        "variant": variant_id,
        "runs": {
            name: [getattr(run, name) for run in runs] for name in ("prefill_tps", "decode_tps", "ttft_ms")
        },
    }


def run_fresh(arguments: str) -> None:
    """Runs in a process of its own, for `bench`: opens the bundle as an application would and answers once.

    Prints a line at the first token and, at the end, a JSON object with the process's peak memory.
    """
    given: Mapping[str, Any] = json.loads(arguments)
    cache_dir = None if given["cache_dir"] is None else Path(given["cache_dir"])
    machine = Machine(threads=given["threads"], cache_dir=cache_dir)
    bundle = open_bundle(given["bundle"])
    activated = _open(bundle, machine)
    engine = _engine(bundle, activated, given["context_tokens"], machine.clock)
    params = SamplingParams(max_tokens=given["new_tokens"])
    for index, _ in enumerate(engine.submit(given["prompt_ids"], params)):
        if index == 0:
            sys.stdout.write(f"{_FIRST_TOKEN}\n")
            sys.stdout.flush()
    engine.close()
    sys.stdout.write(json.dumps({"peak_rss_bytes": peak_rss_bytes()}) + "\n")


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Most memory this process ever held.

    From VmHWM where there is one: Linux's getrusage also counts what the parent held before exec.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d{1,15}) kB", status.read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def random_prompt(vocab_size: int, count: int, seed: Sequence[int]) -> list[int]:
    """`count` token ids below `vocab_size`; the same for the same seed."""
    ids: list[int] = np.random.default_rng(list(seed)).integers(0, vocab_size, count).tolist()
    return ids


def _context_tokens(spec: DecoderSpec, options: BenchOptions) -> int:
    needed = options.prompt_tokens + options.new_tokens
    if needed > spec.context_tokens:
        raise InputError(
            f"prompt_tokens={options.prompt_tokens} and new_tokens={options.new_tokens}: {needed} tokens"
            f" together; this model's context is {spec.context_tokens}"
        )
    return min(spec.context_tokens, max(needed, DEFAULT_CONTEXT_TOKENS))


def _open(bundle: Bundle, machine: Machine) -> Activated:
    return activate(bundle, "reasoner", threads=machine.threads, cache_dir=machine.cache_dir)


def _engine(bundle: Bundle, activated: Activated, context: int, clock: Callable[[], float]) -> Engine:
    component = bundle.component("reasoner")
    return Engine(
        activated.decoder,
        open_tokenizer(bundle, component),
        name=component.name,
        eos_token_ids=(),
        clock=clock,
        # one answer at a time, and nothing kept that a run could reuse
        limits=EngineLimits(active=1, caches=CacheLimits(count=1)),
        context_tokens=context,
    )


def _measure_loads(bundle: Bundle, machine: Machine, context: int) -> tuple[float, Activated]:
    """Median ms from a bundle directory to a model that can answer, hashes checked; the last one open."""
    samples_ms = []
    activated: Activated | None = None
    for _ in range(_LOADS):
        if activated is not None:
            activated.model.close()
        start_s = machine.clock()
        opened = open_bundle(bundle.root)
        activated = _open(opened, machine)
        activated.decoder.new_cache(context)
        open_tokenizer(opened, opened.component("reasoner"))
        samples_ms.append((machine.clock() - start_s) * 1e3)
    assert activated is not None, "at least one load was made"
    return statistics.median(samples_ms), activated


def _measure_runs(
    bundle: Bundle,
    activated: Activated,
    spec: DecoderSpec,
    options: BenchOptions,
    context: int,
    clock: Callable[[], float],
    advance: Callable[[str], None],
) -> list[_Run]:
    params = SamplingParams(max_tokens=options.new_tokens)
    runs = []
    with closing(_engine(bundle, activated, context, clock)) as engine:
        for number in range(options.repeats + 1):
            advance(f"run {number} of {options.repeats}" if number else "warm-up")
            prompt = random_prompt(spec.vocab_size, options.prompt_tokens, (options.seed, number))
            done = engine.submit(prompt, params).result()
            if done.usage.cached_tokens or done.usage.completion_tokens != options.new_tokens:
                raise BackendError(f"bench: {done.usage} instead of {options.new_tokens} uncached tokens")
            runs.append(_Run(done.timings.prefill_tps, done.timings.decode_tps, done.timings.ttft_ms))
    return runs[1:]


def _measure_fresh(
    bundle: Bundle,
    machine: Machine,
    spec: DecoderSpec,
    options: BenchOptions,
    context_tokens: int,
    python: Sequence[str],
) -> tuple[float, int]:
    """ms from the start of a process to its first token, and its peak memory in bytes."""
    arguments = {
        "bundle": str(bundle.root),
        "threads": machine.threads,
        "cache_dir": None if machine.cache_dir is None else str(machine.cache_dir.absolute()),
        "context_tokens": context_tokens,
        "new_tokens": options.new_tokens,
        "prompt_ids": random_prompt(spec.vocab_size, options.prompt_tokens, (options.seed, 1 << 16)),
    }
    package_root = str(Path(__file__).parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start_s = time.perf_counter()
    with (
        # a file: a pipe that nobody reads yet would be full, and the process would wait
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [*python, "-c", _FRESH],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        timer = threading.Timer(_FRESH_TIMEOUT_S, process.kill)
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None, "pipes were asked for"
            with suppress(BrokenPipeError):  # it died; what it said comes below
                # not as an argument: a long prompt is more than one may hold
                process.stdin.write(json.dumps(arguments) + "\n")
                process.stdin.flush()
            first = process.stdout.readline().strip()
            cold_ms = (time.perf_counter() - start_s) * 1e3
            rest, _ = process.communicate()
            errors = _end_of(said)
        finally:
            timer.cancel()
            process.kill()
    last = next(
        (line for line in reversed(errors.splitlines()) if line.strip()), f"status {process.returncode}"
    )
    if process.returncode != 0 or first != _FIRST_TOKEN:
        raise BackendError(f"bench: the fresh process failed: {last.strip()[:400]}")
    return cold_ms, int(json.loads(rest)["peak_rss_bytes"])


def _end_of(file: BinaryIO) -> str:
    """The last of what a file holds, as text."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _MAX_SAID_BYTES))
    return file.read(_MAX_SAID_BYTES).decode("utf-8", "replace")


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
