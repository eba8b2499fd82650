"""`edge-export` as typed: exit statuses, one line for bad input, one JSON object, clean interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_checkpoints import VOCAB, save_checkpoint, write_checkpoint
from support.tiny_models import make_model, write_gguf

from edge_export.cli import main
from edge_export.reference import export_reference
from edge_reasoner.contract.bundle.open import open_bundle

ROOT = Path(__file__).resolve().parents[2]
BOARD = ("--profile", "generic-x86", "--threads", "1")
CONTRACT = {
    "bundle", "profile", "plan", "sizes", "quality", "predicted", "measured", "warnings", "seconds",
}  # fmt: skip
PREDICTED = {"prefill_tps", "decode_tps", "ttft_ms", "peak_rss_mb", "joules_per_token"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tied llama checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder)
    return folder


def run(*arguments) -> int:
    """The command in this process."""
    return main([str(argument) for argument in arguments])


def test_json_is_one_object_with_the_contracts_keys(model, tmp_path, capfd):
    """--json prints one object, exactly the agreed keys, and nothing else on stdout."""
    assert run(model, *BOARD, "--recipe", "int8", "--out", tmp_path / "out", "--json") == 0
    captured = capfd.readouterr()
    report = json.loads(captured.out, parse_constant=pytest.fail)
    assert captured.out.count("\n") == 1 and captured.err == ""
    assert set(report) == CONTRACT and set(report["predicted"]) == PREDICTED
    assert report["bundle"] == str(tmp_path / "out") and report["profile"] == "generic-x86"
    assert {"source_bytes", "bundle_bytes"} <= set(report["sizes"])
    assert report["measured"] is None and report["seconds"] >= 0
    assert {"top1_agreement", "perplexity_ratio"} <= set(report["quality"])
    open_bundle(tmp_path / "out")


def test_the_printed_report_names_sizes_quality_and_bundle(model, tmp_path, capfd):
    """Without --json: a table on stdout that ends with the bundle's path; warnings on stderr."""
    assert run(model, *BOARD, "--recipe", "mixed", "--out", tmp_path / "out") == 0
    captured = capfd.readouterr()
    for word in ("bundle_bytes", "top1_agreement", "predicted decode_tps", "int4-b", "int8-b", "%"):
        assert word in captured.out
    assert str(tmp_path / "out") in captured.out.splitlines()[-1]
    assert captured.err.startswith("warning: the checkpoint names no licence")


