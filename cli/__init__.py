"""The command line, `mono-internvl COMMAND`, one file a command: a package of its own beside the library.

It is installed as `mono_internvl_cli`: importing anything of `mono_internvl` imports torch, transformers and the model.
Commands import the library when they run, by its name, so that help and wrong usage do not wait for it. What they need
before is repeated here, and a test holds it equal to the library's.

Exit status: 0, 2 for wrong usage, 1 for anything else, with one line on stderr that names the file and the reason.
stdout carries the answer alone; notes and progress go to stderr.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .attention import attention
from .benchmark import benchmark
from .chat import chat
from .common import report, set_debug, user_errors
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .expand import expand
from .export import export
from .inspect import inspect
from .merge import merge
from .serve import serve
from .tiles import tiles
from .tokenizer import tokenizer
from .train import train


class _Commands(TyperGroup):
    """Turns what a user can cause into one line and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except user_errors() as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            report(error)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MONO_INTERNVL_DEBUG", help="show tracebacks and warnings")
    ] = False,
) -> None:
    """Mono-InternVL, one decoder that sees and writes: chat with it and look inside."""
    set_debug(debug)


for _command in (chat, demo, serve, tiles, attention, inspect, tokenizer, evaluate, expand, convert, merge, benchmark):
    app.command()(_command)
app.add_typer(export, name="export")
# A recipe's keys are options too; `train` reads them itself.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)


def main() -> None:
    """Entry point of `mono-internvl` and of `python -m mono_internvl`."""
    app(prog_name="mono-internvl")
