"""The encoder's way through the exporter: files, plan, cost, golden vectors, quality, real MiniLM."""

from __future__ import annotations

import json
import time
from math import prod
from pathlib import Path

import msgspec
import pytest
import torch
from support.lowered_encoders import lower_encoder
from support.tiny_berts import SHAPES, embed_with_transformers, make_bert
from transformers import AutoTokenizer, BertModel

from edge_export.model.encoder import encoder_tensor_shapes
from edge_export.plan.recipes import RECIPES
from edge_export.verify.encoder import GOLDEN_TEXTS, encoder_golden, encoder_quality
from edge_reasoner.backends.golden import check_golden, try_encoder
from edge_reasoner.backends.onnxruntime.encoder import OrtEncoder
from edge_reasoner.contract.profile.load import load_profile
from edge_reasoner.errors import InputError, TargetError

PROFILE = load_profile("generic-arm64")
TEXTS = ("w1 w2 w3", "w4ab w5", "w6 w7 w8 w9 w10 w11 w12 unknown w13", "", "w25")
DATA = Path(__file__).parents[4] / "shared" / "data" / "questions"


def golden_of(folder, lowered, texts=TEXTS):
    """Golden vectors of the weights that lie in `folder`."""
    data = folder / "graphs/preprocessor.data"
    return encoder_golden(lowered.encoder, data, lowered.stored, lowered.plan.cosine_tolerance, texts)


