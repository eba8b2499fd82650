"""onnxruntime itself: the one place that imports it, opens graphs and turns its exceptions into ours.

Threads spin while a call runs and stop when it returns (`session.force_spinning_stop`), so an idle device
does not burn a core (openpilot#22736).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edge_reasoner.backends.base import Graph, check_threads
from edge_reasoner.backends.onnxruntime.session_options import check_session_options
from edge_reasoner.errors import BackendError, BundleError, one_line
from edge_reasoner.files import utf8_path
from edge_reasoner.machine.process import check_same_process
from edge_reasoner.machine.quiet import silence_telemetry

silence_telemetry(os.environ)  # the library reads it while it is imported: no later place is early enough
import onnxruntime  # noqa: E402
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # noqa: E402

if hasattr(onnxruntime, "disable_telemetry_events"):  # for a program that has imported the library before us
    onnxruntime.disable_telemetry_events()
#: the log shows names of a graph as they are, to a terminal that obeys escape sequences in them; what the
#: library has to say of a failure is in its exceptions too, which become our errors, in one printable line
_FATAL_ONLY = 4
onnxruntime.set_default_logger_severity(_FATAL_ONLY)

#: where the weights of a graph lie that is given as bytes
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
CPU = "CPUExecutionProvider"
_DEFAULT_OPTIONS: Mapping[str, str] = {
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",
}
_BAD_GRAPH_ERRORS = (
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    UnicodeDecodeError,  # what it has to say holds a name that is not UTF-8
)
_LIBRARY_ERRORS = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.NoModel,
    ort_state.EngineError,
    ort_state.RuntimeException,
    ort_state.ModelLoaded,
    ort_state.NotImplemented,
    ort_state.EPFail,
    # what the C++ standard library's exceptions become
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    OverflowError,
    MemoryError,
)


def runtime_version() -> str:
    """Version of the onnxruntime library that is installed, e.g. "1.23.2"."""
    return str(onnxruntime.__version__)


def available_providers() -> tuple[str, ...]:
    """Execution providers that this build of onnxruntime contains."""
    return tuple(onnxruntime.get_available_providers())


def _keep_for_ever(
    thing: object,
    # bound here: at the interpreter's end the modules' own names may be gone already
    increase: Callable[..., None] = ctypes.pythonapi.Py_IncRef,
    pointer: Callable[[object], object] = ctypes.py_object,
) -> None:
    """Adds a reference that nothing gives back."""
    increase(pointer(thing))


class OwnedSession:
    """A session, which belongs to the process that opened it.

    Its threads do not exist in a forked child, where its destructor would wait for them for ever: there it
    cannot be used, and it is never freed, neither when it is closed or dropped nor at the interpreter's end.
    """

    def __init__(self, session: Any, where: str) -> None:
        """`where`: what errors call it."""
        self._session = session
        self._where = where
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is the process that opened it."""
        return self._pid == os.getpid()

    def get(self) -> Any:
        """The session. Raises BackendError: closed, or opened before a fork."""
        check_same_process(self._pid)
        session = self._session
        if session is None:
            raise BackendError(f"{self._where}: the model is closed")
        return session

    def close(
        self, getpid: Callable[[], int] = os.getpid, keep: Callable[[object], None] = _keep_for_ever
    ) -> None:
        """Frees graph, weights and threads; does nothing in another process. Idempotent."""
        if self._pid == getpid():
            self._session = None
        elif self._session is not None:
            keep(self._session)
            self._session = None

    def __del__(self) -> None:
        # also where a constructor failed, or the interpreter ends
        if getattr(self, "_session", None) is not None:
            self.close()


def open_session(
    graph: Graph, provider: str, session_options: Mapping[str, str], threads: int
) -> OwnedSession:
    """Loads a graph. `provider` must take every node: a silent fall-back to the CPU is an error.

    Of a held graph the library gets the bytes that were checked; weights it opens itself, in the folder that
    is held.

    Raises InputError, BundleError (the graph or an option is refused) and BackendError (no such provider, or
    the library fails).
    """
    where = graph.name if isinstance(graph, Path) else graph.path.name
    check_threads(threads)
    check_session_options(session_options, where)
    if provider not in available_providers():
        raise BackendError(
            f"{where}: execution provider {provider!r} is not in this onnxruntime {runtime_version()};"
            f" it has: {', '.join(available_providers())}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _FATAL_ONLY
    entries = {**_DEFAULT_OPTIONS, **session_options}
    if provider != CPU:
        entries["session.disable_cpu_ep_fallback"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    with library_errors(f"{where}: loading"):
        session = _load(graph, options, provider)
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"{where}: asked for {provider}, onnxruntime chose {', '.join(session.get_providers())}"
        )
    return OwnedSession(session, where)


def _load(graph: Graph, options: Any, provider: str) -> Any:
    def load(source: str | bytes) -> Any:
        # with its fall-back the constructor prints what failed on standard output, and tries the CPU
        return onnxruntime.InferenceSession(source, options, providers=[provider], enable_fallback=0)

    if isinstance(graph, Path):
        return load(utf8_path(graph, error=BundleError))
    folder = utf8_path(Path(graph.folder.location), error=BundleError)
    if provider != CPU:  # not every other one takes weights that do not lie beside a graph file
        return graph.load(lambda: load(f"{folder}/{graph.path.name}"), by_name=True)
    options.add_session_config_entry(_WEIGHTS_FOLDER, folder)
    return graph.load(lambda: load(graph.data))


def ort_value(array: NDArray[Any], device: str = "cpu") -> Any:
    """An OrtValue over the array's own memory (on the CPU) or over a copy on the device."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)


@contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """The one place where onnxruntime's exceptions become ours."""
    try:
        yield
    except _BAD_GRAPH_ERRORS as error:
        raise BundleError(
            f"{doing}: onnxruntime {runtime_version()} refuses it: {one_line(error)}"
        ) from error
    except _LIBRARY_ERRORS as error:
        raise BackendError(f"{doing}: onnxruntime {runtime_version()} failed: {one_line(error)}") from error
