"""transformers' `ModelTesterMixin` on Mono-InternVL; started by `run.py`, never by a plain `pytest`.

Whatever departs from the common tests says why, in a line, at its place.
"""

import unittest
from unittest import mock

import torch
from hf_tests.generation.test_utils import GenerationTesterMixin
from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from mono_internvl import MonoInternVLConfig, MonoInternVLForCausalLM, MonoInternVLModel


# The common tests know by these tables which classes take labels, have no loss or see pictures; remote code is in none.
modeling_auto.MODEL_MAPPING_NAMES["mono_internvl"] = MonoInternVLModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mono_internvl"] = MonoInternVLForCausalLM.__name__
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["mono_internvl"] = MonoInternVLForCausalLM.__name__


class MonoInternVLModelTester:
    """A tiny configuration and a batch of it: one tile per row, its four visual tokens in front of the text."""

    batch_size = 3
    seq_length = 10
    is_training = True
    tokens_per_tile = 4
    # Low, so that tests that shrink the vocabulary leave it inside.
    image_token_id = 3
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, parent: unittest.TestCase, visual_attention_experts: str = "none"):
        self.parent = parent
        self.visual_attention_experts = visual_attention_experts

    def get_config(self) -> MonoInternVLConfig:
        text = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 48,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
        }
        vision = {"hidden_size": 16, "image_size": 56}
        return MonoInternVLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=self.image_token_id,
            visual_attention_experts=self.visual_attention_experts,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MonoInternVLConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 4) + 4
        input_ids[:, 1 : 1 + self.tokens_per_tile] = self.image_token_id
        size = config.vision_config.image_size
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([self.batch_size, 3, size, size]),
        }


class MonoInternVLModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MonoInternVLModel, MonoInternVLForCausalLM)
    _is_composite = True
    visual_attention_experts = "none"
    _torch_compile_train_cls = MonoInternVLForCausalLM

    def setUp(self):
        self.model_tester = MonoInternVLModelTester(self, self.visual_attention_experts)
        self.config_tester = ConfigTester(self, config_class=MonoInternVLConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()


class MonoInternVL15ModelTest(MonoInternVLModelTest):
    """The same with visual attention experts."""

    visual_attention_experts = "qkvo"
