"""Accounts for every tensor of a checkpoint: used, known to be harmless, or refused by name.

A weight that the graph does not use means other mathematics than the checkpoint's (a bias, a norm, a block,
an adapter): the model would run and answer nonsense. What is harmless is listed here, pattern by pattern; a
bias vector of nothing but zeros adds nothing and is harmless too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Final

from edge_export.checkpoint.source import Placement, RawTensors
from edge_reasoner.errors import CheckpointError

#: how many tensors a message names
_NAMED: Final = 3
_MAX_NAME_CHARS: Final = 120
_MAX_BIAS_ELEMENTS: Final = 1 << 22
#: buffers that a library saved and that follow from the configuration
_BUFFERS: Final = (
    r"rotary_(pos_)?emb(_local)?\.(original_)?inv_freq",
    r"rotary_(pos_)?emb(_local)?\.(cos|sin)_cached",
    *("masked_bias", "position_ids", "token_type_ids", "causal_mask", r"_extra_state"),
)
_BUFFER: Final = rf"(.*\.)?({'|'.join(_BUFFERS)})"

HARMLESS_IN_DECODERS: Final = re.compile(_BUFFER)
#: the pooler (its output is no sentence embedding) and the heads of BERT's pre-training
HARMLESS_IN_BERT: Final = re.compile(
    rf"{_BUFFER}|(bert\.)?pooler\.dense\..*|cls\.(predictions|seq_relationship)\..*"
)
#: what llama.cpp skips as well
HARMLESS_IN_GGUF: Final = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
#: the other senses of a vision-language model whose text part is taken
OTHER_MODALITIES: Final = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|mm_projector)\..*"
)

_HINTS: Final = (
    (r"lora_|adapter", "merge the adapter into the weights first"),
    (
        r"(weight|input|activation|[kv])_scale|qweight|qzeros|absmax|quant_map",
        "quantized weights are not read",
    ),
    (r"(^|\.)(score|classifier|classification_head|cls)\b", "a classifier is not a model that this exports"),
    (r"(^|\.)(v_head|value_head)\.", "a value head belongs to training; save the model without it"),
    (r"(^|\.)(mtp|nextn)\b", "save the model without its multi-token prediction layers"),
    (r"experts?\b|_exps\b", "mixtures of experts are not supported"),
    (r"cross_?attention|cross_attn", "cross-attention is not supported"),
    (r"vision|visual|^v\.|^mm\.|audio", "only text models are exported"),
    (r"\.bias$", "the graph has no place for this bias"),
    (r"norm", "the graph has no place for this norm"),
)


def refuse_leftovers(
    raw: RawTensors,
    names: Iterable[str],
    used: Collection[str],
    harmless: re.Pattern[str],
    where: str,
    *,
    blocks: int,
) -> None:
    """Raises CheckpointError naming up to three tensors of `names` that are neither used nor harmless.

    `blocks` is the number of blocks (layers) that the configuration has.
    """
    left = [name for name in names if name not in used and not harmless.fullmatch(name)]
    left = [name for name in left if not _is_zero_bias(raw, name)]
    if not left:
        return
    shown = ", ".join(repr(name[:_MAX_NAME_CHARS]) for name in left[:_NAMED])
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    raise CheckpointError(
        f"{where}: {len(left)} tensor{'s' if len(left) > 1 else ''} would not be used: {shown}{more}; "
        f"{_hint(left[0], blocks)}"
    )


def fill_missing_biases(
    raw: RawTensors, placements: Mapping[str, Placement], where: str
) -> tuple[dict[str, Placement], tuple[str, ...]]:
    """Placements in which q, k and v biases that are not stored count as zeros, and a warning if any do."""
    biases = [name for name in placements if name.endswith(".bias")]
    missing = [name for name in biases if not raw.has(placements[name].raw_name)]
    if not missing:
        return dict(placements), ()
    stored = next(placements[name].raw_name for name in biases if name not in missing)
    absent = placements[missing[0]].raw_name
    warning = (
        f"{where}: of {len(biases)} q, k and v biases {len(missing)} are not stored ({absent!r} …) and count "
        f"as zero; the others ({stored!r} …) are used"
    )
    filled = {name: replace(placements[name], zeros=True) for name in missing}
    return {**placements, **filled}, (warning,)


def _is_zero_bias(raw: RawTensors, name: str) -> bool:
    if not name.endswith(".bias"):
        return False
    try:
        shape = raw.shape(name)
        if len(shape) != 1 or shape[0] > _MAX_BIAS_ELEMENTS:
            return False
        return not raw.rows(name, 0, shape[0]).any().item()
    except CheckpointError:  # not of a weight's type: it cannot be judged, so it is named
        return False


def _hint(name: str, blocks: int) -> str:
    block = re.search(r"(?:^|\.)(?:blk|layers?|h)\.(\d+)\.", name)
    if block and int(block[1][:9]) >= blocks:
        return f"the configuration has {blocks} blocks"
    return next(
        (hint for pattern, hint in _HINTS if re.search(pattern, name)), "the graph has no place for them"
    )
