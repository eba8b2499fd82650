"""Whole exports of tiny checkpoints: bundles open, activate and reproduce; all is written or nothing."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.tiny_berts import make_bert
from support.tiny_checkpoints import TEMPLATE, VOCAB, save_checkpoint, tokenizer, write_checkpoint
from support.tiny_models import logits_of, make_model, write_gguf

from edge_export.options import MAX_THREADS, ExportOptions
from edge_export.pipeline import export
from edge_reasoner.activation.activate import activate
from edge_reasoner.backends.golden import try_decoder
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.manifest import MAX_GOLDEN_BYTES, parse_golden
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.contract.profile import load_profile
from edge_reasoner.errors import CheckFailedError, InputError, TargetError
from edge_reasoner.machine.allowance import allowance

BOARD = "generic-x86"


def options(**chosen) -> ExportOptions:
    """One thread, and what a test chooses."""
    return ExportOptions(**{"threads": 1, **chosen})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tied llama checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_checkpoint(folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def golden_of(bundle, kind: str = "reasoner"):
    """Parsed golden vectors."""
    path = bundle.component(kind).golden
    return parse_golden(bundle.read_bytes(path, MAX_GOLDEN_BYTES), path)


@pytest.mark.parametrize(
    ("case", "recipe", "board"),
    [
        ("llama", "auto", "raspberry-pi-5"),
        ("llama-untied-mha", "int4", "raspberry-pi-4b"),
        ("mistral-window", "mixed", "generic-arm64"),
        ("qwen2", "auto", "jetson-orin"),
        ("qwen3", "int8", "rk3588"),
        ("gemma3", "auto", BOARD),
        ("gemma3-softcap", "fp16", BOARD),
        ("llama3-rope", "fp16", "jetson-orin"),
        ("qwen2-untied", "fp32", BOARD),
    ],
)
def test_bundles_open_activate_and_reproduce(case, recipe, board, tmp_path):
    """Each family: the device opens the bundle, its self-test accepts a variant, every variant reproduces."""
    write_checkpoint(tmp_path / "model", case)
    report = export(str(tmp_path / "model"), board, tmp_path / "out", options(recipe=recipe))
    bundle = open_bundle(tmp_path / "out")
    component = bundle.component("reasoner")
    golden = golden_of(bundle)
    lengths = [len(vector.token_ids) for vector in golden.decoder]
    assert lengths[0] == 7 and max(lengths) >= 160
    assert component.variants[-1].reference
    names = {variant.id for variant in component.variants}
    assert names == ({"cpu-float32"} if recipe in ("fp32", "fp16") else {"cpu-float32", "cpu-int8-dot"})
    for variant in component.variants:
        model = OrtDecoder(bundle.path_of(variant.graph), component.spec, threads=1)
        trial = try_decoder(model, golden, time.monotonic)
        assert trial.problem == ""
        assert not variant.reference or trial.error <= (
            2e-2 if component.spec.kv_dtype == "float16" else 2e-3
        )
        model.close()
    active = activate(bundle, "reasoner", threads=1, cache_dir=tmp_path / "cache")
    assert active.activation.reports[0].passed
    active.model.close()
    assert report.quality == dict(component.quality) and report.bundle == tmp_path / "out"
    assert component.plan == json.loads(json.dumps(report.plan))
    assert component.spec.bos_token_id is None and component.spec.eos_token_ids[0] == 1
    template = bundle.read_bytes("tokenizer/reasoner/chat_template.jinja", 10_000)
    assert template.decode() == TEMPLATE


def test_fp32_golden_vectors_are_transformers_logits(tmp_path):
    """What the device is compared with are transformers' logits of the original weights."""
    model = write_checkpoint(tmp_path / "model", "qwen3")
    export(str(tmp_path / "model"), BOARD, tmp_path / "out", options(recipe="fp32"))
    for vector in golden_of(open_bundle(tmp_path / "out")).decoder:
        logits = logits_of(model, torch.tensor([vector.token_ids]))[0].numpy()
        for check in vector.checks:
            row = logits[check.position]
            assert check.argmax == row.argmax()
            np.testing.assert_allclose(
                row[list(check.token_ids)], check.logits, atol=2e-4 * np.abs(row).max()
            )


