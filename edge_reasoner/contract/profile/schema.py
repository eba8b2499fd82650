"""The device profile: what one board is, what it can run, and how fast it moves bytes.

A profile is data (one TOML file per board, see docs/profiles.md) parsed into these frozen records. Every
figure carries its unit in its field name and is a `Figure`: the value, where it came from, and whether it was
measured, read in a datasheet or estimated. Units: `_ghz` 10⁹ Hz, `_gbps` 10⁹ bytes per second, `_gib` and
`_mib` 2³⁰ and 2²⁰ bytes, `_w` watts, `_ms` milliseconds, `_tops` 10¹² operations per second (one
multiply-accumulate is two operations), `_gmacs` 10⁹ multiply-accumulates per second.

Parsing is strict (`load.parse_profile`): unknown fields, wrong types and numbers out of range are refused by
msgspec; what types cannot say is checked in `DeviceProfile.check`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from edge_reasoner.errors import ProfileError

SCHEMA_VERSION = 1
MIB = 1024 * 1024

Basis = Literal["measured", "datasheet", "estimated"]
Architecture = Literal["aarch64", "x86_64"]
AcceleratorKind = Literal["gpu", "npu", "tpu"]
TaskName = Literal["causal-lm", "encoder", "module"]
WeightPrecision = Literal["fp32", "fp16", "bf16", "int8", "int4", "mixed"]
KvDtype = Literal["float32", "float16"]

#: CPU features a profile may name, spelt as Linux's HWCAP names, except `lse` (Linux: atomics) and the AVX
#: names without inner underscores; `isa.isa_features` reports the running machine in the same words.
ARM_FEATURES = frozenset(
    (
        "asimd",
        "aes",
        "crc32",
        "lse",
        "fphp",
        "asimdhp",
        "asimdrdm",
        "asimddp",
        "bf16",
        "i8mm",
        "sve",
        "sve2",
        "svei8mm",
        "sme",
    )
)
X86_FEATURES = frozenset(
    (
        "sse4_2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx_vnni_int8",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512vnni",
        "avx512_bf16",
        "amx_tile",
        "amx_int8",
    )
)

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}\Z")]
#: An inference library that a board has. Any name: a profile may list libraries that this SDK has no backend
#: for; which it has, the table of `edge_reasoner.backends` says under the same names.
BackendName = Name
Text = Annotated[str, Meta(min_length=1, max_length=400)]
Texts = Annotated[tuple[Text, ...], Meta(max_length=128)]
Version = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+){0,3}\Z", max_length=40)]
CoreCount = Annotated[int, Meta(ge=1, le=1024)]
Opset = Annotated[int, Meta(ge=7, le=99)]
BlockSize = Literal[16, 32, 64, 128, 256]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Immutable, keyword-only, refuses unknown fields."""


class Figure(Record, frozen=True, kw_only=True):
    """One number with its provenance. The unit is in the name of the field that holds it.

    `source` says where it came from (a public page, a command, the arithmetic behind an estimate).
    """

    value: Annotated[float, Meta(ge=0, le=1e12)]
    basis: Basis
    source: Text

    def __post_init__(self) -> None:
        """Refuses NaN and infinity, which pass msgspec's bounds. Raises ValueError (mapped by the parser)."""
        if not math.isfinite(self.value):
            raise ValueError(f"value must be a finite number, not {self.value}")


class Cluster(Record, frozen=True, kw_only=True):
    """A group of equal cores. `big`: one whose cores the threads are counted by."""

    cores: CoreCount
    microarchitecture: Text
    big: bool = True
    clock_ghz: Figure
    #: from ARM_FEATURES or X86_FEATURES; empty where the profile does not know (generic boards)
    isa: Annotated[tuple[str, ...], Meta(max_length=64)] = ()


class Memory(Record, frozen=True, kw_only=True):
    """Main memory and how fast the CPU moves bytes through it."""

    capacity_gib: Figure
    #: other sizes the board is sold with; plans use `capacity_gib`
    options_gib: Annotated[tuple[float, ...], Meta(max_length=16)] = ()
    #: kept free for the operating system and the host application
    os_reserve_mib: Figure
    theoretical_gbps: Figure | None = None
    #: weight bytes that the CPU streams per second while decoding
    effective_decode_gbps: Figure
    #: memcpy, one read and one write counted once
    copy_gbps: Figure | None = None


