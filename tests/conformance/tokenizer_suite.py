"""transformers' common tokenizer tests on the nano's `tokenizer.json`, which is InternLM2's way of writing text."""

import unittest

from hf_tests.test_tokenization_common import TokenizerTesterMixin
from nano import nano_folder
from transformers import TokenizersBackend


class MonoInternVLTokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = TokenizersBackend
    rust_tokenizer_class = TokenizersBackend
    from_pretrained_id = [nano_folder()]
    test_slow_tokenizer = False
    test_seq2seq = False
    # Extractors build a tokenizer class from its vocabulary; ours is the generic class and a file.
    test_tokenizer_from_extractor = False