def test_dry_run_prints_the_plan_and_writes_nothing(model, tmp_path, capfd, monkeypatch):
    """The plan of every unit and the predicted figures, without --out in the working folder either."""
    monkeypatch.chdir(tmp_path)
    assert run(model, *BOARD, "--dry-run") == 0
    assert capfd.readouterr().out.endswith("dry run: nothing was written\n")
    assert run(model, *BOARD, "--dry-run", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert set(report) == CONTRACT and report["bundle"] is None
    assert [row["unit"] for row in report["plan"]["units"]][-1] == "head"
    assert report["predicted"]["decode_tps"] > 0 and not list(tmp_path.iterdir())


def test_several_profiles_give_several_bundles(model, tmp_path, capfd):
    """Each board gets a bundle under --out; the JSON object lists the reports; no board may come twice."""
    boards = ("--profile", "raspberry-pi-5", "--profile", "jetson-orin", "--threads", "1")
    assert run(model, *boards, "--recipe", "fp32", "--out", tmp_path / "all", "--json") == 0
    reports = json.loads(capfd.readouterr().out)["bundles"]
    assert [set(report) for report in reports] == [CONTRACT, CONTRACT]
    for report, name in zip(reports, ("raspberry-pi-5", "jetson-orin"), strict=True):
        assert report["bundle"] == str(tmp_path / "all" / name)
        assert open_bundle(tmp_path / "all" / name).manifest.profile == name
    assert run(model, *boards, "--profile", "jetson-orin", "--out", tmp_path / "x") == 2
    assert "the same board is named twice" in capfd.readouterr().err and not (tmp_path / "x").exists()


def test_the_default_name_is_model_and_board(model, tmp_path, capfd, monkeypatch):
    """Without --out the bundle appears in the working folder under model and board."""
    monkeypatch.chdir(tmp_path)
    assert run(model, *BOARD, "--recipe", "fp32") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-generic-x86.bundle"]


def _truncated_gguf(folder: Path) -> Path:
    path = write_gguf(make_model("llama"), folder / "m.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def _empty_gguf(folder: Path) -> Path:
    (folder / "m.gguf").write_bytes(b"")
    return folder / "m.gguf"


def _truncated_safetensors(folder: Path) -> Path:
    write_checkpoint(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    return folder


def _unsupported(folder: Path) -> Path:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    return folder


def _no_tokenizer(folder: Path) -> Path:
    make_model("llama").save_pretrained(folder)
    return folder


def _too_few_rows(folder: Path) -> Path:
    save_checkpoint(make_model("llama", vocab_size=64), folder)
    return folder


def _odd_heads(folder: Path) -> Path:
    write_checkpoint(folder, head_dim=24)
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "no-such-model.gguf", "there is no such file or directory"),
        (lambda folder: folder, "neither a config.json nor a .gguf"),
        (_empty_gguf, "m.gguf"),
        (_truncated_gguf, "m.gguf"),
        (_truncated_safetensors, "corrupt or truncated safetensors file"),
        (_unsupported, "'gpt2'"),
        (_no_tokenizer, "has no tokenizer.json"),
        (_too_few_rows, "embeds only 64 tokens"),
        (_odd_heads, "takes multiples of 16"),
    ],
)
def test_models_that_cannot_be_used(make, words, tmp_path, capfd):
    """Missing, empty, truncated, unsupported: one line on stderr that names the matter, status 2."""
    (tmp_path / "m").mkdir()
    path = make(tmp_path / "m")
    capfd.readouterr()
    assert run(path, *BOARD, "--out", tmp_path / "out", "--json") == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("edge-export: ") and words in captured.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_names_do_not_steer_the_terminal(model, tmp_path, capfd):
    """Escape sequences, direction overrides and markup in names arrive as text, in errors and in the plan."""
    evil = tmp_path / "\x1b]0;t\x07 \x9b31m \u202e[red]x[/red] [/] :skull:"
    assert run(evil, *BOARD, "--out", tmp_path / "out") == 2
    refused = capfd.readouterr().err
    shutil.copytree(model, evil)
    assert (
        run(evil, *BOARD, "--out", tmp_path / "out", "--dry-run", "--cache", "off", "--recipe", "fp32") == 0
    )
    planned = capfd.readouterr()
    for text in (refused, planned.out, planned.err):
        assert not set("\x1b\x07\x9b\u202e") & set(text)
    assert "[red]x[/red] [/] :skull:" in refused and refused.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--profile", "raspbery-pi-5"), "raspberry-pi-5"),
        (("--profile", "no/such/board.toml"), "no/such/board.toml"),
        ((*BOARD, "--recipe", "int3"), "'auto', 'fp32'"),
        ((*BOARD, "--format", "pickle"), "'auto', 'onnx'"),
        ((*BOARD, "--context-tokens", "100000"), "allowed: 16 to the model's 256"),
        ((*BOARD, "--out", "/proc/edge-export-test"), "/proc/edge-export-test"),
        ((*BOARD, "--out", "no/such/folder"), "does not exist"),
        ((*BOARD, "--calibration", "missing.txt"), "missing.txt: cannot be read"),
        ((*BOARD, "--calibration", "binary.txt"), "binary.txt: not UTF-8 at byte"),
        ((*BOARD, "--calibration", "empty.txt"), "empty.txt: no text in it"),
        ((*BOARD, "--calibration", "bad.jsonl"), "bad.jsonl, line 2: not JSON"),
        ((*BOARD, "--calibration", "fields.jsonl"), "fields.jsonl, line 1: needs one of the text fields"),
        ((*BOARD, "--calibration", "folder"), "folder: cannot be read"),
        ((*BOARD, "--eval", "empty.txt"), "empty.txt: no text in it"),
        ((*BOARD, "--preprocessor", "missing"), "missing"),
        ((*BOARD, "--task", "encoder"), "the model is a causal LM"),
        ((*BOARD, "--min-quality", "2"), "--min-quality"),
        ((*BOARD, "--no-such-option"), "No such option"),
        ((), "--profile"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, words, model, tmp_path, capfd, monkeypatch):
    """One line on stderr that names the argument and what is allowed, status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\x80\x81words")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "fields.jsonl").write_text('{"label": 3}\n')
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    if "/proc/edge-export-test" in arguments and not Path("/proc").is_dir():
        pytest.skip("needs a /proc that nobody can write to")
    assert run(model, *arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("edge-export: ") and words in captured.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-size", "0.05"), "--max-size 0.05: the weights alone take"),
        (("--min-quality", "0.999"), "--min-quality 0.999: top1_agreement is"),
        (("--max-latency", "0.0001"), "--max-latency 0.0001"),
    ],
)
def test_failed_checks_are_status_3(arguments, words, model, tmp_path, capfd):
    """A limit that does not hold: one line, status 3, nothing written."""
    assert run(model, *BOARD, "--recipe", "int4", "--out", tmp_path / "out", *arguments) == 3
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and words in captured.err and not list(tmp_path.iterdir())


def test_a_taken_destination(model, tmp_path, capfd):
    """A folder that is no bundle is never overwritten."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    assert run(model, *BOARD, "--recipe", "fp32", "--out", tmp_path / "mine") == 2
    assert "exists and is not a bundle" in capfd.readouterr().err
    assert (tmp_path / "mine/notes.txt").read_text() == "x"


def test_the_cache_and_what_was_reused(model, tmp_path, capfd):
    """The second run names on stderr what it reused, and from where; stdout stays one object."""
    for name, said in (("a", ""), ("b", "reused from")):
        where = tmp_path / name
        assert run(model, *BOARD, "--out", where, "--cache", tmp_path / "kept", "--json") == 0
        captured = capfd.readouterr()
        assert set(json.loads(captured.out)) == CONTRACT and captured.err.startswith(said)
    assert f"{tmp_path / 'kept'}: analyse, store, lower, verify, measure\n" in captured.err
    assert open_bundle(tmp_path / "a").manifest == open_bundle(tmp_path / "b").manifest


