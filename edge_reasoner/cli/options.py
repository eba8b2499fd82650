"""Options that several commands share, and the `Reasoner` that they describe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from edge_reasoner.cli.output import waiting
from edge_reasoner.cloud import DEFAULT_PROTOCOL, ProtocolName
from edge_reasoner.errors import InputError

if TYPE_CHECKING:
    from edge_reasoner.chat.params import SamplingParams
    from edge_reasoner.cloud.base import CloudPrice
    from edge_reasoner.contract.bundle.open import Bundle
    from edge_reasoner.query.assemble import Machine
    from edge_reasoner.reasoner import Reasoner

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

#: A prompt or a line of a chat larger than this is refused before it is read to its end.
MAX_PROMPT_BYTES = 16 * 1024 * 1024

bundle_argument = click.argument("bundle", type=click.Path())
threads_option = click.option(
    "--threads", type=int, help="Threads of one inference. Default: what this process may use, at most 8."
)
context_option = click.option(
    "--context-tokens", type=int, help="Room for prompt and answer together, in tokens."
)

_CLOUD = (
    click.option("--cloud", "cloud_url", metavar="URL", help="The endpoint to escalate to, http://…/v1."),
    click.option("--cloud-model", metavar="NAME", help="The model to ask for there. Default: its first."),
    click.option(
        "--cloud-protocol",
        "protocol",
        type=click.Choice(get_args(ProtocolName)),
        default=DEFAULT_PROTOCOL,
        show_default=True,
        help="What the endpoint speaks.",
    ),
    click.option(
        "--api-key-env",
        metavar="VAR",
        default="OPENAI_API_KEY",
        show_default=True,
        help="The environment variable that holds the API key.",
    ),
    click.option("--usd-per-mtok-in", type=float, help="The cloud's price of a million prompt tokens."),
    click.option("--usd-per-mtok-out", type=float, help="The cloud's price of a million answer tokens."),
)
_SAMPLING = (
    click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest answer, in tokens."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, help="Keep the k likeliest tokens; 0: off."),
    click.option("--top-p", type=float, default=1.0, help="Keep the likeliest tokens of this mass; 1: off."),
    click.option("--min-p", type=float, default=0.0, help="Least share of the top's probability; 0: off."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="Ends the answer; may be given several times."
    ),
)


def mode_option(*choices: str, default: str = "auto") -> Decorator:
    """`--mode` with those choices."""
    return click.option(
        "--mode", type=click.Choice(choices), default=default, show_default=True, help="Who may answer."
    )


def cloud_options(function: Function) -> Function:
    """Adds `--cloud` and what belongs to it."""
    return _add(function, _CLOUD)


def sampling_options(function: Function) -> Function:
    """Adds the options of `SamplingParams`."""
    return _add(function, _SAMPLING)


def _add(function: Function, options: tuple[Any, ...]) -> Function:
    for option in reversed(options):
        function = option(function)
    return function


def take_sampling(options: dict[str, Any]) -> SamplingParams:
    """Takes the sampling options out of a command's options. Raises InputError for illegal values."""
    from edge_reasoner.chat.params import SamplingParams

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    return SamplingParams(**{name: options.pop(name) for name in names})


def open_reasoner(bundle: str | Bundle, *, mode: str, options: dict[str, Any]) -> Reasoner:
    """Opens the bundle as the cloud and machine options say. Raises as `Reasoner.open` does."""
    from edge_reasoner.reasoner import Reasoner

    price = _price(options.get("usd_per_mtok_in"), options.get("usd_per_mtok_out"))
    if mode == "cloud" and options.get("cloud_url") is None:
        raise InputError("--mode cloud: no cloud is given; add --cloud URL")
    place = bundle if isinstance(bundle, str) else bundle.root
    with waiting(f"opening {place} (the first time on a machine also tests its kernels) …"):
        return Reasoner.open(
            bundle,
            options.get("cloud_url"),
            cloud_model=options.get("cloud_model"),
            protocol=options.get("protocol") or DEFAULT_PROTOCOL,
            api_key_env=options.get("api_key_env"),
            price=price,
            mode=mode,
            threads=options.get("threads"),
            context_tokens=options.get("context_tokens"),
        )


def open_bundle_given(bundle: str, machine: Machine, verify: Literal["full", "sizes"] = "full") -> Bundle:
    """The bundle that a command names, a directory or a .tar. Raises BundleError."""
    from edge_reasoner.activation.opening import open_bundle_at

    return open_bundle_at(bundle, machine.cache_dir, verify)


def open_machine(threads: int | None) -> Machine:
    """The machine at hand with that many threads (default: what this process may use). Raises InputError."""
    from edge_reasoner.machine.cache_dir import default_cache_dir
    from edge_reasoner.query.assemble import Machine, default_threads

    if threads is not None and threads < 1:
        raise InputError(f"--threads: {threads} is not allowed; give 1 or more")
    return Machine(threads=threads or default_threads(), cache_dir=default_cache_dir(os.environ))


def check_text(text: str, what: str) -> str:
    """`text`, as typed on the command line, if it is UTF-8 (whatever the locale) and not blank. Raises
    InputError."""
    try:
        text = os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise InputError(f"{what}: not valid UTF-8 at {_place(error)}") from error
    if not text.strip():
        raise InputError(f"{what}: empty; give the text to answer")
    return text


def read_standard_input(what: str) -> str:
    """All of standard input, without its last newline. Raises InputError: too large, or not UTF-8."""
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    return decode_prompt(data, what).removesuffix("\n").removesuffix("\r")


def decode_prompt(data: bytes, what: str) -> str:
    """`data` as UTF-8, without a byte order mark. Raises InputError: too large, or not UTF-8."""
    from edge_reasoner.files import decode_text

    if len(data) > MAX_PROMPT_BYTES:
        raise InputError(f"{what}: more than {MAX_PROMPT_BYTES} bytes; that is the most allowed")
    return decode_text(data, what)


def _price(input_usd: float | None, output_usd: float | None) -> CloudPrice | None:
    from edge_reasoner.cloud.base import CloudPrice

    if input_usd is None and output_usd is None:
        return None
    values = (input_usd or 0.0, output_usd or 0.0)
    if not all(0 <= value < 1e6 for value in values):
        raise InputError("--usd-per-mtok-in/-out: give dollars of 0 or more")
    return CloudPrice(*values)


def _place(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start}"
    return f"character {error.start}" if isinstance(error, UnicodeEncodeError) else "an unknown place"
