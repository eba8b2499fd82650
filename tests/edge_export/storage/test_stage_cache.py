"""The stage cache: what was kept comes back bit for bit, or counts as absent; it stays within its budget."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_export.storage.stage_cache import StageCache, digest


@dataclass(frozen=True)
class Result:
    """A stage's result of every shape that results have."""

    name: str
    parts: Mapping[str, torch.Tensor]
    states: tuple[torch.Tensor, ...]
    losses: Mapping[str, float]
    nothing: torch.Tensor | None = None


def result(seed: int = 0) -> Result:
    """One with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, 5, generator=generator)
    return Result(
        "größe",
        {"a": matrix, "transposed": matrix.T, "none": torch.zeros(0, 4)},
        (torch.arange(7), matrix.half()),
        {"x": float(matrix[0, 0]) / 3, "tiny": 5e-324},
    )


def same(a: Result, b: Result) -> bool:
    """Bit for bit."""
    tensors = [(*value.parts.values(), *value.states) for value in (a, b)]
    return (a.name, list(a.parts), a.losses, a.nothing) == (
        b.name,
        list(b.parts),
        b.losses,
        b.nothing,
    ) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*tensors, strict=True))


class Stage:
    """A stage that counts its runs, and writes a file into the bundle."""

    def __init__(self, root: Path | None, bundle: Path, **options) -> None:
        self.cache, self.bundle, self.runs = StageCache(root, **options), bundle, 0

    def __call__(self, seed: int = 0, inputs: tuple = ()) -> Result:
        self.bundle.mkdir(exist_ok=True)

        def make(notes) -> Result:
            self.runs += 1
            (self.bundle / "graphs").mkdir(exist_ok=True)
            (self.bundle / "graphs/w.data").write_bytes(bytes([seed]) * 5000)
            return result(seed)

        return self.cache.remember(
            "store",
            lambda: (seed, *inputs),
            Result,
            make,
            folder=self.bundle,
            files=lambda made: ("graphs/w.data",),
        )


def entry_files(root: Path) -> list[Path]:
    """Every file of the kept entries."""
    return sorted(path for path in (root / "entries").rglob("*") if path.is_file())


def test_what_was_kept_comes_back(tmp_path):
    """The second run finds value and file; other inputs, another salt and no cache do not."""
    first = Stage(tmp_path / "cache", tmp_path / "a")
    assert same(first(), result()) and first.runs == 1 and first.cache.reused == ()
    again = Stage(tmp_path / "cache", tmp_path / "b")
    assert same(again(), result()) and again.runs == 0 and again.cache.reused == ("store",)
    assert (tmp_path / "b/graphs/w.data").read_bytes() == b"\0" * 5000
    again(1)
    again(0, ("other",))
    assert again.runs == 2
    for other in (Stage(tmp_path / "cache", tmp_path / "c", salt=lambda: 2), Stage(None, tmp_path / "d")):
        other()
        assert other.runs == 1 and other.cache.reused == ()


def test_digests_tell_everything_apart():
    """Tensors by type, shape and every bit; plain values by type; nothing is taken for its neighbour."""
    one = torch.ones(2, 3)
    values = [
        one, one.T.contiguous(), one.double(), one.half(), -one, torch.zeros(2, 3), -torch.zeros(2, 3),
        (one,), [one, one], 1, 1.5, "1", True, None, (), {"a": 1}, {"a": None}, result(), result(1),
        replace(result(), name="x"),
    ]  # fmt: skip
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digest(1, 23) != digest(12, 3) and digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digests == [digest(value) for value in values]
    with pytest.raises(NotImplementedError):
        digest(object())


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A cache with one entry."""
    root = tmp_path_factory.mktemp("kept")
    Stage(root / "cache", root / "bundle")()
    assert [path.name for path in entry_files(root / "cache")] == ["w.data", "value"]
    return root / "cache"


@given(which=st.integers(0, 1), position=st.integers(0, 1 << 20), mask=st.integers(1, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_a_miss(kept, tmp_path, which, position, mask):
    """Whatever byte of an entry changes: the stage runs again, and its result is kept anew."""
    root = tmp_path / "cache"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(kept, root)
    file = entry_files(root)[which]
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= mask
    file.write_bytes(data)
    _remade(root, tmp_path)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "gone", "folder", "link", "fifo", "loop"])
def test_a_damaged_entry_is_a_miss(kept, tmp_path, which, damage):
    """Truncated, gone, a folder, a link or a pipe in its place: the stage runs again, without waiting."""
    root = shutil.copytree(kept, tmp_path / "cache")
    file = entry_files(root)[which]
    data = file.read_bytes()
    file.unlink()
    if damage in ("cut", "empty", "longer"):
        file.write_bytes({"cut": data[:-1], "empty": b"", "longer": data + b"x"}[damage])
    elif damage == "folder":
        file.mkdir()
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "fifo":
        os.mkfifo(file)
    elif damage == "loop":
        file.symlink_to(file)
    if (damage, which) == ("longer", 0):  # what follows the listed bytes was never written and is not read
        stage = Stage(root, tmp_path / "bundle")
        assert same(stage(), result()) and (tmp_path / "bundle/graphs/w.data").stat().st_size == 5000
    else:
        _remade(root, tmp_path)


def _remade(root: Path, tmp_path: Path) -> None:
    stage = Stage(root, tmp_path / "bundle")
    assert same(stage(), result()) and stage.runs == 1
    assert (tmp_path / "bundle/graphs/w.data").read_bytes() == b"\0" * 5000
    again = Stage(root, tmp_path / "again")
    assert same(again(), result()) and again.runs == 0


