"""Options of an export: each is checked when they are made, and named by the command as its flag."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_export.cli import command, main
from edge_export.options import CHECKS, ExportOptions
from edge_export.plan.recipes import RECIPES
from edge_export.quantize import QUANTIZERS
from edge_reasoner.errors import InputError

NAMES = [field.name for field in fields(ExportOptions)]
#: of every option: values that are refused, and what the error says is allowed
REFUSED = {
    "recipe": (("int3", "", "INT8", 8, True, b"int8"), ", ".join(RECIPES)),
    "task": (("decoder", 1, ()), "auto, causal-lm, encoder"),
    "quantizer": (("awq", 4, False, []), ", ".join(QUANTIZERS)),
    "context_tokens": (
        (0, 15, -1, True, 64.0, "64", math.nan, 1 << 60, 10**5000),
        "whole numbers from 16 to",
    ),
    "calibration": (("no/such/file.txt", Path("no/such"), Path("a\nb\x1b"), 3, True, Path()), "text file"),
    "quality_text": (("no/such/file.txt", "a\0b", "x" * 5000, [], b"x"), "text file"),
    "preprocessor": (("", " ", 3, True), "a path or a hub id"),
    "preprocessor_recipe": (("int2", None, 1), ", ".join(RECIPES)),
    "max_size_mb": ((0, -1.5, math.nan, math.inf, True, "5"), "numbers above 0"),
    "max_latency_ms": ((0.0, -math.inf, math.nan, False, "1"), "numbers above 0"),
    "min_quality": ((-0.1, 1.0001, 95, math.nan, math.inf, True, "0.9"), "numbers from 0 to 1"),
    "licence": (("", "  ", "a\nb", "x" * 201, 5, True), "one line of 1 to 200 characters"),
    "version": ((0, -3, 1.0, True, "1", None, 1 << 40), "whole numbers from 1 to"),
    "threads": ((0, 1025, 2.0, True, None, "2"), "whole numbers from 1 to 1024"),
    "dry_run": ((1, 0, None, "yes"), "True, False"),
}


def test_every_option_is_checked():
    """The table of checks, and the one of this test, have a row for each field; the defaults pass."""
    assert set(CHECKS) == set(NAMES) == set(REFUSED)
    ExportOptions()


@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_refused(name):
    """One line that begins with field and value and names what is allowed."""
    values, allowed = REFUSED[name]
    for value in values:
        with pytest.raises(InputError) as caught:
            ExportOptions(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"{name}=") and allowed in message and "\n" not in message
        assert "--" not in message and caught.value.exit_status == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_command_speaks_of_its_flags(name, tmp_path, capfd, monkeypatch):
    """What the library says of a field, the command says of the flag that sets it."""
    flags = {parameter.name: parameter.opts[0] for parameter in command.params}
    value = REFUSED[name][0][0]

    def refuse(*_: object, **__: object) -> None:
        raise InputError(f"{name}={value!r}: allowed: nothing")

    monkeypatch.setattr("edge_export.pipeline.export", refuse)
    assert main(["m", "--profile", "generic-x86", "--threads", "1", "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err == f"edge-export: {flags[name]} {value!r}: allowed: nothing\n"


@given(st.sampled_from(NAMES), st.from_type(object).filter(lambda value: value is not None))
def test_nothing_but_input_errors(name, value):
    """Whatever is given for an option is taken or refused in one line."""
    try:
        ExportOptions(**{name: value})
    except InputError as error:
        assert str(error).startswith(f"{name}=") and "\n" not in str(error)


def test_paths_may_be_text(tmp_path):
    """A path given as text becomes one."""
    (tmp_path / "t.txt").write_text("words")
    assert ExportOptions(calibration=str(tmp_path / "t.txt")).calibration == tmp_path / "t.txt"


def test_the_command_knows_the_tables_without_torch():
    """--help lists every recipe and quantizer, and a refused value is named, before torch is imported."""
    script = (
        "import sys; from edge_export.cli import main\n"
        "codes = [main(['--help']), main(['m', '--profile', 'generic-x86', '--eval', 'no-such.txt'])]\n"
        "print(codes, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.splitlines()[-1] == "[0, 2] False", done.stderr
    assert (
        "edge-export: --eval 'no-such.txt': cannot be read" in done.stderr
        or "--eval no-such.txt" in done.stderr
    )
    for name in (*RECIPES, *QUANTIZERS):
        assert name in done.stdout
