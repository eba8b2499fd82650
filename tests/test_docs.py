"""What README, ARCHITECTURE, CONTRIBUTING and CHANGELOG say exists, exists; their commands parse."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edge_export.cli import command as export_command
from edge_reasoner import errors
from edge_reasoner.cli.main import cli
from edge_reasoner.contract.profile import list_profiles

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
#: a path may be written from the checkout or from either package
BASES = (ROOT, ROOT / "edge_reasoner", ROOT / "export" / "edge_export")
FOLDERS = (
    ".ci",
    "benchmarks",
    "device_profiles",
    "docs",
    "edge_reasoner",
    "export",
    "samples",
    "scripts",
    "tests",
)

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
MACHINE = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|opt|mnt|Users)\b")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_fences(name: str) -> str:
    return FENCE.sub("", text_of(name))


def commands(group: click.Command) -> Iterator[click.Command]:
    """The command and all below it."""
    yield group
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            child = group.get_command(context, name)
            assert child is not None
            yield from commands(child)


def parse(program: str, words: list[str]) -> click.Context:
    """Parses a command line without running it; click's UsageError where that cannot be done."""
    found: click.Command = {"edge-reasoner": cli, "edge-export": export_command}[program]
    while isinstance(found, click.Group):
        context = click.Context(found)
        child = found.get_command(context, words[0])
        assert child is not None, f"{program}: no command {words[0]!r}"
        found, words = child, words[1:]
    return found.make_context(program, list(words))


def readme_command_lines() -> list[str]:
    """Lines of README's plain fenced blocks that run one of the two programs."""
    lines = [
        line.strip()
        for _, language, body in FENCE.findall(text_of("README.md"))
        if language in ("", "sh", "bash")
        for line in body.splitlines()
    ]
    return [line for line in lines if line.startswith(("edge-reasoner ", "edge-export "))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    """Every relative link's file is there."""
    for target in LINK.findall(text_of(name)):
        if "://" not in target and not target.startswith("#"):
            assert (ROOT / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_exist(name):
    """Every file or folder named as code is there."""
    for span in SPAN.findall(without_fences(name)):
        if not PATH.fullmatch(span):
            continue
        in_folder = "/" in span and span.split("/")[0] in FOLDERS
        if in_folder or span.endswith((".py", ".md", ".toml", ".cfg", ".sh")):
            assert any((base / span).exists() for base in BASES), span


def test_the_file_map_is_right_and_complete():
    """The file map's entries exist, and every package and top-level folder with sources is in it."""
    table = text_of("README.md").partition("## Where things are")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    entries = {span for row in rows for span in SPAN.findall(row)}
    assert len(entries) > 20
    for entry in entries:
        assert (ROOT / entry).exists(), entry
    packages = {path.parent for base in BASES[1:] for path in base.glob("*/__init__.py")}
    wanted = {f"{path.relative_to(ROOT).as_posix()}/" for path in packages}
    mapped = {name if name.endswith("/") else f"{Path(name).parent.as_posix()}/" for name in entries}
    top = {f"{folder}/" for folder in FOLDERS if not folder.startswith(".")}
    covered = mapped | {f"{name.split('/')[0]}/" for name in mapped}
    assert wanted - mapped == set() and top - covered == set()


@pytest.mark.parametrize("line", readme_command_lines())
def test_readme_commands_parse(line):
    """A command line of README is accepted by its program, and the boards it names are known."""
    program, *words = shlex.split(line, comments=True)
    context = parse(program, words)
    assert set(context.params.get("profiles", ())) <= set(list_profiles())


def test_readme_shows_both_programs():
    """README has command lines of both programs."""
    programs = {line.split()[0] for line in readme_command_lines()}
    assert programs == {"edge-reasoner", "edge-export"}


def test_a_wrong_option_would_be_noticed():
    """The parser used above refuses an option that does not exist."""
    with pytest.raises(click.UsageError):
        parse("edge-reasoner", ["ask", "bundle", "Hi", "--no-such-option"])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_options_exist(name):
    """Every option named in running text is one of the programs'."""
    known = {
        option
        for program in (cli, export_command)
        for found in commands(program)
        for parameter in found.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    spans = [span for span in SPAN.findall(without_fences(name)) if span.startswith(("--", "edge-"))]
    named = {option for span in spans for option in OPTION.findall(span)}
    assert named - known - {"--help"} == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_make_targets_exist(name):
    """Every `make TARGET` is a rule of the Makefile."""
    rules = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    code = [
        *SPAN.findall(without_fences(name)),
        *(line for _, _, body in FENCE.findall(text_of(name)) for line in body.splitlines()),
    ]
    named = {match[1] for text in code if (match := re.match(r"make ([a-z-]+)", text))}
    assert named - rules == set()


def test_readme_python_names_exist():
    """README's Python parses, and imports only what the packages offer."""
    blocks = [body for _, language, body in FENCE.findall(text_of("README.md")) if language == "python"]
    assert blocks
    imports = [
        node for body in blocks for node in ast.walk(ast.parse(body)) if isinstance(node, ast.ImportFrom)
    ]
    for node in imports:
        assert node.module is not None
        offered = importlib.import_module(node.module).__all__
        assert {alias.name for alias in node.names} <= set(offered)


def test_readme_exit_statuses_are_those_of_the_errors():
    """The table of exit statuses has every status that an error of ours leads to."""
    table = text_of("README.md").partition("| Exit status")[2].partition("\n\n")[0]
    listed = {int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    raised = {
        kind.exit_status
        for kind in vars(errors).values()
        if isinstance(kind, type) and hasattr(kind, "exit_status")
    }
    assert raised | {0, 130} == listed


def test_readme_tables_are_known_to_their_generator():
    """Every table marker has its end and a row in benchmarks/tables.py."""
    readme = text_of("README.md")
    names = re.findall(r"^<!-- table:(\w+) -->$", readme, re.MULTILINE)
    assert names and readme.count("<!-- /table -->") == len(names)
    known = re.findall(r'^    "(\w+)": \(', text_of("benchmarks/tables.py"), re.MULTILINE)
    assert set(names) <= set(known)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_machine_path(name):
    """No path of the machine that a document was written on."""
    assert MACHINE.findall(text_of(name)) == []
