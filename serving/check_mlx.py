"""Does mlx-vlm answer as `generate` does? One script, run in mlx-vlm's environment.

    python -m mono_internvl.serving.check_mlx               # every model
    python -m mono_internvl.serving.check_mlx nano          # one; see --help for the names
    python -m mono_internvl.serving.check_mlx precision     # not part of "every": the nano in bfloat16, 8 and 4 bits

Models: those of `check_vllm` (the bundled nano, a random one in the official layout, a random one of 1.5) and a
random one whose tiles have another size than its position table. Each is exported in float32, loaded by mlx-vlm from
that folder alone, and asked the same thirty requests, with the prompt as a whole and in chunks of 64 tokens; those of
one picture once more in one batch. Greedy answers must equal `generate`'s, and those of a model whose visual experts
are replaced by the text experts must not.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..export.mlx import export_mlx
from ..processing_mono_internvl import MonoInternVLProcessor
from .check_vllm import NEW_TOKENS, CheckFailed, Request, make_folder, mixed_requests, reference, require


CHUNK = 64
MODELS = ("nano", "official", "experts", "table")
PRECISIONS = ("bfloat16", "8 bits", "4 bits")


def make_model(name: str, folder: Path) -> Path:
    """The model to check, in a layout of ours or the official one."""
    if name != "table":
        return make_folder(name, folder)
    make_folder("experts", folder)
    processor = MonoInternVLProcessor.from_pretrained(folder)
    processor.image_processor.tile_size = 168
    processor.save_pretrained(folder)
    return folder


class Runtime:
    """mlx-vlm with a folder that was exported for it, used as its documentation says."""

    def __init__(self, folder: Path):
        from mlx_vlm import load

        self.model, self.processor = load(str(folder))

    def answer(self, request: Request, **options: Any) -> list[int]:
        """The ids of a greedy answer, its end included."""
        from mlx_vlm import generate
        from mlx_vlm.prompt_utils import apply_chat_template

        pictures = request.pictures
        # mlx-vlm takes the spaces off the ends of a text that is a part alone, and none off a string.
        messages = [
            {**message, "content": message["content"][0]["text"]} if len(message["content"]) == 1 else message
            for message in request.messages
        ]
        prompt = apply_chat_template(self.processor, self.model.config, messages, num_images=len(pictures))
        made = generate(self.model, self.processor, prompt, list(pictures), max_tokens=NEW_TOKENS, **options)
        return list(made.token_ids)

    def answer_together(self, requests: list[Request]) -> list[str]:
        """The texts of greedy answers to requests of one message and one picture, in one batch."""
        from mlx_vlm.generate import batch_generate

        prompts = [request.messages[0]["content"][-1]["text"] for request in requests]
        pictures = [picture for request in requests for picture in request.pictures]
        return batch_generate(
            self.model, self.processor, pictures, prompts=prompts, max_tokens=NEW_TOKENS, group_by_shape=False
        ).texts

    def text(self, ids: list[int]) -> str:
        """As mlx-vlm writes an answer's ids, without their end."""
        writer = self.processor.detokenizer
        writer.reset()
        for token in ids:
            if token not in self.model.config.eos_token_id:
                writer.add_token(token)
        writer.finalize()
        return writer.text


def check_model(name: str, folders: Path) -> str:
    """The verdict on a model; CheckFailed says what differs."""
    folder, requests = make_model(name, folders / name), mixed_requests()
    expected = reference(folder, requests)
    wrong = reference(folder, requests, visual_experts=False)
    runtime = Runtime(export_mlx(folder, folders / f"{name}-mlx", dtype="float32").folder)
    for how, step in (("whole", 4096), (f"in chunks of {CHUNK}", CHUNK)):
        found = [runtime.answer(request, prefill_step_size=step) for request in requests]
        off = [request.name for request, a, b in zip(requests, found, expected, strict=True) if a != b]
        require(not off, f"{name}, prompts {how}: {len(off)} of {len(requests)} differ from generate: {', '.join(off)}")
    with_pictures = [i for i, request in enumerate(requests) if request.pictures]
    differing = sum(found[i] != wrong[i] for i in with_pictures)
    require(2 * differing > len(with_pictures), f"{name}: visual experts decide only {differing} of the answers")
    single = [i for i, request in enumerate(requests) if len(request.pictures) == 1 == len(request.messages)]
    together = runtime.answer_together([requests[i] for i in single])
    off = [requests[i].name for i, text in zip(single, together, strict=True) if text != runtime.text(expected[i])]
    require(not off, f"{name}, one batch: {len(off)} of {len(single)} differ from generate: {', '.join(off)}")
    return (
        f"{len(requests)} requests equal generate, whole and in chunks, {len(single)} of them also in one batch; "
        f"{differing} of {len(with_pictures)} picture answers differ without visual experts"
    )


def check_precision(folders: Path) -> str:
    """How many answers of the nano are still those of float32."""
    from mlx_vlm.convert import convert

    folder, requests = make_model("nano", folders), mixed_requests()
    expected, counts = reference(folder, requests), []
    plain = export_mlx(folder, folders / "bfloat16", dtype="bfloat16").folder
    for precision in PRECISIONS:
        made = plain
        if precision != "bfloat16":
            made = folders / precision
            convert(str(plain), str(made), quantize=True, q_bits=int(precision.split()[0]), q_group_size=64)
        runtime = Runtime(made)
        equal = sum(runtime.answer(request) == ids for request, ids in zip(requests, expected, strict=True))
        counts.append(f"{precision}: {equal} of {len(requests)}")
    return "answers equal to float32: " + ", ".join(counts)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    checks: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(MODELS)}; precision")] = None,
) -> None:
    """Check that mlx-vlm answers as `generate` does."""
    known = [*MODELS, "precision"]
    if unknown := [name for name in checks or [] if name not in known]:
        raise typer.BadParameter(f"{', '.join(unknown)} not known; allowed are {', '.join(known)}")
    failed = False
    with tempfile.TemporaryDirectory() as folders:
        for name in checks or MODELS:
            start = time.monotonic()
            try:
                run = check_precision(Path(folders)) if name == "precision" else check_model(name, Path(folders))
                verdict = f"ok      {name}: {run}"
            except CheckFailed as error:
                failed, verdict = True, f"FAILED  {name}: {error}"
            typer.echo(f"{verdict} [{time.monotonic() - start:.0f} s]")
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    app()