def open_variant(folder, lowered, index=0):
    """The device's own model of a variant."""
    return OrtEncoder(folder / lowered.variants[index].graph, lowered.spec, threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random encoder's folder."""
    path = tmp_path_factory.mktemp("bert")
    make_bert(path, "even")
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_variant_reproduces_its_golden_vectors(tiny, tmp_path, recipe):
    """The device's own check accepts each graph, and the vectors suit the spec."""
    lowered = lower_encoder(tiny, recipe, PROFILE, tmp_path)
    golden = golden_of(tmp_path, lowered)
    check_golden(golden, lowered.spec, "golden")
    for index in range(len(lowered.variants)):
        trial = try_encoder(open_variant(tmp_path, lowered, index), golden, time.monotonic)
        assert trial.problem == ""


def test_golden_vectors_notice_other_weights(tiny, tmp_path):
    """A graph whose weights file was damaged fails the check that the intact one passes."""
    lowered = lower_encoder(tiny, "int8", PROFILE, tmp_path)
    golden = golden_of(tmp_path, lowered)
    data = tmp_path / "graphs/preprocessor.data"
    content = bytearray(data.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    data.write_bytes(content)
    trial = try_encoder(open_variant(tmp_path, lowered), golden, time.monotonic)
    assert "1 − cosine" in trial.problem


def test_plan_and_cost_add_up(tiny, tmp_path):
    """Records are plain JSON; bytes and multiply-accumulates follow from the tensor shapes."""
    lowered = lower_encoder(tiny, "fp32", PROFILE, tmp_path)
    config, cost = lowered.encoder.config, lowered.cost
    shapes = encoder_tensor_shapes(config)
    assert lowered.plan.weight_bytes == 4 * sum(prod(shape) for shape in shapes.values())
    linear = [s for name, s in shapes.items() if name.startswith("layers") and len(s) == 2]
    assert cost.linear_macs_per_token == sum(map(prod, linear))
    words = 4 * config.vocab_size * config.hidden_size
    assert cost.streamed_weight_bytes == lowered.plan.weight_bytes - words
    assert cost.attention_macs_per_pair == 2 * config.hidden_size * config.num_layers
    plan = json.loads(json.dumps(lowered.plan.to_dict()))
    assert len(plan["matrices"]) == 3 + 4 * config.num_layers
    assert plan["matrices"][3] == {
        "name": "layers.0.qkv", "rows": 192, "columns": 64, "format": "float32", "bytes": 4 * 192 * 64,
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_knows_what_will_be_stored(shape, recipe, tmp_path):
    """Bytes are planned to the last one, also where rows do not fill whole blocks."""
    make_bert(tmp_path / "model", shape)
    lowered = lower_encoder(tmp_path / "model", recipe, PROFILE, tmp_path / "out")
    stored = lowered.stored.weights
    assert lowered.plan.weight_bytes == sum(weight.size_bytes for weight in stored.values())
    for weight in lowered.plan.weights:
        assert weight.size_bytes == stored[weight.name].size_bytes


def test_files_and_variants(tiny, tmp_path):
    """The role names the files; every variant's graph is listed; a float recipe needs no second graph."""
    for recipe, graphs in (("fp16", 1), ("int4", 2)):
        folder = tmp_path / recipe
        lowered = lower_encoder(tiny, recipe, PROFILE, folder)
        written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        named = {v.graph for v in lowered.variants}
        assert written == {*named, "graphs/preprocessor.data"} and len(named) == graphs
        assert lowered.variants[-1].reference
        assert all(v.ram_floor_bytes > lowered.plan.weight_bytes for v in lowered.variants)


def test_same_input_same_bytes(tiny, tmp_path):
    """Two exports of one checkpoint are byte-identical."""
    contents = []
    for name in ("a", "b"):
        lower_encoder(tiny, "int4", PROFILE, tmp_path / name)
        files = sorted((tmp_path / name / "graphs").iterdir())
        contents.append([(file.name, file.read_bytes()) for file in files])
    assert contents[0] == contents[1] and len(contents[0]) == 3


def test_progress_reaches_its_total(tiny, tmp_path):
    """Progress counts every weight up to the total."""
    calls = []
    lower_encoder(tiny, "fp32", PROFILE, tmp_path, lambda *call: calls.append(call))
    assert {what for what, _, _ in calls} == {"quantizing the encoder"}
    assert [done for _, done, _ in calls] == list(range(calls[0][2] + 1))


def test_quality_of_the_fp32_graph_is_perfect(tiny, tmp_path):
    """Cosines to the float32 encoder are 1; the figures are named and bounded."""
    lowered = lower_encoder(tiny, "fp32", PROFILE, tmp_path)
    quality = encoder_quality(lowered.encoder, open_variant(tmp_path, lowered), TEXTS)
    assert set(quality) == {"mean_cosine", "mean_cosine_stderr", "min_cosine", "sentences"}
    assert quality["sentences"] == len(TEXTS)
    assert quality["min_cosine"] >= 1 - 1e-6 and quality["mean_cosine_stderr"] <= 1e-6


def test_bad_requests_are_refused_before_any_work(tiny, tmp_path):
    """A board without the operators, or with an old opset, and a model without sentences: nothing written."""
    folder = tmp_path / "out"
    runtime = PROFILE.runtime("onnxruntime")
    without = msgspec.structs.replace(runtime, contrib_ops=("BiasGelu",))
    old = msgspec.structs.replace(runtime, export_opset=13)
    for changed, message in ((without, "lacks GatherBlockQuantized, MatMulNBits"), (old, "export_opset 13")):
        profile = msgspec.structs.replace(PROFILE, runtimes=(changed,))
        with pytest.raises(TargetError, match=message):
            lower_encoder(tiny, "int8", profile, folder)
        assert not list(folder.iterdir())
    lowered = lower_encoder(tiny, "int8", PROFILE, folder)
    with pytest.raises(InputError, match="at least one sentence"):
        golden_of(folder, lowered, ())


def real_sentences():
    """Questions, instructions and Chinese; skips where the data is absent."""
    if not DATA.is_dir():
        pytest.skip("needs the questions of ../shared/data")
    names = {"arc_easy.jsonl": "query", "IFEval_prompts.jsonl": "prompt", "cmath_dev.jsonl": "input"}
    return [
        json.loads(line)[field]
        for name, field in names.items()
        for line in (DATA / name).read_text(encoding="utf-8").splitlines()[:16]
    ]


@pytest.mark.real_model
def test_minilm_fp32_agrees_with_transformers(minilm_dir, tmp_path):
    """Real MiniLM on a padded batch differs from transformers by at most 1e-4."""
    lowered = lower_encoder(minilm_dir, "fp32", PROFILE, tmp_path)
    texts = ["Where is the key?", "The train leaves at 9:40 from platform 12, not 3.", "你好，世界", "a"]
    batch = AutoTokenizer.from_pretrained(minilm_dir)(texts, padding=True, return_tensors="pt")
    model = BertModel.from_pretrained(minilm_dir).eval()
    expected = embed_with_transformers(model, batch["input_ids"], batch["attention_mask"])
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    lists = [ids[mask.bool()].tolist() for ids, mask in rows]
    got = torch.from_numpy(open_variant(tmp_path, lowered).embed(lists))
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("recipe", "largest_share", "least_cosine"),
    [("int8", 0.26, 0.998), ("mixed", 0.21, 0.997), ("int4", 0.165, 0.965)],
)
def test_minilm_size_and_quality(minilm_dir, tmp_path, recipe, largest_share, least_cosine):
    """The files' share of the checkpoint's bytes, the mean cosine, and the golden vectors of each graph."""
    lowered = lower_encoder(minilm_dir, recipe, PROFILE, tmp_path)
    checkpoint = lowered.encoder
    file_bytes = sum(file.stat().st_size for file in (tmp_path / "graphs").iterdir())
    assert file_bytes <= largest_share * checkpoint.digest.size_bytes
    golden = golden_of(tmp_path, lowered, GOLDEN_TEXTS)
    for index in range(len(lowered.variants)):
        session = open_variant(tmp_path, lowered, index)
        quality = encoder_quality(checkpoint, session, real_sentences())
        assert quality["mean_cosine"] >= least_cosine
        assert try_encoder(session, golden, time.monotonic).problem == ""
