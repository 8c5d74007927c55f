"""VLMEvalKit's view of this model, with the paper's prompts; registered at run time, VLMEvalKit stays as it is.

    python -m mono_internvl.evaluation.vlmevalkit --model MODEL --data MMBench_TEST_EN ChartQA_TEST

runs VLMEvalKit with `MODEL` (a folder or Hub id; `nano` is the bundled one) in its list; all other options are its own.
In Python, `register(name, model_path)` does the same for a session.
"""

from __future__ import annotations

import functools
import inspect
import re
import string
import sys
from typing import Any

import pandas as pd
from vlmeval.config import supported_VLM
from vlmeval.dataset import DATASET_MODALITY, DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from ..common.models import load_model, resolve_model
from .settings import CHOICE, SHORT, Parts, ask, choice_ending, setting_for


class MonoInternVLForVLMEvalKit(BaseModel):
    """Answers a benchmark's questions one by one, greedily."""

    INTERLEAVE = True
    VIDEO_LLM = False

    def __init__(
        self, model_path: str | None = None, device: str = "auto", dtype: str = "auto", use_vllm: bool = False
    ):
        super().__init__()
        if use_vllm:  # what VLMEvalKit passes on to models with certain names
            raise ValueError("use_vllm: this adapter runs the model itself; leave the option out")
        self.model, self.processor = load_model(resolve_model(model_path), device=device, dtype=dtype)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Ours where the paper has an ending, or the benchmark is of a kind that it has one for."""
        if DATASET_MODALITY(dataset) == "VIDEO":
            return False
        return setting_for(dataset).ending is not None or DATASET_TYPE(dataset) in ("MCQ", "Y/N")

    def build_prompt(self, line: pd.Series, dataset: str) -> list[dict[str, str]]:
        """Hint, question and options of a row, and the ending. Pictures stand where the row has `<image 1>`, as in
        VLMEvalKit's own prompts; those that it does not name stand first."""

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
        texts = re.split(r"<image (\d+)>", question + ending)
        named = [int(number) for number in texts[1::2]]
        if not all(1 <= number <= len(paths) for number in named):
            texts, named = [question + ending], []
        message = [{"type": "image", "value": path} for i, path in enumerate(paths, 1) if i not in named]
        for i, text in enumerate(texts):
            message.append(
                {"type": "image", "value": paths[int(text) - 1]} if i % 2 else {"type": "text", "value": text}
            )
        return [part for part in message if part["value"]]

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Pictures and texts of a message, in their order -> the answer.

        A message is one turn: what a benchmark calls a system prompt or the beginning of an answer is text of it.

        Raises:
            ValueError: a part that is neither picture nor text, or a question that cannot be asked; names the benchmark
                and the question.
        """
        name = dataset or ""
        text = " ".join(str(part["value"]) for part in message if part["type"] == "text")
        try:
            if unknown := [part["type"] for part in message if part["type"] not in ("image", "text")]:
                raise ValueError(f"a part of type {unknown[0]!r} is not supported; give pictures (frames) and text")
            parts: Parts = [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["value"]}
                for part in message
            ]
            return ask(
                self.model,
                self.processor,
                [part["value"] for part in message if part["type"] == "image"],
                parts,
                name,
                video=bool(name) and DATASET_MODALITY(name) == "VIDEO",
            )
        except (ValueError, OSError, TypeError) as error:
            raise ValueError(f"{name or 'no benchmark'}, {text[:80]!r}: {error}") from error


def register(name: str, model_path: str | None = None, **options: Any) -> None:
    """Add a model to VLMEvalKit's list under `name`; options are those of `MonoInternVLForVLMEvalKit`.

    Raises:
        TypeError: an option that it does not have.
    """
    inspect.signature(MonoInternVLForVLMEvalKit).bind(model_path, **options)
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
        register(name, model)
    sys.argv = ["vlmeval", *arguments[:start], *names, *arguments[end:]]
    run.load_env()
    run.main()


if __name__ == "__main__":
    main(sys.argv[1:])
