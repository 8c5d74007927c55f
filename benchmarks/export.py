"""Exporting a model of the released size as GGUF: memory, and time against a plain copy of the same bytes.

    python -m mono_internvl.benchmarks.export FOLDER --tokenizer tokenizer.model [--type bf16 --type q8_0] [--rounds 2]

Makes a random Mono-InternVL-2B in FOLDER (6.2 GB, by way of a dense one of 3.8 GB), exports it in each type and copies
the result, in turns; both end with fsync. Needs 20 GB of disk; cleans up. Prints JSON.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .conversion import copy_folder, make_dense, run_command


def main(
    folder: Annotated[Path, typer.Argument(help="where to work; made, and removed at the end")],
    tokenizer: Annotated[Path, typer.Option(help="InternLM2's tokenizer.model")],
    types: Annotated[
        list[str] | None, typer.Option("--type", help="types to write  [default: bf16, q8_0, q4_0]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="exports of each type, each with a copy")] = 2,
) -> None:
    """Measure `export gguf` at the released size."""
    if folder.exists():
        raise typer.BadParameter(f"{folder} exists", param_hint="FOLDER")
    dense, model, made, copied = (folder / name for name in ("dense", "model", "gguf", "copy"))
    try:
        make_dense(dense)
        shutil.copyfile(tokenizer, dense / "tokenizer.model")
        run_command("expand", str(dense), str(model), "--no-verify")
        shutil.rmtree(dense)
        results: list[dict[str, Any]] = []
        for kind in types or ["bf16", "q8_0", "q4_0"]:
            for _ in range(rounds):
                measured = run_command("export", "gguf", str(model), str(made), "--type", kind)
                sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
                seconds = copy_folder(made, copied)
                results.append(
                    {
                        "type": kind,
                        "bytes": sizes,
                        "export_seconds": measured["seconds"],
                        "copy_seconds": seconds,
                        "ratio": measured["seconds"] / seconds,
                        "peak_gb": measured["peak_bytes"] / 1e9,
                    }
                )
                shutil.rmtree(copied)
                shutil.rmtree(made)
        typer.echo(json.dumps(results, indent=2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
