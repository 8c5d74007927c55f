"""transformers' `GenerationTesterMixin` on Mono-InternVL, both with and without visual attention experts."""

from hf_tests.generation.test_utils import GenerationTesterMixin
from model_suite import MonoInternVL15ModelTest, MonoInternVLModelTest


def generation_tests(base: type) -> type:
    """`base` with the mixin's tests instead of its own: the mixin asks a model's tests for their helpers."""
    tests = {name: None for name in dir(base) if name.startswith("test_")}
    tests |= {name: getattr(GenerationTesterMixin, name) for name in dir(GenerationTesterMixin) if name in tests}
    return type(base.__name__.replace("ModelTest", "GenerationTest"), (base,), {**tests, "__module__": __name__})


MonoInternVLGenerationTest = generation_tests(MonoInternVLModelTest)
MonoInternVL15GenerationTest = generation_tests(MonoInternVL15ModelTest)
del MonoInternVLModelTest, MonoInternVL15ModelTest