def test_an_entry_names_no_file_outside_the_bundle(tmp_path):
    """A path that leaves the bundle's folder is not followed when the entry is read."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "outside").write_bytes(b"mine")
    runs = []
    for _ in range(2):
        StageCache(tmp_path / "cache").remember(
            "store",
            tuple,
            Result,
            lambda notes: runs.append(1) or result(),
            folder=tmp_path / "bundle",
            files=lambda made: ("../outside",),
        )
    assert len(runs) == 2 and (tmp_path / "outside").read_bytes() == b"mine"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path, place):
    """The stage runs and its result is right; that nothing was kept is no error."""
    (tmp_path / "file").write_text("x")
    for _ in range(2):
        stage = Stage(tmp_path / place, tmp_path / "bundle")
        assert same(stage(), result()) and stage.runs == 1
    assert (tmp_path / "file").read_text() == "x"


def test_a_failing_stage_keeps_nothing(tmp_path):
    """What raises is raised, and runs again the next time."""

    def make(notes):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            StageCache(tmp_path / "cache").remember("store", tuple, Result, make)
    assert not (tmp_path / "cache/entries").exists()


def test_the_least_recently_used_go_first(tmp_path):
    """Within the budget everything stays; beyond it, what was not used for the longest time goes."""
    root = tmp_path / "cache"
    stage = Stage(root, tmp_path / "bundle")
    stage(0)
    size_bytes = sum(path.stat().st_size for path in entry_files(root))
    for seed in (1, 2):
        stage(seed)
    for age, entry in enumerate(sorted((root / "entries").iterdir())):
        os.utime(entry, ns=(age + 1, age + 1))
    used = Stage(root, tmp_path / "bundle", budget_bytes=10 * size_bytes)
    used(0)  # now the most recently used
    oldest = min((root / "entries").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    small = Stage(root, tmp_path / "bundle", budget_bytes=3 * size_bytes + size_bytes // 2)
    small(3)
    assert not oldest.exists()
    assert len(list((root / "entries").iterdir())) <= 3
    again = Stage(root, tmp_path / "bundle")
    again(0)
    again(3)
    assert again.runs == 0


def test_what_exceeds_the_budget_is_not_kept(tmp_path):
    """One result larger than the whole budget leaves the cache as it was."""
    root = tmp_path / "cache"
    Stage(root, tmp_path / "bundle")(0)
    Stage(root, tmp_path / "bundle", budget_bytes=1000)(1)
    again = Stage(root, tmp_path / "bundle")
    again(0)
    again(1)
    assert again.runs == 1


class InterruptedStageError(Exception):
    """The power went."""


def steps(root: Path, data: Path, until: int) -> list[int]:
    """A stage of five steps that appends a block in each and notes it; raises before step `until`.

    Returns the steps that were done in this run.
    """
    done = []

    def make(notes) -> Result:
        last = notes.resume(data, Result)
        start = 0 if last is None else int(last.name)
        assert last is None or same(last, replace(result(start), name=str(start)))
        with data.open("ab" if last else "wb") as file:
            for step in range(start, 5):
                if step == until:
                    raise InterruptedStageError
                file.write(bytes([step]) * 100_000)
                file.flush()
                done.append(step)
                notes.note(data, replace(result(step + 1), name=str(step + 1)))
        return result()

    StageCache(root).remember("store", tuple, Result, make)
    return done


def test_an_interrupted_stage_goes_on_where_it_was(tmp_path):
    """Each restart does what is left; the data is as if nothing had happened; notes vanish at the end."""
    whole = tmp_path / "whole"
    steps(tmp_path / "other", whole, until=9)
    for until in (1, 1, 3):
        with pytest.raises(InterruptedStageError):
            steps(tmp_path / "cache", tmp_path / f"data{until}", until)
    assert steps(tmp_path / "cache", tmp_path / "data", until=9) == [3, 4]
    assert (tmp_path / "data").read_bytes() == whole.read_bytes()
    assert not list((tmp_path / "cache/notes").iterdir())


@pytest.mark.parametrize("name", ["value", "data"])
@pytest.mark.parametrize("where", [0, 100, 150_000, -1])
def test_damaged_notes_are_not_resumed_from(tmp_path, name, where):
    """A changed byte in what an interrupted stage left: it starts from the beginning."""
    with pytest.raises(InterruptedStageError):
        steps(tmp_path / "cache", tmp_path / "a", until=3)
    (file,) = (tmp_path / "cache/notes").glob(f"*/{name}")
    data = bytearray(file.read_bytes())
    data[where % len(data)] ^= 1
    file.write_bytes(data)
    assert steps(tmp_path / "cache", tmp_path / "b", until=9) == [0, 1, 2, 3, 4]
    assert (tmp_path / "b").stat().st_size == 500_000


def test_a_note_cut_short_by_a_crash_is_the_one_before(tmp_path):
    """Data of a step whose value was never written does no harm: the step is done again."""
    with pytest.raises(InterruptedStageError):
        steps(tmp_path / "cache", tmp_path / "a", until=2)
    (file,) = (tmp_path / "cache/notes").glob("*/data")
    with file.open("ab") as stream:
        stream.write(b"half of the next step")
    assert steps(tmp_path / "cache", tmp_path / "b", until=9) == [2, 3, 4]
    assert (tmp_path / "b").read_bytes() == b"".join(bytes([step]) * 100_000 for step in range(5))
