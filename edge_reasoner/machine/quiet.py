"""Nothing leaves the device by itself: turns off what libraries would send or note about their users.

onnxruntime 1.29 and newer write a device id and an event store under the user's cache folder and look up a
vendor's host as soon as they are imported; only the environment stops that, set before the import. Child
processes inherit it.
"""

from __future__ import annotations

from collections.abc import MutableMapping

#: Read by onnxruntime while it is imported, and by huggingface_hub likewise.
QUIET_VARIABLES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def silence_telemetry(environment: MutableMapping[str, str]) -> None:
    """Sets what turns telemetry off, whatever it was before; to be called before the libraries are imported.

    `environment` is `os.environ`, or what a child process is given.
    """
    environment.update(QUIET_VARIABLES)
