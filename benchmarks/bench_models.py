"""The models that the benchmarks compare, made once into `.cache/bench` and kept while their sources stay.

SmolLM2-135M-Instruct comes as a Q4_1 GGUF file. Everything else is made from its dequantized weights: a
Hugging Face directory (for transformers and onnxruntime-genai's builder), other GGUF types by llama.cpp's own
quantizer, and our bundles. The weights therefore lie on a 4-bit grid already; `small_lm.py` trains a model
whose weights never did.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from bench_common import HERE, ROOT, WORK, say
from numpy.typing import NDArray

GGUF = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
#: our bundles: name → (recipe, quantizer)
RECIPES = {
    "fp32": ("fp32", "gptq"),
    "int8": ("int8", "gptq"),
    "auto": ("auto", "gptq"),
    "mixed": ("mixed", "gptq"),
    "int4": ("int4", "gptq"),
    "int4-rtn": ("int4", "rtn"),
}
#: llama.cpp's numbers of its file types
_GGUF_TYPES = {"Q4_0": 2, "Q8_0": 7}
_PROFILE = "generic-x86"
_TIMEOUT_S = 3600
#: what decides the bytes of a bundle
_EXPORT_SOURCES = ("export/edge_export", "device_profiles")


def smollm2_gguf() -> Path:
    """The Q4_1 file that `make models` fetches. Raises SystemExit if it is absent."""
    if not GGUF.is_file():
        raise SystemExit(f"{GGUF.relative_to(ROOT)} is absent: `make models` fetches it")
    return GGUF


def parse_given(values: Sequence[str]) -> dict[str, Path]:
    """RECIPE=DIR arguments as a mapping. SystemExit for a bad one."""
    given = {}
    for value in values:
        name, _, folder = value.partition("=")
        if name not in RECIPES or not (Path(folder) / "manifest.json").is_file():
            raise SystemExit(f"--bundle {value!r}: RECIPE=BUNDLE is needed; recipes: {', '.join(RECIPES)}")
        given[name] = Path(folder).absolute()
    return given


def make_bundles(
    model: Path, label: str, names: Sequence[str], given: Mapping[str, Path] = MappingProxyType({})
) -> dict[str, Path]:
    """Name of `RECIPES` → bundle directory of `model`: a given one, or one exported for this architecture."""
    from edge_export.options import ExportOptions
    from edge_export.pipeline import export

    digest = _export_digest(model)
    bundles = {}
    for name in names:
        if name in given:
            bundles[name] = given[name]
            continue
        recipe, quantizer = RECIPES[name]
        folder = WORK / "bundles" / f"{label}-{name}-{digest}"

        def make(out: Path, recipe: str = recipe, quantizer: str = quantizer) -> None:
            export(str(model), _PROFILE, out, ExportOptions(recipe=recipe, quantizer=quantizer))

        bundles[name] = made_once(folder, make)
    return bundles


def make_huggingface() -> Path:
    """SmolLM2's dequantized weights as a Hugging Face directory, float32."""
    return made_once(WORK / "smollm2-huggingface", _write_huggingface)


def make_gguf(kind: str) -> Path:
    """SmolLM2 as a GGUF file of that type; Q4_1 is the file itself, the others are llama.cpp's work."""
    if kind == "Q4_1":
        return smollm2_gguf()

    def make(out: Path) -> None:
        import llama_cpp as llama

        silent = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(silent, None)
        options = llama.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.nthread = _GGUF_TYPES[kind], True, 2
        status = llama.llama_model_quantize(str(smollm2_gguf()).encode(), str(out).encode(), options)
        if status != 0:
            raise SystemExit(f"llama_model_quantize failed for {kind}: status {status}")

    return made_once(WORK / f"smollm2-{kind}.gguf", make)


def make_genai(python: str, threads: int) -> Path:
    """SmolLM2 by onnxruntime-genai's builder: int4, block 32, accuracy level 4, symmetric (its default)."""
    folder = made_once(
        WORK / "smollm2-genai-int4",
        lambda out: _build_genai(python, make_huggingface(), out),
    )
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    options = config["model"]["decoder"]["session_options"]
    options["intra_op_num_threads"], options["inter_op_num_threads"] = threads, 1
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def weight_bytes(kind: str, path: Path) -> int:
    """Bytes of the files that hold a model's graph and weights."""
    if kind == "edge":
        from edge_reasoner.contract.bundle.graph_bytes import graph_bytes
        from edge_reasoner.contract.bundle.open import open_bundle

        bundle = open_bundle(path)
        return graph_bytes(bundle, bundle.component("reasoner").variants[0].graph).stored
    if kind == "genai":
        return sum(file.stat().st_size for file in path.glob("model.onnx*"))
    return path.stat().st_size


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made beside it first if it is not there."""
    if path.exists():
        return path
    say(f"making {path.relative_to(ROOT)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as scratch:
        partial = Path(scratch) / path.name
        make(partial)
        partial.replace(path)
    return path


def _export_digest(model: Path) -> str:
    """Changes with the exporter's code, the profiles and the model."""
    digest = hashlib.sha256()
    for folder in _EXPORT_SOURCES:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".txt", ".toml"):
                digest.update(file.read_bytes())
    files = [model] if model.is_file() else sorted(model.glob("*"))
    for file in files:
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:10]


def _write_huggingface(out: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    gguf_file = smollm2_gguf()
    config, tensors = _dequantized(gguf_file)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(out)


def _dequantized(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Hugging Face configuration and tensors of a Llama in a GGUF file, read with the `gguf` package."""
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    tensors = {}
    for tensor in reader.tensors:
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in top:
            tensors[top[tensor.name]] = rows
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            rows = half_split_rope(rows, heads if part == "attn_q" else kv_heads)
        tensors[f"model.layers.{layer}.{names[part]}.weight"] = rows
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "hidden_size": value("embedding_length"), "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base"), "vocab_size": value("vocab_size"), "hidden_act": "silu",
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    return config, tensors


def half_split_rope(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """A head's rows in two halves, as transformers has them, from llama.cpp's order (pairs side by side)."""
    width = rows.shape[0] // heads
    halves: NDArray[np.float32] = rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
    return halves


def _build_genai(python: str, source: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [python, "-m", "onnxruntime_genai.models.builder", "-m", str(source), "-o", str(out),
                   "-p", "int4", "-e", "cpu", "-c", cache,
                   "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]  # fmt: skip
        done = subprocess.run(
            command, cwd=HERE, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    if done.returncode != 0:
        shutil.rmtree(out, ignore_errors=True)
        raise SystemExit(f"onnxruntime-genai's builder failed:\n{(done.stdout + done.stderr)[-3000:]}")