def test_quality_is_what_transformers_says(tmp_path):
    """Perplexity of the original on the given text equals transformers'; fp32 agrees everywhere."""
    model = write_checkpoint(tmp_path / "model", "llama")
    text = tmp_path / "held-out.txt"
    documents = ["the quick brown fox rests over the lazy dog", "def f(x): return x * 2, größe"]
    text.write_text("\n-----\n".join(documents), encoding="utf-8")
    report = export(
        str(tmp_path / "model"), BOARD, tmp_path / "out", options(recipe="fp32", quality_text=text)
    )
    log_probs = []
    for document in documents:
        ids = torch.tensor([tokenizer().encode(document, add_special_tokens=False).ids])
        table = logits_of(model, ids)[0].log_softmax(-1)
        log_probs.append(table[:-1].gather(1, ids[0, 1:, None])[:, 0])
    expected = float((-torch.cat(log_probs).mean()).exp())
    assert report.quality["original_perplexity"] == pytest.approx(expected, rel=1e-3)
    assert report.quality["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert report.quality["top1_agreement"] == 1.0
    assert report.quality["positions"] == len(torch.cat(log_probs)) + len(documents)


@pytest.mark.parametrize("recipe", ["auto", "fp32"])
def test_same_input_same_bytes(model, recipe, tmp_path):
    """Two exports of one checkpoint are the same in every file."""
    for name in ("a", "b"):
        export(str(model), "jetson-orin", tmp_path / name, options(recipe=recipe))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_fast_and_reference_graph_share_one_data_file(model, tmp_path):
    """A quantized bundle holds two small graphs and one file of weights, which the sizes account for."""
    report = export(str(model), BOARD, tmp_path / "out", options(recipe="int8"))
    graphs = {path.name: path.stat().st_size for path in (tmp_path / "out/graphs").iterdir()}
    assert set(graphs) == {"reasoner.onnx", "reasoner.reference.onnx", "reasoner.data"}
    assert report.sizes["source_bytes"] == (model / "model.safetensors").stat().st_size
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert report.sizes["bundle_bytes"] == sum(path.stat().st_size for path in files)
    assert report.plan["weight_bytes"] < graphs["reasoner.data"]


def test_a_gguf_without_a_tokenizer(tmp_path):
    """Weights alone do not make a bundle: refused in one line, nothing written."""
    path = write_gguf(make_model("llama"), tmp_path / "m.gguf")
    with pytest.raises(InputError, match="tokenizer") as caught:
        export(str(path), BOARD, tmp_path / "out", options(recipe="fp32"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_preprocessor_beside_the_model(model, tmp_path):
    """--preprocessor puts a verified encoder into the same bundle."""
    (tmp_path / "bert").mkdir()
    make_bert(tmp_path / "bert", "even")
    report = export(
        str(model), BOARD, tmp_path / "out", options(recipe="int8", preprocessor=str(tmp_path / "bert"))
    )
    bundle = open_bundle(tmp_path / "out")
    assert {"reasoner_bytes", "preprocessor_bytes"} <= set(report.sizes)
    active = activate(bundle, "preprocessor", threads=1, cache_dir=tmp_path / "cache")
    assert active.encoder.embed([[2, 5, 3]]).shape == (1, 64)
    active.model.close()
    assert bundle.component("preprocessor").quality["mean_cosine"] > 0.98


def test_an_encoder_alone(tmp_path):
    """An encoder is told apart by its configuration and exported alone; tasks that do not fit are refused."""
    (tmp_path / "bert").mkdir()
    make_bert(tmp_path / "bert", "even")
    report = export(str(tmp_path / "bert"), BOARD, tmp_path / "out", options())
    assert [c.kind for c in open_bundle(tmp_path / "out").manifest.components] == ["preprocessor"]
    assert report.predicted["decode_tps"] is None and report.quality["mean_cosine"] > 0.98
    for chosen in ({"task": "causal-lm"}, {"preprocessor": str(tmp_path / "bert")}):
        with pytest.raises(InputError, match=r"an encoder"):
            export(str(tmp_path / "bert"), BOARD, tmp_path / "x", options(**chosen))
    planned = export(str(tmp_path / "bert"), BOARD, tmp_path / "x", options(dry_run=True))
    assert planned.bundle is None and planned.plan["matrices"] and not (tmp_path / "x").exists()


STAGES = [
    "reading calibration text",
    "storing the vocabulary",
    "quantizing and storing layers",
    "verifying on the device backend",
    "measuring quality",
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt, ".*"),
        (OSError(28, "No space left on device"), "cannot write the bundle: No space"),
    ],
)
def test_a_failure_in_any_stage_leaves_things_as_they_were(model, stage, error, said, tmp_path):
    """Whatever breaks, and wherever: no partial folder, and an earlier bundle is untouched."""
    out = tmp_path / "out"
    seen = []

    def breaking(what: str, done: int, total: int) -> None:
        seen.append(what)
        if what == stage:
            raise error

    with pytest.raises((KeyboardInterrupt, InputError), match=said):
        export(str(model), BOARD, out, options(recipe="int4"), breaking)
    assert seen and not list(tmp_path.iterdir())
    export(str(model), BOARD, out, options(recipe="fp32"))
    before = hashes(tmp_path)
    with pytest.raises((KeyboardInterrupt, InputError), match=said):
        export(str(model), BOARD, out, options(recipe="int4"), breaking)
    assert hashes(tmp_path) == before and open_bundle(out)


def test_an_earlier_bundle_is_replaced_and_nothing_else(model, tmp_path):
    """A bundle gives way to a new one, through a link too; other folders and files are refused."""
    out = tmp_path / "out"
    export(str(model), BOARD, out, options(recipe="fp32"))
    first = open_bundle(out).manifest.bundle_id
    (tmp_path / "link").symlink_to(out)
    export(str(model), BOARD, tmp_path / "link", options(recipe="fp32", version=2))
    assert (tmp_path / "link").is_symlink() and open_bundle(out).manifest.bundle_id != first
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}
    (tmp_path / "empty").mkdir()
    export(str(model), BOARD, tmp_path / "empty", options(recipe="fp32"))
    assert open_bundle(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for taken in ("mine", "file"):
        with pytest.raises(InputError, match="exists and is not a bundle"):
            export(str(model), BOARD, tmp_path / taken, options(recipe="fp32"))
    with pytest.raises(InputError, match="does not exist"):
        export(str(model), BOARD, tmp_path / "no/where", options(recipe="fp32"))
    assert (tmp_path / "mine/thesis.txt").read_text() == (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ({"max_size_mb": 0.1}, CheckFailedError, r"max_size_mb=0\.1: the bundle takes 0\.\d MB"),
        ({"min_quality": 0.9, "recipe": "int4"}, CheckFailedError, r"min_quality=0\.9: top1_agreement is"),
        ({"max_latency_ms": 1e-3}, TargetError, r"max_latency_ms=0\.001: .* ms a token are predicted"),
    ],
)
def test_limits_are_checked_before_anything_is_written(model, chosen, error, message, tmp_path):
    """A bundle over a limit is not written, and the limit, the figure and the parameter are named."""
    with pytest.raises(error, match=message) as caught:
        export(str(model), BOARD, tmp_path / "out", options(**{"recipe": "int8", **chosen}))
    assert caught.value.exit_status == 3 and not list(tmp_path.iterdir())


