"""Fixtures that the whole suite shares: the two real models, and SmolLM2's bundles made from them once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Read once, when torch is loaded: spinning worker threads make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
DATA = ROOT.parent / "shared" / "data"


def _model(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not there; `make models` fetches it")
    return path


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Ctrl-C works in the processes that tests start, also where the suite itself runs in the background."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's `&` does that, and children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF file."""
    return _model(MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as a sentence-transformers directory."""
    return _model(MODELS / "all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public test data beside the checkout."""
    if not DATA.is_dir():
        pytest.skip("the public test data is not beside this checkout")
    return DATA


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_gguf: Path, minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 for a Jetson with the default recipe, MiniLM as its preprocessor."""
    from edge_export.options import ExportOptions
    from edge_export.pipeline import export

    out = tmp_path_factory.mktemp("smollm2") / "auto"
    export(str(smollm2_gguf), "jetson-orin", out, ExportOptions(preprocessor=str(minilm_dir)))
    return out
