"""transformers' `ImageProcessingTestMixin` on our image processor."""

import unittest

from hf_tests import test_image_processing_common as common

from mono_internvl import MonoInternVLImageProcessor


class MonoInternVLImageProcessingTester(common.ImageProcessingTester):
    """One tile per picture, so that the batch's length is the number of pictures, as the common tests count it."""

    batch_size = 7
    num_channels = 3
    min_resolution = 30
    max_resolution = 400
    tile_size = 56
    image_processing_classes = {"pil": MonoInternVLImageProcessor}

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def prepare_image_processor_dict(self) -> dict:
        return {
            "tile_size": self.tile_size,
            "max_tiles": 1,
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.3, 0.4],
        }

    def expected_output_image_shape(self, images) -> tuple[int, ...]:
        # Tiles come as patches of 28 x 28 pixels with their three colours.
        return (self.tile_size // 28) ** 2, 3 * 28 * 28


class MonoInternVLImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MonoInternVLImageProcessingTester

    # Attributes of their own before transformers 5.24, whose mixin asks the tester.
    image_processing_classes = MonoInternVLImageProcessingTester.image_processing_classes

    def setUp(self):
        self.image_processor_tester = MonoInternVLImageProcessingTester(self)

    @property
    def image_processor_dict(self) -> dict:
        return self.image_processor_tester.prepare_image_processor_dict()
