"""TRL's tests of its trainers on models that see: SFT, DPO, KTO, GRPO and RLOO, on a tiny model, one tile a picture.

Their models and data sets lie on the Hub; a model of ours stands under each name that they ask for, and rows of the
same columns are made here.
"""

import importlib
import importlib.util
import os
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from nano import nano_folder, tiny_config
from PIL import Image as Pictures
from transformers import AutoTokenizer, TrainingArguments

from mono_internvl import MonoInternVLForCausalLM, MonoInternVLImageProcessor, MonoInternVLProcessor


# By these names upstream knows the models of its tests; a folder of that name is found before the Hub is asked.
QWEN = "trl-internal-testing/tiny-Qwen2_5_VLForConditionalGeneration"
GEMMA = "trl-internal-testing/tiny-Gemma3ForConditionalGeneration"
OURS = "tiny-that-sees"


def make_model() -> None:
    if os.path.isdir(OURS):
        return
    tokenizer = AutoTokenizer.from_pretrained(nano_folder())
    torch.manual_seed(0)
    model = MonoInternVLForCausalLM(tiny_config(tokenizer))
    images = MonoInternVLImageProcessor(tile_size=56, max_tiles=1)
    processor = MonoInternVLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    for name in (OURS, QWEN, GEMMA):
        model.save_pretrained(name)
        processor.save_pretrained(name)


QUESTIONS = ["What is red?", "What is round?", "How many are there?", "Where is it?", "Which one is left?", "Is it on?"]
ANSWERS = ["The square.", "A ball.", "Three of them.", "Below the other one.", "The blue one.", "No, it is not."]
OTHERS = ["The sky.", "A box.", "None.", "In the middle.", "All of them.", "Yes."]


def rows(config: str, pictures: int) -> dict[str, list]:
    """The columns of a TRL data set; its name says the form (conversational or not) and what the columns are for."""
    form, _, kind = config.partition("_")

    def text(role: str, words: str, marks: int = 0):
        if form == "standard":
            return words
        if not pictures:
            return [{"role": role, "content": words}]
        parts = [{"type": "image", "text": None}] * marks + [{"type": "text", "text": words}]
        return [{"role": role, "content": parts if pictures > 1 else words}]

    counts = [1 + i % pictures if pictures else 0 for i in range(len(QUESTIONS))]
    prompts = [text("user", words, count) for words, count in zip(QUESTIONS, counts, strict=True)]
    answers, others = ([text("assistant", words) for words in column] for column in (ANSWERS, OTHERS))
    columns: dict[str, list] = {
        "language_modeling": lambda: {
            "text" if form == "standard" else "messages": [a + b for a, b in zip(prompts, answers, strict=True)]
        },
        "prompt_only": lambda: {"prompt": prompts},
        "prompt_completion": lambda: {"prompt": prompts, "completion": answers},
        "preference": lambda: {"prompt": prompts, "chosen": answers, "rejected": others},
        "unpaired_preference": lambda: {
            "prompt": prompts,
            "completion": [answers[i] if i % 2 else others[i] for i in range(len(prompts))],
            "label": [bool(i % 2) for i in range(len(prompts))],
        },
    }[kind]()
    generator = np.random.default_rng(0)

    def picture():
        return Pictures.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8))

    if pictures == 1:
        columns["image"] = [picture() for _ in QUESTIONS]
    elif pictures:
        columns["images"] = [[picture() for _ in range(count)] for count in counts]
    return columns


def load_dataset(name: str, config: str, split: str | None = None):
    pictures = {"zen": 0, "zen-image": 1, "zen-multi-image": 3}[name.rpartition("/")[2]]
    columns = rows(config, pictures)
    kinds = {"image": Image(), "images": Sequence(Image()), "label": Value("bool")}
    if config.startswith("standard"):
        message = Value("string")
    else:
        content = [{"type": Value("string"), "text": Value("string")}] if pictures > 1 else Value("string")
        message = [{"role": Value("string"), "content": content}]
    features = Features({column: kinds.get(column, message) for column in columns})
    data = Dataset.from_dict(columns, features=features)
    return data if split else DatasetDict({"train": data, "test": data})


def module_of(trainer: str):
    """The module of a trainer's tests, or None: KTO was experimental once and had no tests of pictures then.

    A checkout of another release may import names that the installed one has no more; they belong to tests of
    text models, which are not run here.
    """
    name = f"trl_tests.test_{trainer}_trainer"
    if importlib.util.find_spec(name) is None:
        return None
    while True:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            lost = re.match(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
            if lost is None:
                raise
            setattr(sys.modules[lost[2]], lost[1], None)


def on_this_device(config_class: type[TrainingArguments]) -> None:
    """TRL's arguments ask for an accelerator's bfloat16 unless they are told otherwise."""
    start = config_class.__init__

    def __init__(self, *args, **kwargs):
        start(self, *args, **{"use_cpu": True, "bf16": False, **kwargs})

    config_class.__init__ = __init__


# Before 1.16 a trainer looks for the class of a model that it is given by name in transformers itself.
transformers.MonoInternVLForCausalLM = MonoInternVLForCausalLM
make_model()

for trainer in ("sft", "dpo", "kto", "grpo", "rloo"):
    module = module_of(trainer)
    if module is None:
        continue
    module.load_dataset = load_dataset
    for value in list(vars(module).values()):
        if isinstance(value, type) and issubclass(value, TrainingArguments) and not torch.cuda.is_available():
            on_this_device(value)
    for name, upstream in list(vars(module).items()):
        if not (name.startswith("Test") and isinstance(upstream, type)) or "Slow" in name:
            continue
        seen = [test for test in dir(upstream) if test.startswith("test_") and "_vlm" in test and "gemma" not in test]
        if not seen:
            continue
        for test in seen:
            for mark in getattr(getattr(upstream, test), "pytestmark", ()):
                if mark.name == "parametrize" and mark.args[0] == "model_id":
                    mark.args[1][:] = [OURS]
        # Everything else is about models that only read.
        hidden = {test: None for test in dir(upstream) if test.startswith("test_") and test not in seen}
        globals()[name] = type(name, (upstream,), {**hidden, "__module__": __name__})


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    yield
