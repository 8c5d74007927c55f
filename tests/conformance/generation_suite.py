"""transformers' `GenerationTesterMixin` on Mono-InternVL, both with and without visual attention experts."""

import unittest

from hf_tests.generation.test_utils import GenerationTesterMixin
from hf_tests.test_modeling_common import ModelTesterMixin
from model_suite import MonoInternVL15ModelTest as ModelTest15
from model_suite import MonoInternVLModelTest as ModelTest


# The mixin asks the model's tests for their helpers; their own tests ran in model_suite.py.
def generation_tests(base: type) -> type:
    hidden = {name: None for name in dir(base) if name.startswith("test_") and not hasattr(GenerationTesterMixin, name)}
    return type(base.__name__.replace("ModelTest", "GenerationTest"), (base,), hidden)


assert issubclass(ModelTest, (ModelTesterMixin, unittest.TestCase))
MonoInternVLGenerationTest = generation_tests(ModelTest)
MonoInternVL15GenerationTest = generation_tests(ModelTest15)
del ModelTest, ModelTest15
