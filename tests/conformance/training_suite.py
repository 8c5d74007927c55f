"""transformers' `TrainingTesterMixin`: a tiny model learns one batch by heart and then writes it."""

import unittest

from hf_tests.test_training_mixin import TrainingTesterMixin
from model_suite import MonoInternVLModelTester

from mono_internvl import MonoInternVLForCausalLM


class TrainingTester(MonoInternVLModelTester):
    causal_lm_class = MonoInternVLForCausalLM
    # The batch counts from 1 on; a placeholder in it would want a picture.
    image_token_id = 98

    def get_config(self):
        config = super().get_config()
        # Read where a text model has it; in a composite configuration it belongs to the text's part.
        config.vocab_size = config.text_config.vocab_size
        return config


class MonoInternVLTrainingTest(TrainingTesterMixin, unittest.TestCase):
    visual_attention_experts = "none"
    all_model_classes = (MonoInternVLForCausalLM,)

    @property
    def model_tester(self) -> TrainingTester:
        return TrainingTester(self, self.visual_attention_experts)


class MonoInternVL15TrainingTest(MonoInternVLTrainingTest):
    """The same with visual attention experts."""

    visual_attention_experts = "qkvo"
