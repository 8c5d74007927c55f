"""`mono-internvl tokenizer tokenizer.model OUT`: InternLM2's SentencePiece file -> `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import progress_bar


def tokenizer(
    model_file: Annotated[
        Path, typer.Argument(metavar="TOKENIZER.MODEL", help="SentencePiece file of an InternLM2 model")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder for tokenizer.json and tokenizer_config.json")],
    force: Annotated[bool, typer.Option("--force", help="overwrite a tokenizer.json")] = False,
) -> None:
    """Build the fast tokenizer of a SentencePiece file."""
    target = out / "tokenizer.json"
    if model_file.is_dir():
        raise ValueError(f"{model_file} is a folder; give the tokenizer.model in it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; OUT is a folder")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; --force overwrites it")
    from mono_internvl.tokenization import convert_tokenizer

    with progress_bar("pieces") as update:
        built = convert_tokenizer(model_file, out, progress=update)
    typer.echo(f"{built.get_vocab_size():,} tokens -> {target}")
