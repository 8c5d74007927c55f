"""`mono-internvl merge ADAPTER OUT`: a LoRA folder and its base as one folder, for engines that take no adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import check_dtype, load_model, note, status


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="folder that training or PEFT wrote")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make")],
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="auto (the base's), bfloat16, float32")] = "auto",
) -> None:
    """Add a LoRA adapter's weights to its base's and write the whole model."""
    check_dtype(dtype)
    with status("loading"):
        from mono_internvl.common.models import DTYPES, ModelError, base_of_adapter, load_config, resolve_model
    folder = resolve_model(adapter)
    base = base_of_adapter(folder)
    if base is None:
        raise ModelError(f"{adapter} is not a LoRA folder: it has no adapter_config.json")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder")
    stored = DTYPES[dtype] or load_config(base).dtype
    # Added in float32, rounded once.
    model, processor = load_model(folder, device="cpu", dtype="float32")
    with status("writing"):
        model = model.to(stored) if stored is not None else model  # type: ignore[arg-type]
        model.save_pretrained(out)
        processor.save_pretrained(out)
    note(f"{folder} merged into {base}, written to {out}")