class Cpu(Record, frozen=True, kw_only=True):
    """What the cost model needs beside bandwidth for the CPU path."""

    #: fixed cost of one decode step (dispatch, norms, sampling), whatever the model's bytes
    fixed_step_ms: Figure
    #: share of the ISA's peak multiply-accumulate rate that prefill reaches (0–1)
    prefill_efficiency_ratio: Figure
    #: float32 multiply-accumulates per second (10⁹) reached on the big cores, where measured: then int8's and
    #: float16's rates follow from it instead of from clock and ISA
    float_gmacs: Figure | None = None
    #: resident memory of Python, the runtime and the tokenizer before any weight is loaded
    runtime_base_mib: Figure


class Accelerator(Record, frozen=True, kw_only=True):
    """A GPU, NPU or TPU beside the CPU."""

    kind: AcceleratorKind
    name: Text
    peak_tops: Figure | None = None
    precisions: tuple[WeightPrecision, ...]
    #: the software that drives it
    runtime: Text
    #: False: token-by-token generation does not run on it, see the profile's `cannot`
    runs_decoder_lm: bool
    #: its own memory, where it does not share the board's
    memory_gib: Figure | None = None
    effective_decode_gbps: Figure | None = None
    fixed_step_ms: Figure | None = None
    prefill_gmacs: Figure | None = None


class PowerMode(Record, frozen=True, kw_only=True):
    """One power mode of the board; `limit_w` absent means unlimited or not published."""

    name: Text
    limit_w: Figure | None = None
    clock_notes: Annotated[str, Meta(max_length=400)] = ""


class Power(Record, frozen=True, kw_only=True):
    """What the whole board draws."""

    idle_w: Figure | None = None
    stress_w: Figure | None = None
    default_mode: Text = "default"
    modes: Annotated[tuple[PowerMode, ...], Meta(max_length=16)] = ()


class Runtime(Record, frozen=True, kw_only=True):
    """One inference library as it can be installed on the board's OS."""

    backend: BackendName
    #: newest version that installs there, and the Python it does so under
    newest_version: Version
    python: Version
    #: execution providers or delegates, preferred first
    execution_providers: Texts
    #: newest ONNX opset of domain "" the library loads; None for libraries that read no ONNX
    accepted_opset: Opset | None = None
    #: newest opset our exporter writes for it (never above `accepted_opset`)
    export_opset: Opset | None = None
    #: `com.microsoft` operators the exporter may use; absent: none are ruled out
    contrib_ops: Texts | None = None
    source: Text


class Precision(Record, frozen=True, kw_only=True):
    """Weight precisions that run for a task on one processor (`cpu` or an accelerator's name); the exporter
    refuses others. `fp16` on a CPU is storage: half the bytes on disk, widened at load."""

    task: TaskName
    processor: Text
    weights: tuple[WeightPrecision, ...]


class Limit(Record, frozen=True, kw_only=True):
    """Something the board cannot do, why, and what works instead.

    `what` completes "the board cannot …". A row with conditions is enforced: the exporter refuses a model
    that meets all of them. A row without any informs people.
    """

    what: Text
    why: Text
    instead: Text
    #: models of this kind
    task: TaskName | None = None
    #: on `cpu` or on the accelerator of that name
    processor: Text | None = None
    #: under this runtime
    backend: BackendName | None = None
    #: with more weights than this
    parameters_above: Annotated[int, Meta(ge=0, le=1 << 53)] | None = None
    #: with one of these operators in the graph
    operators: Texts = ()
    #: kernels of these CPU features: no cluster of the profile may claim one
    features: Annotated[tuple[str, ...], Meta(max_length=64)] = ()

    def about(self, task: TaskName, processor: str) -> bool:
        """Whether the row says that such models do not run on that processor."""
        return self.processor == processor and self.task in (None, task) and self.parameters_above is None

    def forbids(
        self, task: TaskName, processor: str, backend: BackendName, operators: frozenset[str], parameters: int
    ) -> bool:
        """Whether a model with these properties meets every condition, and there is one."""
        conditions = (
            (self.task, self.task == task),
            (self.processor, self.processor == processor),
            (self.backend, self.backend == backend),
            (self.parameters_above, self.parameters_above is not None and parameters > self.parameters_above),
            (self.operators or None, not operators.isdisjoint(self.operators)),
        )
        met = [holds for wanted, holds in conditions if wanted is not None]
        return bool(met) and all(met)


class ExportDefaults(Record, frozen=True, kw_only=True):
    """What the exporter chooses for this board unless told otherwise."""

    int4_block_size: BlockSize = 32
    int8_block_size: BlockSize = 32
    int4_symmetric: bool = False
    int8_symmetric: bool = True
    context_tokens: Annotated[int, Meta(ge=16, le=1 << 20)] = 2048
    kv_dtype: KvDtype = "float32"
    #: threads for one inference; 0: as many as there are big cores
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0


