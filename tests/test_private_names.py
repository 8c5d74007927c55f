"""Private names of others that this project needs because there is no public way; each is used in one place.

A release that renames one fails here, by name, and not somewhere in a training run.
"""

import importlib
import inspect

import pytest
import torch
import transformers

from mono_internvl import compat_mono_internvl
from mono_internvl.compat_mono_internvl import cpu_has_bfloat16_units


# module, name in it, the file that uses it, what for
NEEDED = (
    (
        "transformers.core_model_loading",
        "ConversionOps",
        "weight_mapping_mono_internvl.py",
        "official names and tensors",
    ),
    ("transformers.core_model_loading", "WeightConverter", "weight_mapping_mono_internvl.py", "wqkv and w1, split"),
    ("transformers.core_model_loading", "WeightRenaming", "weight_mapping_mono_internvl.py", "official names"),
    ("transformers.generation.utils", "GenerationMixin._prefill", "generation_mono_internvl.py", "chunks of a prompt"),
    (
        "transformers.generation.utils",
        "GenerationMixin._expand_inputs_for_generation",
        "generation_mono_internvl.py",
        "tiles of beams",
    ),
    ("transformers", "Trainer._get_num_items_in_batch", "training/trainer.py", "weights of a step's targets"),
    ("transformers", "Trainer._save_checkpoint", "training/checkpoints.py", "when a checkpoint is written"),
    ("transformers", "Trainer._get_output_dir", "training/checkpoints.py", "where a checkpoint is written"),
    ("transformers.cli.serve", "Serve", "serving/check_transformers.py", "what its server does with this model"),
    (
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "serving/check_transformers.py",
        "a model that sees, in its server",
    ),
    ("torch._dynamo.config", "optimize_ddp", "common/compiling.py", "a graph for each layer under DDP"),
    ("torch._dynamo.config", "recompile_limit", "common/compiling.py", "layers whose inputs come in several kinds"),
    ("torch", "_assert_async", "modeling_mono_internvl.py", "the placeholder count under torch.compile"),
    ("torch.cpu", "_is_amx_tile_supported", "compat_mono_internvl.py", "the dtype on a CPU"),
    ("torch.cpu", "_is_avx512_bf16_supported", "compat_mono_internvl.py", "the dtype on a CPU"),
)


@pytest.mark.parametrize("module, name, file, purpose", NEEDED, ids=[name for _, name, _, _ in NEEDED])
def test_a_private_name_is_still_there(module, name, file, purpose):
    found = importlib.import_module(module)
    for part in name.split("."):
        version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        assert hasattr(found, part), f"{module} has no {name} any more ({version}): {file} needs it for {purpose}"
        found = getattr(found, part)


def test_saving_reads_the_mapping_of_weights():
    """`loading_mono_internvl.py` sets `_weight_conversions`, by which transformers undoes what loading did."""
    source = inspect.getsource(importlib.import_module("transformers.core_model_loading"))
    assert "_weight_conversions" in source, (
        "saving in the official layout sets a name that transformers no longer reads"
    )


def test_a_chunked_prefill_slices_pictures_where_transformers_can():
    utils = importlib.import_module("transformers.generation.utils")
    newer = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
    assert hasattr(utils, "_slice_mm_encoder_output") == newer, (
        "generation_mono_internvl.py tells by _slice_mm_encoder_output whether a prompt with pictures may be cut"
    )


def test_a_check_of_the_cpu_that_is_gone_is_said(monkeypatch):
    warned = []
    monkeypatch.setattr(compat_mono_internvl.logger, "warning_once", warned.append)
    assert isinstance(cpu_has_bfloat16_units(), bool) and not warned
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert cpu_has_bfloat16_units() is False
    assert len(warned) == 1 and "_is_amx_tile_supported or _is_avx512_bf16_supported" in warned[0]
