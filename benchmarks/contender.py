"""One contender in a process of its own: `python contender.py JOB.json`. Started by peers.py and quality.py.

Jobs: "time" answers one prompt once cold and `warm_runs` times warm, and prints a line at the first token
and a JSON object at the end; "score" writes the choices and log probabilities on given texts (`Scores`).
Imports only what its kind of contender needs, so that a process's start and memory are its runtime's own.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FIRST_TOKEN = "first-token"
CONTEXT_TOKENS = 1024
_PREFILL_TOKENS = 512


class Contender(Protocol):
    """What is timed and scored alike, whatever the runtime."""

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Forgets everything, feeds the prompt and yields `new_tokens` greedy tokens as they come."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every position of a text, float32 [len(tokens), vocab]."""


class EdgeContender:
    """A bundle, on the path that the runtime's own `bench` takes."""

    def __init__(self, path: str, threads: int, cache_dir: str) -> None:
        from edge_reasoner.activation.activate import activate
        from edge_reasoner.chat.params import SamplingParams
        from edge_reasoner.contract.bundle.open import open_bundle
        from edge_reasoner.engine.loop import Engine, EngineLimits
        from edge_reasoner.engine.prefix import CacheLimits
        from edge_reasoner.query.assemble import open_tokenizer

        bundle = open_bundle(path)
        component = bundle.component("reasoner")
        activated = activate(bundle, "reasoner", threads=threads, cache_dir=Path(cache_dir))
        self._model = activated.decoder
        self._cache = self._model.new_cache(min(CONTEXT_TOKENS, component.spec.context_tokens))
        tokenizer = open_tokenizer(bundle, component)
        self._engine = Engine(
            self._model,
            tokenizer,
            name=component.name,
            eos_token_ids=(),
            clock=time.perf_counter,
            limits=EngineLimits(active=1, caches=CacheLimits(count=1)),
            context_tokens=self._cache.context_tokens,
        )
        self._params = SamplingParams
        chosen = activated.activation
        self.facts = {"variant": chosen.variant_id, "session_options": chosen.session_options}

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        for token in self._engine.submit(prompt, self._params(max_tokens=new_tokens)):
            if token.token_id is not None:
                yield token.token_id

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._cache.rewind(0)
        return self._model.extend(self._cache, np.asarray(tokens, np.int64), len(tokens)).logits


