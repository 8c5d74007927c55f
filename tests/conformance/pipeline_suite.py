"""transformers' tests of the image-text-to-text pipeline, asked of the nano.

What the answers say is not compared, since the expected words are another model's; their number, their place among the
messages and their types are. Pictures come from this repository instead of the network.
"""

import sys
import types
from unittest import mock

from nano import PICTURE, nano_folder
from transformers.pipelines import pipeline

from mono_internvl import MonoInternVLForCausalLM, MonoInternVLProcessor


class Any:
    """Equal to everything of its types: what the upstream tests take from a file that wants a whole checkout."""

    def __init__(self, *kinds: type):
        self.kinds = kinds

    def __eq__(self, other):
        return isinstance(other, self.kinds)

    def __repr__(self):
        return f"any {self.kinds}"


helpers = types.ModuleType("hf_tests.pipelines.test_pipelines_common")
helpers.ANY = Any
sys.modules[helpers.__name__] = helpers

from hf_tests.pipelines import test_pipelines_image_text_to_text as upstream  # noqa: E402


def local(value):
    """`value` with our picture for each of the network's, and our placeholder for LLaVA's."""
    if isinstance(value, str):
        return str(PICTURE) if value.startswith("http") else value.replace("<image>", "<IMG_CONTEXT>")
    if isinstance(value, dict):
        return {key: local(item) for key, item in value.items()}
    return [local(item) for item in value] if isinstance(value, list) else value


def without_words(value, answer: bool = False):
    """`value` with `...` for every generated text."""
    if isinstance(value, str):
        return "..." if answer else value
    if isinstance(value, list):
        return [without_words(item, answer) for item in value]
    if not isinstance(value, dict):
        return value
    if "role" in value:
        # A list of messages: only the assistant's are generated.
        answer = value["role"] == "assistant"
        return {key: without_words(item, answer and key == "content") for key, item in value.items()}
    return {
        key: without_words(item, key == "generated_text" or (answer and key in ("content", "text")))
        for key, item in value.items()
    }


class NanoPipeline:
    """The pipeline of the nano, which gives the network's pictures no chance."""

    def __init__(self):
        self.inner = pipeline("image-text-to-text", model=nano_folder())

    def __call__(self, *args, **kwargs):
        args, kwargs = local(list(args)), local(kwargs)
        if args and isinstance(text := kwargs["text"], list):
            # Kosmos needs no placeholder.
            kwargs["text"] = [words if "<IMG_CONTEXT>" in words else f"<IMG_CONTEXT>{words}" for words in text]
        return self.inner(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class NanoPipelineTest(upstream.ImageTextToTextPipelineTests):
    def setUp(self):
        patched = mock.patch.object(upstream, "pipeline", lambda task, model: NanoPipeline())
        patched.start()
        self.addCleanup(patched.stop)
        # What is expected of a device is looked up by the device's name.
        expectation = mock.patch.object(upstream.Expectations, "get_expectation", lambda self: "...")
        expectation.start()
        self.addCleanup(expectation.stop)

    def assertEqual(self, first, second, msg=None):
        if isinstance(first, str) and isinstance(second, str) and first != second:
            # An answer by itself.
            self.assertTrue(first, msg)
            return
        super().assertEqual(without_words(first), without_words(local(second)), msg)

    def test_the_common_call(self):
        model = MonoInternVLForCausalLM.from_pretrained(nano_folder())
        processor = MonoInternVLProcessor.from_pretrained(nano_folder())
        self.run_pipeline_test(*self.get_test_pipeline(model, None, processor, None))
