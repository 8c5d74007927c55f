"""transformers' `ProcessorTesterMixin` on our processor, with the nano's tokenizer and 56-px tiles."""

import unittest

from hf_tests import test_processing_common as common
from nano import nano_folder
from transformers import AutoTokenizer

from mono_internvl import MonoInternVLImageProcessor, MonoInternVLProcessor


class MonoInternVLProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = MonoInternVLProcessor
    max_tiles = 1

    def get_component(self, attribute, use_tiny_ckpt=True, **kwargs):
        # Before 5.18 `AutoImageProcessor` is a placeholder that wants torchvision.
        if attribute == "image_processor":
            return MonoInternVLImageProcessor.from_pretrained(self.tmpdirname, **kwargs)
        return super().get_component(attribute, use_tiny_ckpt, **kwargs)

    @classmethod
    def _setup_tokenizer(cls):
        return AutoTokenizer.from_pretrained(nano_folder())

    @classmethod
    def _setup_image_processor(cls):
        return MonoInternVLImageProcessor(tile_size=56, max_tiles=cls.max_tiles)

    @classmethod
    def _setup_from_components(cls):
        template = AutoTokenizer.from_pretrained(nano_folder()).chat_template
        return MonoInternVLProcessor(cls._setup_image_processor(), cls._setup_tokenizer(), chat_template=template)


class MonoInternVLTilesProcessorTest(MonoInternVLProcessorTest):
    """The same with several tiles per picture."""

    max_tiles = 4