class LlamaCppContender:
    """A GGUF file in llama.cpp, through its C interface: no Python work beside the calls themselves."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp as llama

        self._llama = llama
        silent = llama.llama_log_callback(lambda level, text, data: None)
        self._silent = silent  # kept: the library calls it until the end
        llama.llama_log_set(silent, None)
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT_TOKENS, CONTEXT_TOKENS, _PREFILL_TOKENS
        options.n_threads = options.n_threads_batch = threads
        options.n_outputs_max = CONTEXT_TOKENS
        self._context = llama.llama_init_from_model(self._model, options)
        self._memory = llama.llama_get_memory(self._context)
        self._greedy = llama.llama_sampler_init_greedy()
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.facts = {"system": llama.llama_print_system_info().decode(errors="replace").strip()}

    def _decode(self, tokens: Sequence[int]) -> None:
        array = (self._llama.llama_token * len(tokens))(*tokens)
        if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        self._llama.llama_memory_clear(self._memory, True)
        self._decode(prompt)
        for number in range(new_tokens):
            token = self._llama.llama_sampler_sample(self._greedy, self._context, -1)
            yield token
            if number + 1 < new_tokens:
                self._decode([token])

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        llama = self._llama
        llama.llama_memory_clear(self._memory, True)
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        status = llama.llama_decode(self._context, batch)
        llama.llama_batch_free(batch)
        if status != 0:
            raise SystemExit("llama_decode failed")
        every = llama.llama_get_logits(self._context)
        rows: NDArray[np.float32] = np.ctypeslib.as_array(every, (len(tokens), self._vocab_size)).copy()
        return rows


class GenaiContender:
    """A folder of onnxruntime-genai's builder; its threads are set in genai_config.json."""

    def __init__(self, path: str) -> None:
        import onnxruntime_genai as genai  # type: ignore[import-untyped]

        self._genai = genai
        self._model = genai.Model(path)
        self.facts = {"version": genai.__version__}

    def _generator(self, least: int, most: int) -> Any:
        params = self._genai.GeneratorParams(self._model)
        # min_length keeps an end-of-answer token from ending the run
        params.set_search_options(min_length=least, max_length=most, do_sample=False)
        return self._genai.Generator(self._model, params)

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        total = len(prompt) + new_tokens
        generator = self._generator(total, total)
        generator.append_tokens(np.asarray([prompt], np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        generator = self._generator(0, CONTEXT_TOKENS)
        generator.append_tokens(np.asarray([tokens], np.int32))
        rows: NDArray[np.float32] = np.asarray(generator.get_output("logits"), np.float32)[0]
        if len(rows) != len(tokens):
            raise SystemExit(f"onnxruntime-genai gave {len(rows)} rows of logits for {len(tokens)} tokens")
        return rows


class TransformersContender:
    """The original in transformers, float32: what agreement is measured against. Scored only."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.facts: dict[str, Any] = {}

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        raise SystemExit("the reference is not timed")

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        with self._torch.no_grad():
            rows: NDArray[np.float32] = self._model(self._torch.tensor([list(tokens)])).logits[0].numpy()
        return rows


def open_contender(job: dict[str, Any]) -> Any:
    """The contender that a job names. Raises SystemExit for an unknown kind."""
    kind, path, threads = job["kind"], job["path"], job["threads"]
    if kind == "edge":
        return EdgeContender(path, threads, job["cache_dir"])
    if kind == "llama.cpp":
        return LlamaCppContender(path, threads)
    if kind == "genai":
        return GenaiContender(path)
    if kind == "transformers":
        return TransformersContender(path, threads)
    raise SystemExit(f"no contender is called {kind!r}")


def time_contender(job: dict[str, Any]) -> dict[str, Any]:
    """One cold answer, then `warm_runs` warm ones; rates in tokens per second."""
    contender = open_contender(job)
    prompt, new_tokens = job["prompt"], job["new_tokens"]
    for number, _ in enumerate(contender.answer(prompt, new_tokens)):
        if number == 0:
            sys.stdout.write(f"{FIRST_TOKEN}\n")
            sys.stdout.flush()
    peak_bytes = peak_rss_bytes()
    runs = []
    for _ in range(job["warm_runs"]):
        start_s = time.perf_counter()
        stream = contender.answer(prompt, new_tokens)
        next(stream)
        first_s = time.perf_counter()
        made = 1 + sum(1 for _ in stream)
        end_s = time.perf_counter()
        if made != new_tokens:
            raise SystemExit(f"{made} tokens instead of {new_tokens}")
        runs.append((len(prompt) / (first_s - start_s), (new_tokens - 1) / (end_s - first_s)))
    return {
        "prefill_tps": [prefill for prefill, _ in runs],
        "decode_tps": [decode for _, decode in runs],
        "peak_rss_bytes": peak_bytes,
        "facts": contender.facts,
    }


def score_contender(job: dict[str, Any]) -> dict[str, Any]:
    """Scores all texts (token id lists) and writes them to `out`."""
    from bench_common import Scores, score_rows

    contender = open_contender(job)
    choices, log_probs, texts = [], [], []
    for number, tokens in enumerate(job["texts"]):
        choice, log_prob = score_rows(contender.logits(tokens)[:-1], tokens[1:])
        choices.append(choice)
        log_probs.append(log_prob)
        texts.append(np.full(len(choice), number, np.int64))
    Scores(np.concatenate(choices), np.concatenate(log_probs), np.concatenate(texts)).save(Path(job["out"]))
    return {"facts": contender.facts}


def peak_rss_bytes() -> int:
    """Most memory that this process ever held (Linux: VmHWM)."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    """Reads the job and does it."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = {"time": time_contender, "score": score_contender}[job["task"]](job)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
