"""What onnxruntime has to say reaches nobody's terminal and no `--json`: only our one printable line does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from support.tiny_bundle import relist, write_bundle

ROOT = Path(__file__).resolve().parents[3]
OLD_PYTHON = "EDGE_REASONER_ORT123_PYTHON"
#: a red word, the screen cleared, the window's title, a line of its own, an 8-bit control
EVIL = 'a\x1b[31mred\x1b[2J\x1b]0;title\x07\n{"text": "forged"}\r\n\x9b1m'


def _graph(
    node: onnx.NodeProto, *initializers: onnx.TensorProto, output: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """A node between input `x` float32 [3] and the output `y`; names as they come."""
    graph = helper.make_graph(
        [node],
        EVIL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", output, None)],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _outside() -> onnx.ModelProto:
    weight = onnx.TensorProto(name=EVIL, data_type=TensorProto.FLOAT, dims=[3])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=EVIL)
    return _graph(helper.make_node("Add", ["x", EVIL], ["y"], name=EVIL), weight)


def _shape(*sizes: int) -> onnx.TensorProto:
    return helper.make_tensor(EVIL, TensorProto.INT64, [len(sizes)], sizes)


#: graphs that the library complains of while it loads them, or while it runs them
GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "unknown_operator": lambda: _graph(helper.make_node(EVIL, ["x"], ["y"], name=EVIL)),
    "unknown_domain": lambda: _graph(helper.make_node("Relu", ["x"], ["y"], name=EVIL, domain=EVIL)),
    "missing_input": lambda: _graph(helper.make_node("Add", ["x", f"{EVIL}?"], ["y"], name=EVIL)),
    "wrong_type": lambda: _graph(helper.make_node("Reshape", ["x", "x"], ["y"], name=EVIL)),
    "wrong_output": lambda: _graph(
        helper.make_node("Relu", ["x"], ["y"], name=EVIL), output=TensorProto.INT8
    ),
    "torn_initializer": lambda: _graph(
        helper.make_node("Add", ["x", EVIL], ["y"], name=EVIL),
        onnx.TensorProto(name=EVIL, data_type=TensorProto.FLOAT, dims=[3], raw_data=b"\0" * 5),
    ),
    "missing_data": _outside,
    "bad_attribute": lambda: _graph(helper.make_node("Cast", ["x"], ["y"], name=EVIL, to=99)),
    "fails_at_run": lambda: _graph(helper.make_node("Reshape", ["x", EVIL], ["y"], name=EVIL), _shape(-1, 2)),
    "fails_in_kernel": lambda: _graph(
        helper.make_node("Expand", ["x", EVIL], ["y"], name=EVIL), _shape(2, 2)
    ),
}


@pytest.fixture(scope="module", params=["newest", "1.23.2"])
def python(request) -> str:
    """This interpreter, and the one with the oldest onnxruntime that is supported."""
    found = sys.executable if request.param == "newest" else os.environ.get(OLD_PYTHON)
    if not found:
        pytest.skip(f"{OLD_PYTHON} names no Python with onnxruntime 1.23.2; `make test-all` sets it")
    return found


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "export")))
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )


def _is_plain(data: bytes) -> bool:
    """Whether a terminal shows this as it stands: UTF-8, and no control character but newlines."""
    text = data.decode("utf-8")
    return all(character == "\n" or ord(character) >= 0x20 for character in text) and "\x9b" not in text


def test_a_graph_says_nothing_itself(python, tmp_path):
    """Every complaint of the library becomes one printable line of ours; it writes nothing on its own."""
    graphs = {name: make().SerializeToString() for name, make in GRAPHS.items()}
    # the library's own words are not UTF-8 then: its fall-back printed on standard output
    graphs |= {f"not_utf8_{name}": data.replace(b"red", b"r\xffd") for name, data in graphs.items()}
    for name, data in graphs.items():
        (tmp_path / f"{name}.onnx").write_bytes(data)
    paths = [str(tmp_path / f"{name}.onnx") for name in graphs]
    done = _run(python, str(ROOT / "tests/support/load_graphs.py"), *paths)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    outcomes = json.loads(line)["outcomes"]
    assert done.stderr == b"" or (_is_plain(done.stderr) and b"red" not in done.stderr), done.stderr
    for name in graphs:
        text = outcomes[f"{name}.onnx"]
        assert text and "\n" not in text and _is_plain(text.encode()), (name, text)


def test_json_stays_json(tmp_path):
    """`--json` of a bundle whose graph fails: nothing on standard output, one plain line on the other."""
    import numpy as np
    from support import tiny_graphs as tiny
    from support.tiny_bundle import TOKENS, decoder_golden

    logits = np.zeros((len(TOKENS), tiny.VOCAB), np.float32)
    root = write_bundle(tmp_path / "bundle", decoder_golden(logits, 0.1), encoder=False)
    for name in ("int4", "fp32"):
        model = onnx.load(root / f"graphs/{name}.onnx", load_external_data=False)
        for node in model.graph.node:
            node.name = EVIL
        model.graph.node[0].input[0] = EVIL
        (root / f"graphs/{name}.onnx").write_bytes(model.SerializeToString())
        relist(root, f"graphs/{name}.onnx")
    for command in (("ask", str(root), "hi", "--json"), ("doctor", str(root), "--json")):
        done = _run(
            sys.executable, "-m", "edge_reasoner.cli.main", *command, EDGE_REASONER_CACHE=str(tmp_path / "c")
        )
        assert done.returncode in (2, 3), done
        assert done.stdout == b"" or isinstance(json.loads(done.stdout), dict)
        assert _is_plain(done.stderr) and done.stderr.count(b"\n") <= 2, done.stderr