def test_a_failure_names_the_stages_that_ran(model, tmp_path):
    """One line: what is wrong, and how far the export got; nothing where it got nowhere."""
    chosen = {"recipe": "int8", "max_latency_ms": 1e-3}
    with pytest.raises(TargetError) as caught:
        export(str(model), BOARD, tmp_path / "out", options(**chosen))
    assert str(caught.value).endswith("on this board (after find, load, check, analyse)")
    with pytest.raises(InputError) as caught:
        export(str(tmp_path / "none"), BOARD, tmp_path / "out", options())
    assert "(after" not in str(caught.value)


def test_a_bad_preprocessor_is_found_before_the_model_is_worked_on(model, tmp_path):
    """Components go through each stage together: the second one's fault costs no work on the first."""
    (tmp_path / "bert").mkdir()
    make_bert(tmp_path / "bert", "even")
    (tmp_path / "bert/model.safetensors").write_bytes(b"short")
    seen = []
    with pytest.raises(InputError, match="bert"):
        export(
            str(model),
            BOARD,
            tmp_path / "out",
            options(preprocessor=str(tmp_path / "bert")),
            lambda what, done, total: seen.append(what),
        )
    assert seen == ["find", "load"]


def test_each_component_says_where_it_comes_from(model, tmp_path):
    """Source, licence, plan, prediction and quality are the component's own; the report is the bundle's."""
    (tmp_path / "bert").mkdir()
    make_bert(tmp_path / "bert", "even")
    (tmp_path / "bert/README.md").write_text("---\nlicense: mit\n---\n")
    report = export(
        str(model),
        BOARD,
        tmp_path / "out",
        options(recipe="int8", preprocessor=str(tmp_path / "bert"), licence="apache-2.0"),
    )
    manifest = open_bundle(tmp_path / "out").manifest
    reasoner, preprocessor = manifest.components
    assert (reasoner.name, preprocessor.name) == ("tiny-llama", "bert") and manifest.model == "tiny-llama"
    assert (reasoner.licence, preprocessor.licence) == ("apache-2.0", "mit") and report.warnings == ()
    for component, folder in ((reasoner, model), (preprocessor, tmp_path / "bert")):
        weights = (folder / "model.safetensors").read_bytes()
        assert component.source.sha256 == hashlib.sha256(weights).hexdigest()
        assert component.tools["torch"] == torch.__version__ and component.plan["profile"] == BOARD
        assert component.predicted.peak_rss_mb > 0
    assert reasoner.predicted.decode_tps > 0 and preprocessor.predicted.decode_tps is None
    assert set(preprocessor.quality) > {"mean_cosine"} and set(reasoner.quality) > {"top1_agreement"}
    assert [entry.path for entry in manifest.files] == ["report.html"]


