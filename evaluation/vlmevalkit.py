"""VLMEvalKit's view of this model, with the paper's prompts; registered at run time, VLMEvalKit stays as it is.

    python -m mono_internvl.evaluation.vlmevalkit --model MODEL --data MMBench_TEST_EN ChartQA_TEST

runs VLMEvalKit with `MODEL` (a folder or Hub id; `nano` is the bundled one) in its list; all other options are its own.
In Python, `register(name, model_path)` does the same for a session.
"""

from __future__ import annotations

import functools
import string
import sys
from typing import Any

import pandas as pd
from vlmeval.config import supported_VLM
from vlmeval.dataset import DATASET_MODALITY, DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from ..cli.common import load_model, resolve_model
from .settings import CHOICE, SHORT, ask, choice_ending, setting_for


class MonoInternVLForVLMEvalKit(BaseModel):
    """Answers a benchmark's questions one by one, greedily."""

    INTERLEAVE = True
    VIDEO_LLM = False

    def __init__(self, model_path: str | None = None, device: str = "auto", dtype: str = "auto", **kwargs: Any):
        super().__init__()
        self.model, self.processor = load_model(resolve_model(model_path), device=device, dtype=dtype)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Ours where the paper has an ending, or the benchmark is of a kind that it has one for."""
        if DATASET_MODALITY(dataset) == "VIDEO":
            return False
        return setting_for(dataset).ending is not None or DATASET_TYPE(dataset) in ("MCQ", "Y/N")

    def build_prompt(self, line: pd.Series, dataset: str) -> list[dict[str, str]]:
        """Hint, question and options of a row, and the ending; the row's pictures first."""

        def cell(name: str) -> str:
            return "" if name not in line or pd.isna(line[name]) else str(line[name])

        options = {letter: cell(letter) for letter in string.ascii_uppercase if cell(letter)}
        lines = [cell("hint"), cell("question"), *(f"{letter}. {text}" for letter, text in options.items())]
        question = "\n".join(text for text in lines if text)
        ending = setting_for(dataset).ending
        if ending is None or ending in (SHORT, CHOICE):
            ending = choice_ending(question) if options else SHORT
        paths = self.dump_image(line, dataset)
        paths = [paths] if isinstance(paths, str) else paths
        return [*({"type": "image", "value": path} for path in paths), {"type": "text", "value": question + ending}]

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Pictures and texts of a message -> the answer."""
        name = dataset or ""
        return ask(
            self.model,
            self.processor,
            [part["value"] for part in message if part["type"] == "image"],
            "\n".join(part["value"] for part in message if part["type"] == "text"),
            name,
            video=bool(name) and DATASET_MODALITY(name) == "VIDEO",
        )


def register(name: str, model_path: str | None = None, **options: Any) -> None:
    """Add a model to VLMEvalKit's list under `name`."""
    supported_VLM[name] = functools.partial(MonoInternVLForVLMEvalKit, model_path=model_path, **options)


def main(arguments: list[str]) -> None:
    """Register what `--model` names and hand over to VLMEvalKit's own command."""
    from vlmeval import run

    start = arguments.index("--model") + 1 if "--model" in arguments else len(arguments)
    end = next((i for i in range(start, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    if start >= end:
        raise SystemExit("error: --model MODEL is needed: a folder, a Hub id, or nano")
    # VLMEvalKit makes files of these names.
    names = [model.strip("/").replace("/", "--") for model in arguments[start:end]]
    for name, model in zip(names, arguments[start:end], strict=True):
        register(name, None if model == "nano" else model)
    sys.argv = ["vlmeval", *arguments[:start], *names, *arguments[end:]]
    run.load_env()
    run.main()


if __name__ == "__main__":
    main(sys.argv[1:])
