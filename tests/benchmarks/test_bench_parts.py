"""The benchmarks' pure parts: scores, standard errors, the choice at matched quality, README tables."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROVENANCE = {
    "command": "python benchmarks/x.py",
    "cpu": "a CPU",
    "cores": 2,
    "date": "2026-01-02T03:04:05",
    "commit": "abc",
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a benchmark script as a module (benchmarks/ is no package)."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield by_name


def _scores(common: ModuleType, choice: list[int], log_prob: list[float], text: list[int]) -> Any:
    return common.Scores(np.array(choice), np.array(log_prob, np.float64), np.array(text))


def test_rows_are_scored_as_torch_does(load: Any) -> None:
    """Log probabilities equal torch's log_softmax, also where logits are large."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(5, 11)) * 200).astype(np.float32)
    following = [0, 3, 10, 7, 7]
    choice, log_prob = load("bench_common").score_rows(logits, following)
    expected = torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), -1)[range(5), following]
    assert choice.tolist() == logits.argmax(-1).tolist()
    assert np.allclose(log_prob, expected.numpy(), atol=1e-4)


def test_a_model_agrees_with_itself(load: Any) -> None:
    """Agreement 1, ratio 1 and no error for the original itself; perplexity is exp of the mean loss."""
    common = load("bench_common")
    scores = _scores(common, [1, 2, 3], [-1.0, -2.0, -3.0], [0, 0, 1])
    found = common.compare(scores, scores)
    assert (found.positions, found.agreement, found.agreement_stderr, found.perplexity_ratio) == (
        3,
        1.0,
        0.0,
        1.0,
    )
    assert math.isclose(found.perplexity, math.exp(2.0))


def test_other_positions_are_refused(load: Any) -> None:
    """Two runs over different texts are never compared."""
    common = load("bench_common")
    with pytest.raises(ValueError, match="same positions"):
        common.compare(_scores(common, [1], [0.0], [0]), _scores(common, [1, 2], [0.0, 0.0], [0, 0]))


def test_clustered_error_is_the_plain_one_for_single_positions(load: Any) -> None:
    """One position a text: the ordinary standard error; whole texts alike: as if a text were one draw."""
    common = load("bench_common")
    values = np.random.default_rng(1).normal(size=200)
    plain = values.std(ddof=1) / math.sqrt(200)
    assert math.isclose(common.clustered_stderr(values, np.arange(200)), plain)
    repeated = common.clustered_stderr(np.repeat(values, 7), np.repeat(np.arange(200), 7))
    assert math.isclose(repeated, plain)


def test_the_paired_error_of_equal_answers_is_nothing(load: Any) -> None:
    """Two contenders with the same answers differ by 0 ± 0 however wrong they are."""
    common = load("bench_common")
    original = _scores(common, [1, 2, 3, 4], [0.0] * 4, [0, 0, 1, 1])
    wrong = _scores(common, [1, 9, 9, 4], [0.0] * 4, [0, 0, 1, 1])
    assert common.agreement_difference(wrong, wrong, original) == (0.0, 0.0)


def _row(name: str, agreement: float, decode_tps: float) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "agreement": agreement, "agreement_stderr": 0.01, "perplexity": 6.6}
    row.update(weight_bytes=10**8, positions=9)
    for key, value in (("prefill_tps", 500.0), ("decode_tps", decode_tps), ("cold_first_token_s", 1.0),
                       ("peak_rss_bytes", 2e8)):  # fmt: skip
        row[key], row[f"{key}_range"] = value, [value, value]
    return row


