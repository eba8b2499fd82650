"""What comes from elsewhere: every release has a digest, every licence is one that is allowed."""

from __future__ import annotations

import configparser
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import dependencies, fetch_models, lock

ROOT = Path(__file__).resolve().parent.parent
FILES = ("lock.txt", "torch.txt", "torch-cpu.txt", "cuda.txt")


def _locked() -> dict[str, list[Requirement]]:
    """The lock's releases by name; each has digests."""
    found: dict[str, list[Requirement]] = {}
    for name in FILES:
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if line and not line.startswith("#"):
                requirement, *digests = line.split("--hash=")
                assert digests, line
                assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest.strip()) for digest in digests)
                parsed = Requirement(requirement.strip())
                found.setdefault(parsed.name.lower(), []).append(parsed)
    return found


def _wanted() -> list[Requirement]:
    return [Requirement(line) for line in (*lock.requirements(), *lock.BUILD)]


def test_the_lock_is_of_these_requirements():
    """Everything that setup.cfg asks for is there, in exact releases that it allows; after a change of it
    `scripts/lock.py` makes the files anew."""
    locked = _locked()
    for wanted in _wanted():
        releases = [r for r in locked.get(wanted.name.lower().replace("_", "-"), ()) if _meet(r, wanted)]
        assert releases, f"{wanted}: not in requirements/; run scripts/lock.py"
        for release in releases:
            (pin,) = release.specifier
            assert pin.operator == "==" and "*" not in pin.version
            assert wanted.specifier.contains(pin.version, prereleases=True), (str(wanted), str(release))


def _meet(release: Requirement, wanted: Requirement) -> bool:
    """Whether both are for a Python that the other is for too."""
    return any(
        all(r.marker is None or r.marker.evaluate(environment) for r in (release, wanted))
        for environment in (
            {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.9", "sys_platform": "linux"}
            for minor in (10, 11, 12, 13)
        )
    )


def test_one_digest_that_differs_installs_nothing(tmp_path):
    """pip, told to, refuses a download whose digest is not the listed one."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    wheel.write_bytes(b"PK\x05\x06" + bytes(18))
    wanted = tmp_path / "wanted.txt"
    other = hashlib.sha256(b"another").hexdigest()
    wanted.write_text(f"tiny==1 --hash=sha256:{other}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-index", "--no-deps", "--require-hashes", "-q"]
    command += ["--find-links", str(tmp_path), "--dest", str(tmp_path / "out"), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode and "DO NOT MATCH" in done.stderr, done.stderr


def test_models_are_what_is_meant(tmp_path):
    """Packages are named with digests; a file of another content is not taken for a model."""
    for requirement, _ in (fetch_models.SMOLLM2, fetch_models.MINILM):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", requirement)
    (tmp_path / "m").write_bytes(b"model")
    assert fetch_models.is_file_of(tmp_path / "m", hashlib.sha256(b"model").hexdigest())
    assert not fetch_models.is_file_of(tmp_path / "m", fetch_models.SMOLLM2_SHA256)
    assert not fetch_models.is_file_of(tmp_path / "missing", fetch_models.SMOLLM2_SHA256)


def test_every_dependency_is_listed_with_an_allowed_licence():
    """docs/dependencies.md names all that setup.cfg asks for; whatever it lists may be used."""
    rows = dict(
        re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", dependencies.PAGE.read_text("utf-8"), re.MULTILINE)
    )
    rows = {name: text for name, text in rows.items() if name != "Package" and not name.startswith("-")}
    for part in ("install_requires", "export", "server", "dev"):
        for name in dependencies.required(part):
            assert name in rows or name == "tomli", f"{name}: run scripts/dependencies.py"
    refused = {name: text for name, text in rows.items() if not dependencies.is_allowed(text)}
    assert not refused
    for name in dependencies.required("install_requires"):
        if dependencies.closure([name]):
            assert dependencies.licence(name) == rows[name]


@pytest.mark.parametrize(
    ("declared", "allowed"),
    [("MIT", True), ("MIT AND GPL-3.0-only", False), ("GPL-2.0-only OR MIT", True), ("unknown", False)],
)
def test_the_list_of_licences(declared, allowed):
    """All parts of an expression must be allowed, of alternatives one."""
    assert dependencies.is_allowed(declared) is allowed


def test_jinja_has_the_last_mends_of_its_sandbox():
    """3.1.6 closed the way out through `|attr` (CVE-2025-27516)."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    (jinja,) = [r for r in _wanted() if r.name == "jinja2"]
    assert not jinja.specifier.contains("3.1.5") and jinja.specifier.contains("3.1.6")
