"""An export's memory does not grow with the model: one layer at a time, the vocabulary in slices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_checkpoints import VOCAB, save_checkpoint
from support.tiny_models import make_model

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HIDDEN, FFN, HEADS = 14, 640, 2560, 10
#: Above what the imports take and the mapped checkpoint: one layer's weights several times over, activations.
ALLOWED_MB = 320

#: The system itself holds the export to what it may take: an allocation beyond it fails. RLIMIT_DATA counts
#: private writable memory: what an export allocates, and the range (not the pages) of the checkpoint's
#: one mapping.
SCRIPT = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(2)
from edge_export.options import ExportOptions
from edge_export.pipeline import export
from edge_reasoner.backends import load_backend
load_backend("onnxruntime")
with open("/proc/self/status") as file:
    before = next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024
mapped = sum(path.stat().st_size for path in Path(sys.argv[1]).glob("*.safetensors"))
limit = before + mapped + int(sys.argv[4]) * 1024 * 1024
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
text = Path(sys.argv[3])
options = ExportOptions(recipe="auto", quantizer="searched", calibration=text, quality_text=text)
report = export(sys.argv[1], "generic-x86", sys.argv[2], options, cache=Path(sys.argv[2]).with_name("cache"))
print(json.dumps({"sizes": dict(report.sizes)}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A random fp32 checkpoint of about 370 MB."""
    folder = tmp_path_factory.mktemp("large")
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    }
    small = make_model("llama", vocab_size=VOCAB, num_hidden_layers=1, pad_token_id=2, **shape)
    tensors = {name: t for name, t in small.state_dict().items() if name != "lm_head.weight"}
    first = {name: t for name, t in tensors.items() if ".layers.0." in name}
    generator = torch.Generator().manual_seed(0)
    for index in range(1, LAYERS):
        for name, tensor in first.items():
            noise = torch.randn(tensor.shape, generator=generator).mul_(0.02)
            tensors[name.replace(".0.", f".{index}.", 1)] = tensor + noise
    save_checkpoint(small, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").stat().st_size > 300e6
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory figures from /proc")
def test_memory_stays_below_the_models_size(large, tmp_path):
    """A 370 MB checkpoint: all stages and the cache are content with less than that above the imports.

    The texts are short, for activations grow with them and not with the model.
    """
    (tmp_path / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog, then the fox rests\n" * 8
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            *map(str, (large, tmp_path / "out", tmp_path / "text.txt", ALLOWED_MB)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "export")]),
            "OMP_WAIT_POLICY": "PASSIVE",
            "MALLOC_ARENA_MAX": "2",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["sizes"]["source_bytes"] > 300e6
