"""What a board's profile allows: the processor a model runs on there, and the recipes that suit it.

Everything that the profile says it cannot do is refused here, before any work, in one line that names what is
possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from packaging.version import Version

from edge_export.plan.recipes import RECIPES, Recipe
from edge_export.quantize.formats import FloatType
from edge_reasoner.contract.profile import DeviceProfile
from edge_reasoner.contract.profile.schema import (
    Accelerator,
    AcceleratorKind,
    BackendName,
    Limit,
    TaskName,
)
from edge_reasoner.errors import TargetError

BACKEND: Final[BackendName] = "onnxruntime"
#: The oldest onnxruntime that the graphs have been run on.
MINIMUM_ONNXRUNTIME: Final = "1.23.2"
#: A decoder's KV cache has at least this many positions.
MIN_CONTEXT_TOKENS: Final = 16


@dataclass(frozen=True)
class Provider:
    """One of onnxruntime's execution providers that graphs are written for, and verified on, here."""

    #: None: the CPU
    accelerator: AcceleratorKind | None
    #: its kernels of our operators also exist for float16
    computes_float16: bool
    #: types its attention takes a KV cache in
    kv_dtypes: tuple[FloatType, ...]


#: A new provider is one row. CPUs have no float16 kernels for most operators: there fp16 is storage only.
PROVIDERS: Final[Mapping[str, Provider]] = MappingProxyType(
    {"CPUExecutionProvider": Provider(None, computes_float16=False, kv_dtypes=("float32",))}
)


@dataclass(frozen=True)
class Target:
    """Where on the board a model runs, and in which arithmetic."""

    #: `cpu` or an accelerator's name
    processor: str
    execution_provider: str
    recipe: Recipe
    compute: FloatType
    kv_dtype: FloatType
    #: what the board's owner would ask: accelerators that stay unused, an `auto` without a choice
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BoardPlan:
    """What every kind of plan says first: by which recipe, for which board, and where on it a model runs."""

    recipe: str
    profile: str
    #: `cpu` or an accelerator's name
    processor: str
    #: onnxruntime's
    execution_provider: str
    opset: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "recipe": self.recipe,
            "profile": self.profile,
            "processor": self.processor,
            "execution_provider": self.execution_provider,
            "opset": self.opset,
        }


def choose_target(
    profile: DeviceProfile,
    task: TaskName,
    recipe: str,
    *,
    operators: Mapping[bool, frozenset[str]],
    parameters: int,
    providers: Mapping[str, Provider] = PROVIDERS,
) -> Target:
    """The board's preferred provider that graphs are written for, and the recipe it runs.

    `operators` are the graph's `com.microsoft` operators if it is quantized (True) or not (False).
    Raises TargetError for whatever the profile rules out: runtime, operators, precision, model size, cache.
    """
    runtime = profile.runtime(BACKEND)
    if runtime is None or not any(name in providers for name in runtime.execution_providers):
        offers = [r.backend for r in profile.runtimes] if runtime is None else runtime.execution_providers
        raise TargetError(
            f"profile {profile.name!r}: it offers {', '.join(offers)}; graphs are written for {BACKEND}'s "
            + ", ".join(providers)
        )
    if Version(runtime.newest_version) < Version(MINIMUM_ONNXRUNTIME):
        raise TargetError(
            f"profile {profile.name!r}: {BACKEND} {runtime.newest_version} is its newest; graphs need "
            f"{MINIMUM_ONNXRUNTIME}"
        )
    name = next(name for name in runtime.execution_providers if name in providers)
    provider = providers[name]
    accelerator = _accelerator(profile, provider)
    processor = "cpu" if accelerator is None else accelerator.name
    row = resolve_recipe(profile, task, recipe, processor)
    _require_possible(profile, task, processor, operators[row.quantized], parameters)
    kv_dtype = _kv_dtype(profile, task, name, provider)
    half = provider.computes_float16 and accelerator is not None and "fp16" in accelerator.precisions
    # The attention reads its cache in the type that it computes in.
    compute: FloatType = "float16" if half and row.dense == kv_dtype == "float16" else "float32"
    notes = [_unused(profile, task, other) for other in profile.accelerators if other is not accelerator]
    if row.name != recipe:
        notes.append(f"recipe {recipe} is {row.name} here: the profile names no {RECIPES[recipe].weights}")
    return Target(processor, name, row, compute, kv_dtype, tuple(notes))


def resolve_recipe(profile: DeviceProfile, task: TaskName, recipe: str, processor: str = "cpu") -> Recipe:
    """The row of that name, or the first of its `instead` that the processor runs.

    Raises TargetError with the recipes that are possible.
    """
    allowed = profile.weights_for(task, processor)
    if not allowed:
        named = sorted({f"{p.task} on {p.processor}" for p in profile.precisions})
        raise TargetError(
            f"profile {profile.name!r}: no [[precisions]] for {task} on {processor}; it has: "
            + ", ".join(named)
        )
    for name in (recipe, *RECIPES[recipe].instead):
        if RECIPES[name].weights in allowed:
            return RECIPES[name]
    possible = [
        row.name
        for row in RECIPES.values()
        if any(RECIPES[name].weights in allowed for name in (row.name, *row.instead))
    ]
    raise TargetError(
        f"recipe={recipe!r}: profile {profile.name!r} does not run it for {task} on {processor}; possible: "
        + ", ".join(possible)
    )


def _accelerator(profile: DeviceProfile, provider: Provider) -> Accelerator | None:
    if provider.accelerator is None:
        return None
    found = next((a for a in profile.accelerators if a.kind == provider.accelerator), None)
    if found is None:
        raise TargetError(
            f"profile {profile.name!r}: a {provider.accelerator}'s provider, but no such accelerator"
        )
    return found


def _require_possible(
    profile: DeviceProfile, task: TaskName, processor: str, operators: frozenset[str], parameters: int
) -> None:
    """Operators that the runtime has, and nothing that a `[[cannot]]` row rules out."""
    if profile.allowed_ops is not None and (lacking := sorted(operators - profile.allowed_ops)):
        raise TargetError(
            f"profile {profile.name!r}: its onnxruntime lacks {', '.join(lacking)}, which "
            f"{'a decoder' if task == 'causal-lm' else 'an encoder'} needs"
        )
    for limit in profile.cannot:
        if limit.forbids(task, processor, BACKEND, operators, parameters):
            raise TargetError(f"profile {profile.name!r} cannot {_sentence(limit)}")


def _kv_dtype(profile: DeviceProfile, task: TaskName, name: str, provider: Provider) -> FloatType:
    wanted = profile.export.kv_dtype
    if task == "causal-lm" and wanted not in provider.kv_dtypes:
        raise TargetError(
            f"profile {profile.name!r}: export.kv_dtype {wanted!r}: {name} takes "
            + " or ".join(provider.kv_dtypes)
        )
    return wanted


def _unused(profile: DeviceProfile, task: TaskName, accelerator: Accelerator) -> str:
    """Why an accelerator of the board does not run this model."""
    about = f"{accelerator.name} is not used"
    limit = next((x for x in profile.cannot if x.about(task, accelerator.name)), None)
    if limit is not None:
        return f"{about}: the board cannot {_sentence(limit)}"
    if task == "causal-lm" and not accelerator.runs_decoder_lm:
        return f"{about}: it runs no decoder language models"
    return f"{about}: no graphs are written for its runtime ({accelerator.runtime})"


def _sentence(limit: Limit) -> str:
    return f"{limit.what} ({limit.why}); instead: {limit.instead}"