def test_where_results_are_kept(model, tmp_path, capfd, monkeypatch):
    """By default in the user's cache folder; with `off`, or where no home is known, nowhere."""
    monkeypatch.setenv("EDGE_REASONER_CACHE", str(tmp_path / "user"))
    assert run(model, *BOARD, "--recipe", "int4", "--out", tmp_path / "a", "--cache", "off") == 0
    assert not (tmp_path / "user").exists()
    assert run(model, *BOARD, "--recipe", "int4", "--out", tmp_path / "b") == 0
    assert list((tmp_path / "user/export/entries").iterdir())
    capfd.readouterr()
    assert run(model, *BOARD, "--recipe", "int4", "--out", tmp_path / "c") == 0
    assert "reused from" in capfd.readouterr().err
    (tmp_path / "file").write_text("x")
    assert run(model, *BOARD, "--recipe", "int4", "--out", tmp_path / "d", "--cache", tmp_path / "file") == 0
    assert "reused" not in capfd.readouterr().err and open_bundle(tmp_path / "d")


def test_help_and_version_do_not_load_torch():
    """--help, --version and a wrong board name answer without the weight of torch."""
    script = (
        "import sys; from edge_export.cli import main\n"
        "codes = [main(['--help']), main(['--version']), main(['m', '--profile', 'nothing-like-it'])]\n"
        "print(codes, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "[0, 0, 2] False", done.stderr


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "export")])
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}


#: The command; when a file is opened in the new bundle after its weights are written, it gets the signal.
_INTERRUPTED = """
import os, sys
from pathlib import Path
number, folder = int(sys.argv[1]), Path(sys.argv[2])
seen = []
def watch(event, arguments):
    if event != "open" or seen or ".partial" not in str(arguments[0]):
        return
    if list(folder.glob(".out.*.partial/graphs/reasoner.data")):
        seen.append(arguments[0])
        os.kill(os.getpid(), number)
sys.addaudithook(watch)
from edge_export.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_interrupted_in_the_middle(number, status, model, tmp_path):
    """Ctrl-C, a stop and a closed terminal leave only the earlier bundle, whole; even a kill never half a new
    one."""
    out = tmp_path / "out"
    assert run(model, *BOARD, "--recipe", "fp32", "--out", out) == 0
    first = open_bundle(out).manifest.bundle_id
    command = [sys.executable, "-c", _INTERRUPTED, str(int(number)), str(tmp_path)]
    command += [str(model), *BOARD, "--recipe", "int4", "--out", str(out)]
    process = subprocess.Popen(command, env=_environment(), stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert open_bundle(out).manifest.bundle_id == first
    if number != signal.SIGKILL:
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        assert errors.strip() == f"interrupted{by}; nothing was written"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_reference_export(model, tmp_path):
    """What the reference cloud serves: the model in fp32, all choices kept."""
    assert export_reference(str(model), tmp_path / "out") == tmp_path / "out"
    manifest = open_bundle(tmp_path / "out").manifest
    component = manifest.component("reasoner")
    assert [v.id for v in component.variants] == ["cpu-float32"]
    assert component.quality["top1_agreement"] == 1.0 and component.spec.vocab_size == VOCAB


def test_the_reference_export_uses_what_the_process_may(model, tmp_path):
    """In a process bound to one CPU, torch works with one thread."""
    script = (
        "import os, sys; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from pathlib import Path\n"
        "from edge_export.reference import export_reference\n"
        "export_reference(sys.argv[1], Path(sys.argv[2]))\n"
        "import torch; print(torch.get_num_threads())\n"
    )
    command = [sys.executable, "-c", script, str(model), str(tmp_path / "out")]
    environment = {name: value for name, value in _environment().items() if not name.endswith("_THREADS")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == ["1"]


@pytest.mark.parametrize("out", ["x" * 300, "file/below"])
def test_a_place_that_cannot_be(out, model, tmp_path, capsys):
    """A name too long, a folder below a file: bad input in one line, for one board and for several."""
    (tmp_path / "file").write_text("")
    for boards in (BOARD, (*BOARD, "--profile", "jetson-orin")):
        assert run(model, *boards, "--out", tmp_path / out) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_that_nobody_foresaw(model, tmp_path, capfd, monkeypatch):
    """One line and status 1, as `edge-reasoner` has it; --debug or the variable add the traceback."""

    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("edge_export.pipeline.load_profile", broken)
    monkeypatch.setattr("edge_reasoner.contract.profile.load_profile", broken)
    assert run(model, *BOARD, "--out", tmp_path / "out") == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("edge-export: unexpected RuntimeError: two")
    assert run(model, *BOARD, "--debug", "--out", tmp_path / "out") == 1
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.setenv("EDGE_REASONER_DEBUG", "1")
    assert run(model, *BOARD, "--out", tmp_path / "out") == 1
    assert "Traceback" in capfd.readouterr().err
