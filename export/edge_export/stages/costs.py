"""Models in the cost model's terms: what `check` and `plan` ask the board about."""

from __future__ import annotations

from typing import Final

from edge_export.model.config import DecoderConfig, EncoderConfig
from edge_export.plan.encoder import EncoderPlan
from edge_export.plan.plan import ExportPlan
from edge_reasoner.contract.bundle.manifest import Predicted
from edge_reasoner.contract.profile import DeviceProfile
from edge_reasoner.contract.profile.cost import GraphCost, predict, predict_encoder
from edge_reasoner.errors import CheckFailedError

_PREDICTED_PROMPT_TOKENS, _PREDICTED_NEW_TOKENS = 512, 128
#: of the text that an encoder's latency is predicted for
_PREDICTED_TEXT_TOKENS: Final = 128
#: Peak resident bytes per stored float16 byte: widened at load, packed, then partly freed. Measured with
#: MiniLM: 4.9 on onnxruntime 1.23.2, 2.7 on 1.31.1.
_FLOAT16_RESIDENT_RATIO: Final = 5.0


def check_size(weight_bytes: int, limit_mb: float | None) -> None:
    """Raises CheckFailedError where the weights alone are larger than the wanted bundle."""
    if limit_mb is not None and weight_bytes > limit_mb * 1e6:
        raise CheckFailedError(
            f"max_size_mb={limit_mb:g}: the weights alone take {weight_bytes / 1e6:.1f} MB;"
            " nothing was written"
        )


def decoder_cost(config: DecoderConfig, plan: ExportPlan) -> GraphCost:
    """A decoder's plan."""
    layer_parameters = sum(u.unit.parameters for u in plan.units if u.unit.layer is not None)
    gathered = sum(plan.unit_bytes(u) for u in plan.units if u.unit.kind == "embed")
    width = 2 if plan.kv_dtype == "float16" else 4
    quantized = any(u.format is not None for u in plan.units)
    return GraphCost(
        total_weight_bytes=plan.weight_bytes,
        streamed_weight_bytes=plan.weight_bytes - gathered,
        linear_macs_per_token=layer_parameters,
        head_macs=config.hidden_size * config.vocab_size,
        attention_macs_per_pair=sum(2 * layer.num_heads * layer.head_dim for layer in config.layers),
        kv_bytes_per_token=sum(2 * layer.num_kv_heads * layer.head_dim * width for layer in config.layers),
        context_tokens=plan.context_tokens,
        activation_bytes_per_token=4 * (8 * config.hidden_size + 3 * max(x.ffn_width for x in config.layers)),
        arithmetic="int8" if quantized else plan.compute,
    )


def encoder_cost(config: EncoderConfig, plan: EncoderPlan) -> GraphCost:
    """An encoder's plan."""
    weight_bytes = plan.weight_bytes
    word_bytes = next(weight.size_bytes for weight in plan.weights if weight.name == "embed.word.weight")
    hidden, ffn, layers = config.hidden_size, config.ffn_width, config.num_layers
    streamed = weight_bytes - word_bytes
    # The widest moment of a layer: the feed-forward's input and its values before and after GELU, or the
    # packed and the split q, k, v beside the residual and one row of attention weights for each head.
    widest = max(hidden + 2 * ffn, 8 * hidden + config.num_heads * config.context_tokens)
    return GraphCost(
        total_weight_bytes=weight_bytes,
        streamed_weight_bytes=streamed,
        linear_macs_per_token=layers * (4 * hidden * hidden + 2 * hidden * ffn),
        attention_macs_per_pair=layers * 2 * hidden,
        context_tokens=config.context_tokens,
        activation_bytes_per_token=4 * widest,
        arithmetic="int8" if plan.quantized else "float32",
        # The file stays mapped; matrices are kept a second time as the kernels want them.
        prepack_ratio=_FLOAT16_RESIDENT_RATIO if plan.widened else 1 + streamed / weight_bytes,
    )


def predicted_decoder(cost: GraphCost, board: DeviceProfile) -> Predicted:
    """A decoder's figures on the board, to four digits."""
    prompt = max(1, min(_PREDICTED_PROMPT_TOKENS, cost.context_tokens - _PREDICTED_NEW_TOKENS))
    found = predict(cost, board, prompt_tokens=prompt, new_tokens=_PREDICTED_NEW_TOKENS)
    joules = found.joules_per_token
    return Predicted(
        prefill_tps=_four_digits(found.prefill_tps),
        decode_tps=_four_digits(found.decode_tps),
        ttft_ms=_four_digits(found.ttft_ms),
        peak_rss_mb=_four_digits(found.peak_rss_mb),
        joules_per_token=None if joules is None else _four_digits(joules),
    )


def predicted_encoder(cost: GraphCost, board: DeviceProfile) -> Predicted:
    """An encoder's figures on the board, to four digits."""
    found = predict_encoder(cost, board, tokens=min(_PREDICTED_TEXT_TOKENS, cost.context_tokens))
    return Predicted(
        prefill_tps=_four_digits(found.tokens_per_s),
        ttft_ms=_four_digits(found.latency_ms),
        peak_rss_mb=_four_digits(found.peak_rss_mb),
    )


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")
