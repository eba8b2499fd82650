"""Which onnxruntime session options a bundle may set.

A bundle is untrusted, and some options name files to read or write (`session.optimized_model_filepath`,
external initializer folders): only listed keys and values pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_reasoner.errors import BundleError

_SWITCH = range(2)
#: key -> allowed integer values
ALLOWED_SESSION_OPTIONS: Mapping[str, range] = {
    "mlas.disable_kleidiai": _SWITCH,
    "mlas.enable_gemm_fastmath_arm64_bfloat16": _SWITCH,
    "mlas.qnbit.force_fp32": _SWITCH,
    "mlas.use_lut_gemm": _SWITCH,
    "optimization.enable_gelu_approximation": _SWITCH,
    "session.disable_prepacking": _SWITCH,
    "session.dynamic_block_base": range(65),
    "session.force_spinning_stop": _SWITCH,
    "session.intra_op.allow_spinning": _SWITCH,
    "session.intra_op.spin_duration_us": range(100_001),
    "session.qdq_matmulnbits_accuracy_level": range(5),
    "session.set_denormal_as_zero": _SWITCH,
    "session.x64quantprecision": _SWITCH,
}


def check_session_options(options: Mapping[str, str], where: str) -> None:
    """Raises BundleError unless every option is allowed and its value in range."""
    for key, value in options.items():
        allowed = ALLOWED_SESSION_OPTIONS.get(key)
        if allowed is None:
            keys = ", ".join(ALLOWED_SESSION_OPTIONS)
            raise BundleError(f"{where}: session option {key[:100]!r} is not allowed; allowed: {keys}")
        if not (value.isascii() and value.isdigit() and len(value) <= 6 and int(value) in allowed):
            bounds = f"{allowed.start} … {allowed.stop - 1}"
            raise BundleError(f"{where}: session option {key}: {value[:100]!r} is not in {bounds}")
