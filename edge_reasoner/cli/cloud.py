"""`edge-reasoner cloud`: the reference cloud, an unpruned, unquantized model behind the OpenAI protocol."""

from __future__ import annotations

import os

import click

from edge_reasoner.cli.options import context_option, open_machine, threads_option
from edge_reasoner.cli.output import note, waiting
from edge_reasoner.errors import InputError


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=9000, show_default=True, help="0: any free port.")
@click.option("--name", help="What clients call the model. Default: its own name.")
@click.option(
    "--auth-token-env", metavar="VAR", help="The environment variable with the bearer token to demand."
)
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="A further host name that clients call it by (repeatable; '*': any).",
)
@threads_option
@context_option
def cloud(
    model: str,
    host: str,
    port: int,
    name: str | None,
    auth_token_env: str | None,
    allow_hosts: tuple[str, ...],
    threads: int | None,
    context_tokens: int | None,
) -> None:
    """Serve MODEL to `--cloud` and any OpenAI client.

    MODEL is a bundle (directory or .tar), a .gguf file or a Hugging Face directory.
    A checkpoint is first exported in fp32, once. Prints `listening on http://HOST:PORT/v1` on standard error
    when it answers; Ctrl-C ends it.
    """
    from edge_reasoner.server.reference_export import reference_bundle

    try:
        from edge_reasoner.server.reference import ReferenceModel, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "h11"):
            raise
        raise InputError(f"serving needs {error.name}; install edge-reasoner[server]") from error
    if not 0 <= port <= 65535:
        raise InputError(f"--port: {port} is not allowed; give 0 (any free port) to 65535")
    token = _token(auth_token_env)
    machine = open_machine(threads)
    path = reference_bundle(model, machine.cache_dir, say=note)
    with waiting(f"opening {path} …"):
        served = ReferenceModel.open(
            path,
            threads=machine.threads,
            context_tokens=context_tokens,
            cache_dir=machine.cache_dir,
            name=name,
        )
    serve(
        served,
        host=host,
        port=port,
        auth_token=token,
        allow_hosts=allow_hosts,
        ready=lambda url: note(f"listening on {url}"),
    )


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not token:
        raise InputError(f"--auth-token-env: the environment variable {variable} is not set")
    return token