def _peers_document() -> dict[str, Any]:
    rows = [
        _row("edge_reasoner fast", 0.7, 200.0),
        _row("edge_reasoner good", 0.97, 100.0),
        _row("edge_reasoner fp32", 1.0, 50.0),
        _row("llama.cpp Q4_1", 0.975, 80.0),
    ]
    pairs = [
        {"ours": row["name"], "peer": "llama.cpp Q4_1", "stderr": 0.003,
         "agreement_difference": row["agreement"] - 0.975}
        for row in rows[:3]
    ]  # fmt: skip
    setup = {"model": "m", "prompt_tokens": 512, "new_tokens": 128, "threads": 2, "rounds": 5, "texts": "t",
             "original_perplexity": 6.5}  # fmt: skip
    return {"rows": rows, "pairs": pairs, "setup": setup, "provenance": PROVENANCE}


def test_speed_is_compared_at_matched_quality(load: Any) -> None:
    """The fastest bundle does not count where it is worse; one within two standard errors does."""
    report = load("bench_report")
    [(peer, ours)] = report.matched_pairs(_peers_document())
    assert (peer["name"], ours["name"]) == ("llama.cpp Q4_1", "edge_reasoner good")
    assert "| 1.25 |" in report.matched_table(_peers_document())


def test_a_peer_that_none_matches_is_said(load: Any) -> None:
    """Where no bundle has the peer's quality, the table says so."""
    report = load("bench_report")
    document = _peers_document()
    document["pairs"] = document["pairs"][:1]
    assert "| llama.cpp Q4_1 | none |" in report.matched_table(document)


def test_readme_tables_are_filled_and_checked(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--check fails on an outdated README, filling mends it, and text outside the markers stays."""
    tables = load("tables")
    (tmp_path / "peers.json").write_text(json.dumps(_peers_document()))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:peers -->\nold\n<!-- /table -->\nafter\n")
    arguments = ["tables.py", "--readme", str(readme), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--check"])
    assert tables.main() == 1
    monkeypatch.setattr("sys.argv", arguments)
    assert tables.main() == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "edge_reasoner good" in text
    monkeypatch.setattr("sys.argv", [*arguments, "--check"])
    assert tables.main() == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- table:nothing -->\n<!-- /table -->\n", "allowed: peers"),
        ("<!-- table:peers -->\n<!-- /table -->\n", "is absent"),
        ("<!-- table:peers -->\nno end", "lacks its end"),
    ],
)
def test_bad_markers_are_refused(load: Any, tmp_path: Path, text: str, told: str) -> None:
    """An unknown name, an absent result file and a marker without an end each give one clear line."""
    with pytest.raises(SystemExit, match=told):
        load("tables").fill(text, tmp_path)


def test_the_readme_is_up_to_date(load: Any) -> None:
    """The tables in README.md are what the result files say."""
    tables = load("tables")
    readme = BENCHMARKS.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert tables.fill(text, BENCHMARKS / "results") == text


def test_rope_rows_are_put_in_halves(load: Any) -> None:
    """Undoing llama.cpp's row order inverts the permutation of its converter."""
    pytest.importorskip("numpy")
    rows = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    # as convert_hf_to_gguf does it
    permuted = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert np.array_equal(load("bench_models").half_split_rope(permuted, 2), rows)


def test_paired_difference_of_questions(load: Any) -> None:
    """Questions that both get right say nothing; the error comes from those that changed."""
    found = load("arc_easy").paired([True, True, False, True], [True, False, False, True])
    assert found == {"difference": 0.25, "stderr": 0.25, "changed": 0.25}


def test_paired_ratios_are_taken_round_by_round(load: Any) -> None:
    """A machine that halves its speed between rounds does not change the ratio of the two sides."""
    paired = load("paired")
    slow, fast = dict.fromkeys(paired.FIGURES, 10.0), dict.fromkeys(paired.FIGURES, 20.0)
    found = paired.compared([slow, fast, slow], [slow, fast, slow])
    assert {row["ratio"] for row in found.values()} == {1.0}
    found = paired.compared([slow, fast], [fast, dict.fromkeys(paired.FIGURES, 40.0)])
    assert found["decode_tps"] == {
        "before": 15.0,
        "after": 30.0,
        "ratio": 2.0,
        "ratio_min": 2.0,
        "ratio_max": 2.0,
    }
