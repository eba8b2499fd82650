"""Exports that end in the middle and are started again: same bytes, and nothing finished is done again."""

from __future__ import annotations

import hashlib
import shutil
import signal
from pathlib import Path

import pytest
from support.killed_export import killed
from support.tiny_berts import make_bert
from support.tiny_checkpoints import write_checkpoint

from edge_export.options import ExportOptions
from edge_export.pipeline import STAGES, export
from edge_export.progress import silent
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import InputError

BOARD = "generic-x86"
LAYERS = 5
#: what is reported within a stage -> the stage whose kept result makes it needless
WORK = {
    "reading calibration text": "analyse",
    "measuring the layers' sensitivity": "analyse",
    "storing the vocabulary": "store",
    "quantizing and storing layers": "store",
    "quantizing the encoder": "store",
    "verifying on the device backend": "verify",
    "measuring quality": "measure",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tied llama checkpoint of a few layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder, num_hidden_layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A sentence encoder."""
    folder = tmp_path_factory.mktemp("bert")
    make_bert(folder, "even")
    return folder


def options(bert: Path | None = None, **chosen) -> ExportOptions:
    """One thread; the encoder beside the model."""
    return ExportOptions(threads=1, preprocessor=None if bert is None else str(bert), **chosen)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Heard:
    """A progress hook that remembers what was reported."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, int]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.reports.append((what, done))

    @property
    def work(self) -> set[str]:
        """The stages that did work."""
        return {WORK[what] for what, _ in self.reports if what in WORK}


@pytest.fixture(scope="module")
def undisturbed(model, bert, tmp_path_factory) -> dict[str, str]:
    """The bundle that nothing interrupted, made without a cache."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    export(str(model), BOARD, out, options(bert))
    return hashes(out)


#: (what is reported when the power goes, for which time) -> the stages that must not work again
POINTS = {
    **{(stage, 1): STAGES[:number] for number, stage in enumerate(STAGES)},
    ("measuring the layers' sensitivity", 2): STAGES[:3],
    ("quantizing and storing layers", 3): STAGES[:5],
    ("quantizing the encoder", 4): STAGES[:5],
    ("verifying on the device backend", 2): STAGES[:7],
    ("measuring quality", 1): STAGES[:8],
}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0]}-{point[1]}")
def test_killed_anywhere_and_started_again(model, bert, undisturbed, point, tmp_path):
    """SIGKILL at that point; the next run gives the undisturbed bytes and works in no finished stage."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    status, seen = killed(str(model), str(out), str(cache), options(bert), *point, str(tmp_path / "log"))
    assert status == -signal.SIGKILL and seen[-1] == point[0] and not out.exists()
    heard = Heard()
    report = export(str(model), BOARD, out, options(bert), heard, cache=cache)
    assert hashes(out) == undisturbed and open_bundle(out)
    finished = POINTS[point]
    assert not heard.work & set(finished)
    assert [stage for stage in report.reused if stage in finished] == [
        stage for stage in ("analyse", "store", "lower", "verify", "measure") if stage in finished
    ]


def test_a_layer_is_quantized_once(model, undisturbed, bert, tmp_path):
    """Killed while the fourth layer is quantized: the next run begins with that layer, not with the first."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    point = ("quantizing and storing layers", 4)
    assert killed(str(model), str(tmp_path / "a"), str(cache), options(bert), *point, str(log))[0] < 0
    heard = Heard()
    export(str(model), BOARD, tmp_path / "out", options(bert), heard, cache=cache)
    layers = [done for what, done in heard.reports if what == point[0]]
    assert layers == list(range(3, LAYERS)) and hashes(tmp_path / "out") == undisturbed


def test_the_same_export_again_does_nothing_again(model, bert, undisturbed, tmp_path):
    """All kept stages are reused and named; the bundle is the same."""
    for name, reused in (("a", ()), ("b", ("analyse", "store", "lower", "verify", "measure"))):
        heard = Heard()
        report = export(str(model), BOARD, tmp_path / name, options(bert), heard, cache=tmp_path / "cache")
        assert report.reused == reused and bool(heard.work) == (not reused)
        assert hashes(tmp_path / name) == undisturbed


@pytest.mark.parametrize(
    ("chosen", "reused"),
    [
        ({"licence": "mit", "version": 3}, {"analyse", "store", "lower", "verify", "measure"}),
        ({"quantizer": "searched"}, {"analyse"}),
        ({"recipe": "int8"}, set()),
        ({"recipe": "fp32"}, set()),
        ({"context_tokens": 64}, {"analyse"}),
    ],
)
def test_only_what_an_option_changes_is_made_again(model, chosen, reused, tmp_path):
    """Another option reuses the stages that do not depend on it, and the bundle is as if made afresh."""
    export(str(model), BOARD, tmp_path / "first", options(), cache=tmp_path / "cache")
    report = export(str(model), BOARD, tmp_path / "out", options(**chosen), cache=tmp_path / "cache")
    assert set(report.reused) == reused
    export(str(model), BOARD, tmp_path / "fresh", options(**chosen))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_other_weights_reuse_nothing(model, tmp_path):
    """One changed byte in the checkpoint: another model."""
    export(str(model), BOARD, tmp_path / "a", options(), cache=tmp_path / "cache")
    other = shutil.copytree(model, tmp_path / "model")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert export(str(other), BOARD, tmp_path / "b", options(), cache=tmp_path / "cache").reused == ()


def test_boards_share_what_does_not_depend_on_them(model, tmp_path):
    """A second board with the same 4-bit format finds the analysis of the first."""
    export(str(model), "raspberry-pi-5", tmp_path / "a", options(), cache=tmp_path / "cache")
    report = export(str(model), "raspberry-pi-4b", tmp_path / "b", options(), cache=tmp_path / "cache")
    assert "analyse" in report.reused and "lower" not in report.reused
    export(str(model), "raspberry-pi-4b", tmp_path / "c", options())
    assert hashes(tmp_path / "b") == hashes(tmp_path / "c")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_export_resumes_too(model, interruption, tmp_path):
    """Ctrl-C or a full disk while storing keeps the layers that were done."""

    def breaking(what: str, done: int, total: int) -> None:
        if (what, done) == ("quantizing and storing layers", 2):
            raise interruption

    with pytest.raises((KeyboardInterrupt, InputError)):
        export(str(model), BOARD, tmp_path / "out", options(), breaking, cache=tmp_path / "cache")
    heard = Heard()
    export(str(model), BOARD, tmp_path / "out", options(), heard, cache=tmp_path / "cache")
    assert next(done for what, done in heard.reports if what == "quantizing and storing layers") == 2


def test_a_dry_run_quantizes_nothing_and_keeps_the_analysis(model, bert, tmp_path):
    """It ends after `plan` for both kinds, writes nothing, and the export that follows uses its analysis."""
    for name, kind in ((model, "decoder"), (bert, "encoder")):
        heard = Heard()
        planned = export(
            str(name), BOARD, tmp_path / "out", options(dry_run=True), heard, cache=tmp_path / "cache"
        )
        stages = [what for what, _ in heard.reports if what in STAGES]
        assert stages == list(STAGES[: STAGES.index("plan") + 1]), kind
        assert heard.work <= {"analyse"} and planned.bundle is None and not (tmp_path / "out").exists()
        done = export(str(name), BOARD, tmp_path / kind, options(), silent, cache=tmp_path / "cache")
        assert done.plan == planned.plan and done.predicted == planned.predicted
        assert "analyse" in done.reused
