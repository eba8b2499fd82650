"""How closely a graph must reproduce torch on the stored weights; each recipe's figure is in its row.

Figures are relative RMS errors of a position's logits: ‖got − expected‖ / ‖expected − mean(expected)‖.
Accuracy level 4 rounds activations to int8 per block, which alone costs 0.02 to 0.1 on the models tried; how
much depends on the model. Kernels that round a whole row with one scale are at 0.3 and beyond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from edge_export.plan.recipes import EXACT_LOGITS, RECIPES

#: float32 arithmetic on the stored weights: what the reference graph must reach.
EXACT = EXACT_LOGITS
#: What the fast graph must reach where it is exported, by recipe.
FAST: Mapping[str, float] = MappingProxyType({name: row.logit_tolerance for name, row in RECIPES.items()})
#: The device may deviate by as much again as this machine's kernels did, and by at least this.
_LEAST_DEVICE_TOLERANCE = 0.1


def device_tolerance(recipe: str, error: float) -> float:
    """The golden vectors' tolerance on a device, where the fast graph was off by `error` at export.

    In steps of 0.05, so that the last digits of one machine's kernels do not change a bundle's bytes.
    """
    wanted = max(_LEAST_DEVICE_TOLERANCE, math.ceil(2.0 * error * 20) / 20)
    return min(FAST[recipe], wanted)