@pytest.mark.parametrize(
    ("capacity_gib", "chosen", "message"),
    [
        (0.01, {}, "too large for"),
        (8.0, {"max_latency_ms": 1e-6}, r"max_latency_ms=1e-06: .* ms a text are predicted on this board"),
        (8.0, {"min_quality": 1.0, "recipe": "int4"}, r"min_quality=1: mean_cosine is 0\."),
    ],
)
def test_encoders_obey_board_and_limits(capacity_gib, chosen, message, tmp_path):
    """Memory, latency and quality are limits for an encoder as for a decoder."""
    (tmp_path / "bert").mkdir()
    make_bert(tmp_path / "bert", "even")
    profile = load_profile(BOARD)
    capacity = msgspec.structs.replace(profile.memory.capacity_gib, value=capacity_gib)
    memory = msgspec.structs.replace(profile.memory, capacity_gib=capacity)
    profile = msgspec.structs.replace(profile, memory=memory)
    with pytest.raises(CheckFailedError, match=message):
        export(str(tmp_path / "bert"), profile, tmp_path / "out", options(**chosen))
    assert not (tmp_path / "out").exists()


def test_too_large_a_model_is_refused_before_its_weights_are_read(tmp_path):
    """A cache that no Zero 2 W holds: refused by figures alone, though the weights are not even numbers."""
    model = make_model("llama", vocab_size=VOCAB, max_position_embeddings=4_000_000, pad_token_id=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    save_checkpoint(model, tmp_path / "model")
    for recipe in ("auto", "int4", "int8"):
        with pytest.raises(TargetError, match=r"too large for 'raspberry-pi-zero-2w': about 2.* MB at run"):
            export(
                str(tmp_path / "model"),
                "raspberry-pi-zero-2w",
                tmp_path / "out",
                options(recipe=recipe, context_tokens=4_000_000),
            )
    with pytest.raises(InputError, match="contains NaN or infinity"):
        export(str(tmp_path / "model"), "raspberry-pi-zero-2w", tmp_path / "out", options())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_short_context_of_the_board(model, tmp_path):
    """A board planned for a few tokens: quality text and golden vectors are cut to fit."""
    board = load_profile(BOARD)
    short = msgspec.structs.replace(board, export=msgspec.structs.replace(board.export, context_tokens=48))
    export(str(model), short, tmp_path / "out", options(recipe="int8"))
    bundle = open_bundle(tmp_path / "out")
    assert bundle.component("reasoner").spec.context_tokens == 48
    assert max(len(vector.token_ids) for vector in golden_of(bundle).decoder) == 48


def test_a_model_sure_of_nonsense(tmp_path):
    """Perplexities beyond what a double holds stay numbers, in the report and in the manifest."""
    model = make_model("llama", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e4)
    save_checkpoint(model, tmp_path / "model")
    report = export(str(tmp_path / "model"), BOARD, tmp_path / "out", options(recipe="fp32"))
    assert np.isfinite(list(report.quality.values())).all() and report.quality["perplexity"] > 1e300
    assert open_bundle(tmp_path / "out")


def test_dry_run_reads_the_plan_that_the_export_follows(model, tmp_path):
    """--dry-run writes nothing, and its plan is the one in the bundle that follows."""
    planned = export(str(model), BOARD, tmp_path / "out", options(dry_run=True))
    assert planned.bundle is None and planned.quality == {} and not list(tmp_path.iterdir())
    done = export(str(model), BOARD, tmp_path / "out", options())
    assert done.plan == planned.plan and done.predicted == planned.predicted


def test_calibration_decides_the_plan_and_is_recorded(model, tmp_path):
    """A user's text is what `auto` looks at; its digest is in plan and manifest."""
    text = tmp_path / "mine.jsonl"
    rows = [{"question": "the fox rests", "answer": "over the dog"}, "größe Straße über naïve café"]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    export(str(model), BOARD, tmp_path / "out", options(calibration=text))
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    component = open_bundle(tmp_path / "out").component("reasoner")
    assert component.source.calibration_sha256 == component.plan["calibration_sha256"] == digest
    default = export(str(model), BOARD, tmp_path / "x", options(dry_run=True))
    assert default.plan["calibration_sha256"] != digest


def test_licence_and_its_absence(model, tmp_path):
    """A licence that nobody names is a warning and 'unknown'; a given one is recorded."""
    report = export(str(model), BOARD, tmp_path / "a", options(recipe="fp32"))
    assert any("licence" in warning for warning in report.warnings)
    assert open_bundle(tmp_path / "a").component("reasoner").licence == "unknown"
    report = export(str(model), BOARD, tmp_path / "b", options(recipe="fp32", licence="apache-2.0"))
    assert report.warnings == () and open_bundle(tmp_path / "b").component("reasoner").licence == "apache-2.0"


def test_a_model_that_names_no_end_is_a_warning(model, tmp_path):
    """Without an end-of-text token anywhere, answers run on to their bound: the report says so."""
    folder = tmp_path / "endless"
    write_checkpoint(folder, eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text("{}")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("</s>", "<e>").replace("<|im_end|>", "<|x|>"))
    endless, ending = (
        export(str(path), BOARD, tmp_path / "x", options(recipe="fp32", dry_run=True)).warnings
        for path in (folder, model)
    )
    assert any("names no token that ends a text" in warning for warning in endless)
    assert not any("names no token that ends a text" in warning for warning in ending)


def test_threads_are_what_this_process_may_use(tmp_path):
    """Without a choice torch computes with the allowance's threads, and afterwards with the caller's."""
    write_checkpoint(tmp_path / "tiny")
    before = torch.get_num_threads()
    seen = set()
    torch.set_num_threads(allowance().threads + 3)
    try:
        export(
            str(tmp_path / "tiny"),
            BOARD,
            tmp_path / "out",
            ExportOptions(dry_run=True),
            lambda *_: seen.add(torch.get_num_threads()),
        )
        assert torch.get_num_threads() == allowance().threads + 3
    finally:
        torch.set_num_threads(before)
    assert seen == {allowance(most_threads=MAX_THREADS).threads}


@pytest.mark.parametrize("name", ["profile", "model", "out", "cache"])
def test_arguments_of_another_type(name, tmp_path):
    """Each is named in one line, before any work."""
    given = {"model": str(tmp_path), "profile": "generic-x86", "out": tmp_path / "out", name: 5}
    with pytest.raises(InputError, match=f"{name}=5"):
        export(**given)


def test_a_size_that_cannot_be_is_refused_before_work(model, tmp_path):
    """The smallest weights are known once the configuration is: nothing is analysed, stored or written."""
    seen = []
    with pytest.raises(CheckFailedError, match=r"max_size_mb=0\.001: the weights alone take 0\.\d MB"):
        export(
            str(model),
            BOARD,
            tmp_path / "out",
            options(max_size_mb=0.001, dry_run=True),
            lambda what, *_: seen.append(what),
        )
    assert seen[-1] == "check" and not list(tmp_path.iterdir())


def test_weights_beyond_float16_are_said_to_be_damaged(tmp_path):
    """A head 10^18 times too large exports, and the report warns; the same model as it was gives no warning
    although it is at chance."""
    folder = tmp_path / "tiny"
    made = write_checkpoint(folder, tie_word_embeddings=False)
    assert not _of_quality(export(str(folder), BOARD, tmp_path / "fine", options(recipe="int8")).warnings)
    with torch.no_grad():
        made.lm_head.weight.mul_(1e18)
    save_checkpoint(made, folder)
    found = export(str(folder), BOARD, tmp_path / "broken", options(recipe="fp32"))
    assert len(_of_quality(found.warnings)) == 1, found.quality
    assert "far worse than chance (416)" in (tmp_path / "broken/report.html").read_text()


def _of_quality(warnings):
    return [text for text in warnings if "perplexity" in text]