class DeviceProfile(Record, frozen=True, kw_only=True):
    """One board; built by `load.load_profile` or `probe.probe_machine`. Units: see the module."""

    schema_version: Literal[1]
    name: Name
    title: Text
    summary: Text
    architecture: Architecture
    #: operating system the runtime versions below were looked up for
    os: Text
    #: parts of the device tree's model name by which `probe` recognizes the board
    device_tree_models: Texts = ()
    clusters: Annotated[tuple[Cluster, ...], Meta(min_length=1, max_length=16)]
    memory: Memory
    cpu: Cpu
    power: Power = Power()
    accelerators: Annotated[tuple[Accelerator, ...], Meta(max_length=8)] = ()
    runtimes: Annotated[tuple[Runtime, ...], Meta(min_length=1, max_length=16)]
    precisions: Annotated[tuple[Precision, ...], Meta(min_length=1, max_length=32)]
    cannot: Annotated[tuple[Limit, ...], Meta(max_length=32)] = ()
    export: ExportDefaults = ExportDefaults()

    @property
    def big_cores(self) -> int:
        """Cores of the big clusters (all cores where no cluster is big)."""
        return sum(c.cores for c in self.clusters if c.big) or sum(c.cores for c in self.clusters)

    @property
    def default_threads(self) -> int:
        """Threads for one inference: the profile's own figure, else the big cores."""
        return self.export.threads or self.big_cores

    @property
    def isa(self) -> frozenset[str]:
        """CPU features that every big core has."""
        sets = [frozenset(c.isa) for c in self.clusters if c.big] or [frozenset(c.isa) for c in self.clusters]
        return frozenset.intersection(*sets)

    @property
    def memory_budget_bytes(self) -> int:
        """Bytes of main memory that a model and its caches may take: capacity less the OS reserve."""
        reserve_bytes = int(self.memory.os_reserve_mib.value * MIB)
        return max(0, int(self.memory.capacity_gib.value * 1024 * MIB) - reserve_bytes)

    def runtime(self, backend: BackendName) -> Runtime | None:
        """The runtime entry of that backend, or None where the board has none."""
        return next((r for r in self.runtimes if r.backend == backend), None)

    @property
    def max_opset(self) -> int:
        """Newest ONNX opset the exporter writes for this board. Raises ProfileError without onnxruntime."""
        opset = self._onnxruntime().export_opset
        if opset is None:  # only a profile that nobody checked
            raise ProfileError(f"profile {self.name!r}: onnxruntime without export_opset")
        return opset

    @property
    def allowed_ops(self) -> frozenset[str] | None:
        """`com.microsoft` operators the exporter may emit; None: no restriction. Standard ONNX operators are
        bounded by `max_opset`."""
        ops = self._onnxruntime().contrib_ops
        return None if ops is None else frozenset(ops)

    def weights_for(self, task: TaskName, processor: str = "cpu") -> frozenset[WeightPrecision]:
        """Precisions of weights that run for the task on `cpu` or the named accelerator."""
        rows = (p.weights for p in self.precisions if p.task == task and p.processor == processor)
        return frozenset(weights for row in rows for weights in row)

    def accelerator(self, name: str) -> Accelerator | None:
        """The accelerator of that name, or None."""
        return next((a for a in self.accelerators if a.name == name), None)

    def _onnxruntime(self) -> Runtime:
        entry = self.runtime("onnxruntime")
        if entry is None:
            raise ProfileError(f"profile {self.name!r}: no onnxruntime on this board; it offers: "
                               + ", ".join(r.backend for r in self.runtimes))  # fmt: skip
        return entry

    def check(self, where: str) -> DeviceProfile:
        """Checks what types cannot say; returns itself. Raises ProfileError naming `where` and the field."""
        features = ARM_FEATURES if self.architecture == "aarch64" else X86_FEATURES
        for index, cluster in enumerate(self.clusters):
            for feature in cluster.isa:
                _member(where, f"clusters[{index}].isa", feature, features)
            _positive(where, f"clusters[{index}].clock_ghz", cluster.clock_ghz)
        _positive(where, "memory.capacity_gib", self.memory.capacity_gib)
        _positive(where, "memory.effective_decode_gbps", self.memory.effective_decode_gbps)
        ratio = self.cpu.prefill_efficiency_ratio
        _positive(where, "cpu.prefill_efficiency_ratio", ratio)
        if ratio.value > 1:
            raise ProfileError(
                f"{where}: cpu.prefill_efficiency_ratio: {ratio.value:g}; at most 1 is allowed"
            )
        if any(not math.isfinite(size) or size <= 0 for size in self.memory.options_gib):
            raise ProfileError(f"{where}: memory.options_gib: every size must be a number above 0")
        _distinct(where, "accelerators", [a.name for a in self.accelerators])
        _distinct(where, "runtimes", [r.backend for r in self.runtimes])
        _distinct(where, "power.modes", [m.name for m in self.power.modes])
        modes = {m.name for m in self.power.modes}
        if modes:
            _member(where, "power.default_mode", self.power.default_mode, modes)
        processors = {"cpu", *(a.name for a in self.accelerators)}
        for index, precision in enumerate(self.precisions):
            _member(where, f"precisions[{index}].processor", precision.processor, processors)
            _check_precision(f"{where}: precisions[{index}]", precision, self)
        for index, limit in enumerate(self.cannot):
            _check_limit(f"{where}: cannot[{index}]", limit, self, processors)
        for index, runtime in enumerate(self.runtimes):
            _check_opsets(f"{where}: runtimes[{index}]", runtime)
        return self


