"""Every error this project raises on purpose.

    EdgeReasonerError                 exit status 1
    ├── InputError                    2  what the user gave cannot be used: what, where, what is allowed
    │   ├── ProfileError              2  a device profile is unknown or malformed
    │   ├── CheckpointError           2  a model file is missing, corrupt or of an unsupported family
    │   ├── BundleError               2  a bundle is missing, corrupt, or not what its manifest says
    │   ├── TemplateError             2  a chat template is malformed, hostile or not applicable
    │   ├── PrivacyVetoError          2  the owner's rules keep a request from being sent
    │   └── ContextOverflowError      2  a prompt does not fit the context
    ├── CheckFailedError              3  a quality, size or target check failed; nothing was written
    │   ├── TargetError               3  the board cannot take this model or these operators
    │   └── VerificationError         3  a graph does not reproduce its reference
    ├── CloudError                    4  the cloud endpoint was needed and did not serve
    │   ├── CloudUnavailableError     4  unreachable, timed out, reset, or asked us to back off for too long
    │   └── CloudProtocolError        4  it answered, but not in the agreed protocol
    │       └── NoAnswerError         4  it thought, and did not come to an answer
    ├── OverloadedError               1  too many requests wait already: ask again later
    └── BackendError                  1  the inference library failed on a graph that passed every check

Third-party exceptions are mapped to these once, at the seam that calls the library, with `raise … from`.
The command line prints `one_line(error)` and exits with `exit_status`.
"""

from __future__ import annotations

import re
from typing import ClassVar

#: what steers a terminal or hides text: controls (C0, DEL, C1) but tab and newline, overrides of the writing
#: direction. Every escape sequence begins with one of these, so that none is left whole.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LINE_ENDS = re.compile("\u2028|\u2029")
_MAX_LINE_CHARS = 300
_MAX_VALUE_CHARS = 80


def printable(text: str) -> str:
    """`text` from a stranger, fit for a terminal: without control characters and direction overrides.

    They become U+FFFD, so that nothing is hidden; carriage returns vanish; U+2028 and U+2029 become newlines.
    Each character is judged by itself: a text may come in pieces.
    """
    return _UNSAFE.sub("\ufffd", _LINE_ENDS.sub("\n", text.replace("\r", "")))


def one_line(said: object, max_chars: int = _MAX_LINE_CHARS) -> str:
    """What an exception (or a text) says, in one printable line of at most `max_chars`.

    An exception that says nothing gives its type's name.
    """
    text = _UNSAFE.sub(" ", str(said)[: 20 * max_chars])
    line = " ".join(text.split())
    if not line and isinstance(said, BaseException):
        line = type(said).__name__
    return line if len(line) <= max_chars else f"{line[: max_chars - 1]}…"


def shown(value: object, max_chars: int = _MAX_VALUE_CHARS) -> str:
    """A value that is refused, as Python writes it, in one printable line of at most `max_chars`."""
    if isinstance(value, (str, bytes)):
        value = value[:max_chars]
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return one_line(text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8"), max_chars)


class EdgeReasonerError(Exception):
    """Base of all errors raised on purpose; `exit_status` is the command line's exit status."""

    exit_status: ClassVar[int] = 1


class InputError(EdgeReasonerError):
    """What the user gave cannot be used. The message says what, where and what is allowed."""

    exit_status = 2


class ProfileError(InputError):
    """A device profile is unknown or malformed."""


class CheckpointError(InputError):
    """A model file is missing, truncated, corrupt or of an unsupported family."""


class BundleError(InputError):
    """A bundle is missing, corrupt, or not what its manifest says."""


class TemplateError(InputError):
    """A chat template is malformed, hostile or not applicable to the messages."""


class PrivacyVetoError(InputError):
    """The owner's rules keep a request from being sent: the message names them, and nothing of its text."""


class ContextOverflowError(InputError):
    """A prompt does not fit the model's context."""


class CheckFailedError(EdgeReasonerError):
    """A quality, size or target check failed; nothing was written."""

    exit_status = 3


class TargetError(CheckFailedError):
    """The board cannot take this model, these operators or this precision."""


class VerificationError(CheckFailedError):
    """A graph does not reproduce its reference within the stated tolerance."""


class CloudError(EdgeReasonerError):
    """The cloud endpoint was needed and did not serve."""

    exit_status = 4


class CloudUnavailableError(CloudError):
    """The endpoint is unreachable, timed out, reset the connection or asked us to back off for too long."""


class CloudProtocolError(CloudError):
    """The endpoint answered, but not in the agreed protocol."""


class NoAnswerError(CloudProtocolError):
    """The endpoint's model thought, and its tokens were over before an answer came."""


class OverloadedError(EdgeReasonerError):
    """Too many requests wait for the model already; the same request may succeed later."""


class BackendError(EdgeReasonerError):
    """The inference library failed on a graph that passed every check."""
