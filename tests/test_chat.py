"""`model.chat`: text, pictures, history, streaming, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from conftest import tiny_model
from mono_internvl.modeling_mono_internvl import cpu_has_bfloat16_units, place_images


@pytest.fixture
def chat(model, processor):
    return lambda *args, **kwargs: model.chat(*args, **{"processor": processor, "max_new_tokens": 8, **kwargs})


RED, BLUE = Image.new("RGB", (80, 60), "red"), Image.new("RGB", (50, 90), "blue")


def test_text_only(chat):
    assert isinstance(chat(None, "Hello"), str)
    assert chat(None, "Hello") == chat([], "Hello")


def test_pictures_in_every_form(chat, tmp_path):
    RED.save(tmp_path / "red.png")
    answer = chat(RED, "What is it?")
    assert answer == chat(str(tmp_path / "red.png"), "What is it?")
    assert answer == chat(tmp_path / "red.png", "What is it?")
    assert answer == chat([RED], "<image>\nWhat is it?")
    assert answer == chat(np.asarray(RED), "What is it?")
    assert isinstance(chat([RED, BLUE], "Which is red?"), str)


def test_history_equals_one_long_prompt(model, processor, chat):
    """A second picture in a later turn: the prompt that the model sees is the whole conversation."""
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    try:
        first, history = chat(RED, "What is it?", return_history=True)
        assert history == [("<image>\nWhat is it?", first)]
        before = copy.deepcopy(history)
        seen.clear()
        second, longer = chat([RED, BLUE], "And this?", history=history, return_history=True)
    finally:
        handle.remove()
    assert history == before
    assert longer == [*history, ("<image>\nAnd this?", second)]
    messages = processor.conversation([*history, ("<image>\nAnd this?", None)], [RED, BLUE])
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert torch.equal(seen[0], inputs["input_ids"])


def test_several_pictures_get_names_and_share_the_tiles(model, processor, chat):
    shapes = []
    handle = model.model.register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(kwargs.get("pixel_values")), with_kwargs=True
    )
    encoded = []
    original = model.model.get_image_features
    model.model.get_image_features = lambda pixel_values, **kw: (
        encoded.append(pixel_values) or original(pixel_values, **kw)
    )
    try:
        _, history = chat([RED, BLUE], "Which?", return_history=True, max_tiles=2)
    finally:
        handle.remove()
        model.model.get_image_features = original
    assert history[0][0] == "Image-1: <image>\nImage-2: <image>\nWhich?"
    assert encoded[0].shape[0] == 2  # two pictures share two tiles


def test_nothing_is_mutated(chat):
    pictures, history, options = [RED], [("Hi", "hello")], {"do_sample": False, "max_new_tokens": 3}
    before = (list(pictures), list(history), dict(options))
    chat(pictures, "What is it?", history=history, **options)
    assert (pictures, history, options) == before


def test_streaming_gives_the_answer(chat, processor):
    pieces: list[str] = []
    answer = chat(RED, "What is it?", streamer=pieces.append, max_new_tokens=40)
    assert "".join(pieces) == answer
    streamer = TextIteratorStreamer(processor.tokenizer)
    answer = chat(RED, "What is it?", streamer=streamer, max_new_tokens=40)
    assert "".join(streamer) == answer


def test_sampling_and_seeds(chat):
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 20}
    torch.manual_seed(1)
    first = chat(RED, "What is it?", **options)
    torch.manual_seed(1)
    assert chat(RED, "What is it?", **options) == first
    torch.manual_seed(2)
    assert chat(RED, "What is it?", **options) != first


@pytest.mark.parametrize(
    ("images", "prompt", "history", "message"),
    [
        (RED, "", None, "prompt is empty"),
        (None, "  \n", None, "prompt is empty"),
        (RED, "<image> and <image>", None, "2 <image> marks in the prompt, but 1 pictures"),
        ([RED, BLUE], "<image> only", None, "1 <image> marks in the prompt, but 2 pictures"),
        (None, "<image>?", None, "1 <image> marks in the prompt, but 0 pictures"),
        (None, "More?", [("<image>\nWhat?", "red")], "give as many as marks"),
    ],
)
def test_what_is_refused(chat, images, prompt, history, message):
    with pytest.raises(ValueError, match=message):
        chat(images, prompt, history=history)


def test_a_prompt_that_is_too_long_names_the_limit(chat):
    with pytest.raises(ValueError, match="limit of 512"):
        chat(None, "How many circles are there? " * 100)


def test_a_model_from_nowhere_needs_a_processor(model):
    with pytest.raises(ValueError, match="pass processor="):
        model.chat(None, "Hello")


def test_marks():
    assert place_images("Q", 0) == "Q"
    assert place_images("Q", 1) == "<image>\nQ"
    assert place_images("a <image> b", 1) == "a <image> b"
    frames = "Frame1: <image>\nFrame2: <image>\nWhat moves?"
    assert place_images(frames, 2) == frames


def test_float32_where_bfloat16_is_slow(processor):
    model = tiny_model(text_config={"vocab_size": len(processor.tokenizer)}).to(torch.bfloat16)
    model.config.image_token_id = processor.image_token_id
    model.chat(None, "Hello", processor=processor, max_new_tokens=2)
    assert model.dtype == (torch.bfloat16 if cpu_has_bfloat16_units() else torch.float32)
