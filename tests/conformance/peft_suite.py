"""PEFT's tests of decoder models: every method they know, on a tiny model with the nano's tokenizer."""

import functools
import os

import peft.utils.constants
import pytest
import torch
from datasets import Dataset, DatasetDict
from nano import nano_folder, tiny_config
from peft_tests import test_decoder_models as upstream
from peft_tests.test_decoder_models import TestDecoderModels as UpstreamDecoderModels
from transformers import AutoModelForCausalLM, AutoTokenizer

from mono_internvl import MonoInternVLForCausalLM


# Which layers a method adapts by default stands in tables by the type of the model. Ours has a Llama's names.
for table_name, table in vars(peft.utils.constants).items():
    if table_name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
        table.setdefault("mono_internvl", table["llama"])


@functools.cache
def tiny_folder() -> str:
    """A random model; two layers, as those that these tests are written for."""
    tokenizer = AutoTokenizer.from_pretrained(nano_folder())
    # Wide enough for keys and values of rank 20, which the combined adapters get.
    config = tiny_config(tokenizer, hidden_size=48)
    torch.manual_seed(0)
    # A name that is the same in every run: it is a part of the tests' ids.
    folder = "tiny-mono-internvl"
    MonoInternVLForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quotes() -> DatasetDict:
    rows = [f"A quote of no great length, and its number is {i}." for i in range(12)]
    return DatasetDict({"train": Dataset.from_dict({"quote": rows})})


# The decorators of the upstream tests hold these lists themselves.
for models in (upstream.PEFT_DECODER_MODELS_TO_TEST, upstream.SMALL_GRID_MODELS):
    models[:] = [tiny_folder()]
upstream.load_dataset_english_quotes = quotes


class TestDecoderModels(UpstreamDecoderModels):
    @pytest.fixture(autouse=True)
    def our_model(self, monkeypatch):
        # Tests that name a model get ours too.
        for auto in (AutoModelForCausalLM, AutoTokenizer):
            load = auto.from_pretrained

            def ours(name, *args, load=load, **kwargs):
                return load(name if os.path.isdir(name) else tiny_folder(), *args, **kwargs)

            monkeypatch.setattr(auto, "from_pretrained", ours)
