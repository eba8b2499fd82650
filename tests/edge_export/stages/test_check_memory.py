"""check: the exporter's own machine must hold one layer."""

from __future__ import annotations

import pytest
from support.tiny_checkpoints import write_checkpoint

from edge_export.checkpoint.load import load_checkpoint
from edge_export.stages.check import require_memory_here
from edge_reasoner.errors import InputError


def test_a_machine_that_cannot_hold_one_layer_is_refused(tmp_path):
    """The largest layer in float32 decides, whatever the number of layers; unknown memory is no reason."""
    write_checkpoint(tmp_path, num_hidden_layers=3)
    config = load_checkpoint(tmp_path).config
    require_memory_here(config, None)
    require_memory_here(config, 1 << 30)
    with pytest.raises(InputError, match=r"one layer takes .* GB while it is exported"):
        require_memory_here(config, 1000)
