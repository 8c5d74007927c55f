"""transformers' tests of continuous batching on the nano, on whatever device there is.

Upstream keeps most of them to accelerators, because its models are large; the nano is not.
"""

import importlib
import sys
import types
import unittest

from nano import nano_folder
from transformers import ContinuousBatchingConfig
from transformers.testing_utils import torch_device
from transformers.utils import is_flash_attn_2_available


# A module of transformers' that has changed its name since these tests were written.
ENGINE = "transformers.generation.continuous_batching"
try:
    importlib.import_module(f"{ENGINE}.cache_manager")
except ModuleNotFoundError:
    sys.modules[f"{ENGINE}.cache_manager"] = importlib.import_module(f"{ENGINE}.cache_allocators")

# Several devices are no part of this suite, and the helpers of their tests are not in transformers' archive.
several = types.ModuleType("hf_tests.test_tensor_parallel_mixin")
several._init_distributed = None
sys.modules[several.__name__] = several

from hf_tests.generation import test_continuous_batching as upstream  # noqa: E402


class SmallConfig(ContinuousBatchingConfig):
    """By default the cache takes most of the free memory; this is enough for these prompts."""

    def __init__(self, **kwargs):
        if kwargs.get("use_async_batching") and torch_device == "cpu":
            raise unittest.SkipTest("asynchronous batching needs an accelerator")
        super().__init__(**{"num_blocks": 16, "max_batch_tokens": 64, **kwargs})


load = upstream.get_tokenizer_and_model


def nano(model_id, attn_implementation, device, dtype="auto"):
    if "flash" in attn_implementation and not is_flash_attn_2_available(kernels_fallback_ok=True):
        raise unittest.SkipTest("needs flash attention")
    tokenizer, model = load(nano_folder(), attn_implementation, device, dtype)
    # The tests count on answers of some length.
    model.generation_config.eos_token_id = None
    start = model.init_continuous_batching

    def small(*args, **kwargs):
        if not args:
            kwargs.setdefault("continuous_batching_config", SmallConfig())
        return start(*args, **kwargs)

    model.init_continuous_batching = small
    return tokenizer, model


upstream.ContinuousBatchingConfig = SmallConfig
upstream.get_tokenizer_and_model = nano


class NanoContinuousBatchingTest(upstream.ContinuousBatchingWithAcceleratorTest):
    __unittest_skip__ = False