def allowed_values(field: str) -> tuple[object, ...]:
    """Values a closed field takes, for error messages; empty for open fields."""
    closed: dict[str, object] = {
        "schema_version": Literal[1],
        "basis": Basis,
        "architecture": Architecture,
        "kind": AcceleratorKind,
        "task": TaskName,
        "weights": WeightPrecision,
        "precisions": WeightPrecision,
        "kv_dtype": KvDtype,
        "int4_block_size": BlockSize,
        "int8_block_size": BlockSize,
    }
    return get_args(closed[field]) if field in closed else ()


def _check_precision(where: str, precision: Precision, profile: DeviceProfile) -> None:
    """An accelerator runs what its own row says, and no decoder where that says so."""
    accelerator = profile.accelerator(precision.processor)
    if accelerator is None:
        return
    if precision.task == "causal-lm" and not accelerator.runs_decoder_lm:
        raise ProfileError(f"{where}: causal-lm on {accelerator.name!r}, whose runs_decoder_lm is false")
    for weights in precision.weights:
        if weights != "mixed":
            _member(where, "weights", weights, set(accelerator.precisions))


def _check_limit(where: str, limit: Limit, profile: DeviceProfile, processors: set[str]) -> None:
    """What a row rules out must not be claimed elsewhere in the profile."""
    if limit.processor is not None:
        _member(where, "processor", limit.processor, processors)
    if limit.backend is not None:
        _member(where, "backend", limit.backend, {runtime.backend for runtime in profile.runtimes})
    for cluster in profile.clusters:
        if claimed := sorted(set(cluster.isa) & set(limit.features)):
            raise ProfileError(f"{where}: features: {claimed[0]!r} is in a cluster's isa")
    unconditional = limit.backend is None and limit.parameters_above is None and not limit.operators
    named = limit.task is not None and limit.processor is not None and unconditional
    if named and any((p.task, p.processor) == (limit.task, limit.processor) for p in profile.precisions):
        raise ProfileError(
            f"{where}: rules out {limit.task} on {limit.processor!r}, which [[precisions]] allows"
        )


def _check_opsets(where: str, runtime: Runtime) -> None:
    if runtime.backend == "onnxruntime":
        if runtime.accepted_opset is None or runtime.export_opset is None:
            raise ProfileError(f"{where}: onnxruntime needs accepted_opset and export_opset")
        if runtime.export_opset > runtime.accepted_opset:
            raise ProfileError(
                f"{where}: export_opset {runtime.export_opset} above accepted_opset {runtime.accepted_opset}"
            )
        if not runtime.execution_providers:
            raise ProfileError(f"{where}: execution_providers: at least one is needed")


def _positive(where: str, field: str, figure: Figure) -> None:
    if figure.value <= 0:
        raise ProfileError(f"{where}: {field}: {figure.value:g}; a value above 0 is needed")


def _member(where: str, field: str, value: str, allowed: frozenset[str] | set[str]) -> None:
    if value not in allowed:
        raise ProfileError(f"{where}: {field}: {value!r}; allowed: {', '.join(sorted(allowed))}")


def _distinct(where: str, field: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ProfileError(f"{where}: {field}: a name appears twice: {', '.join(names)}")
