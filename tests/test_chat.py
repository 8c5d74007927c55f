"""`model.chat`: text, pictures, history, streaming, and what it refuses."""

import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, TextIteratorStreamer

from conftest import exchanged_profile, tiny_model
from helpers_video import write_video
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


def test_several_pictures_get_names_and_share_the_tiles(model, chat, monkeypatch):
    encoded = []
    original = model.model.get_image_features
    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixel_values, **kw: encoded.append(pixel_values) or original(pixel_values, **kw),
    )
    _, history = chat([RED, BLUE], "Which?", return_history=True, max_tiles=2)
    assert history[0][0] == "Image-1: <image>\nImage-2: <image>\nWhich?"
    assert encoded[0].shape[0] == 2  # two pictures share two tiles


def test_auto_enlarges_no_picture(model, chat, monkeypatch):
    """A strip of 180 x 40 px fills 2.3 tiles of 56 px and is blown up to four without it; 224 x 224 px fill them."""
    tiles = []
    original = model.model.get_image_features
    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixel_values, **kw: tiles.append(len(pixel_values)) or original(pixel_values, **kw),
    )
    strip = RED.resize((180, 40))
    for pictures in (strip, [strip, RED.resize((20, 20))], RED.resize((224, 224))):
        chat(pictures, "What?", max_tiles="auto", max_new_tokens=1)
        chat(pictures, "What?", max_new_tokens=1)
    assert tiles == [3, 5, 4, 4, 5, 5]


def test_a_video_in_a_question_and_in_the_history(model, chat, monkeypatch):
    """Its part stays in the history and is read again; the prompt is that of the frames as pictures."""
    tiles, prompts = [], []
    original = model.model.get_image_features
    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixel_values, **kw: tiles.append(len(pixel_values)) or original(pixel_values, **kw),
    )

    def keep(_, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            prompts.append(kwargs["input_ids"])

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    frames = [RED, BLUE.resize(RED.size), RED.rotate(90), RED.resize((200, 20))]
    part, question = {"type": "video", "video": frames}, {"type": "text", "text": "What moves?"}
    try:
        first, history = chat(None, [part, question], return_history=True)
        assert history == [([part, question], first)]
        assert first == chat(frames, "".join(f"Frame{i}: <image>\n" for i in range(1, 5)) + "What moves?", max_tiles=1)
        assert torch.equal(*prompts)
        longer = chat(BLUE, "And this?", history=history, return_history=True, max_tiles=5)[1]
        assert longer[1][0] == "<image>\nAnd this?" and longer[0] == history[0]
        chat(None, [{**part, "num_frames": 2}, question], num_frames=3)
        chat(None, [part, question], num_frames=3)
        messages = [{"role": "user", "content": [part, question]}, {"role": "assistant", "content": first}]
        assert len(chat(None, [part, question], history=messages, return_history=True, num_frames=1)[1]) == 4
    finally:
        handle.remove()
    assert tiles == [4, 4, 5, 2, 3, 2]


def test_a_file_and_bad_videos_in_chat(chat, tmp_path):
    question = {"type": "text", "text": "What moves?"}
    path = write_video(tmp_path / "clip.mp4", 30)
    answer = chat(None, [{"type": "video", "video": str(path)}, question], fps=1)
    assert answer == chat(None, [{"type": "video_url", "video_url": {"url": path.as_uri()}, "num_frames": 3}, question])
    path.write_bytes(path.read_bytes()[:2000])
    for video, message in (
        (str(path), r"message 1 \(user\), part 1: .*clip.mp4 is (damaged|no video)"),
        ([], "part 1: a video given as a list of frames has none"),
    ):
        with pytest.raises(ValueError, match=message):
            chat(None, [{"type": "video", "video": video}, question])
    with pytest.raises(FileNotFoundError, match="part 1: no such video: gone.mp4"):
        chat(None, [{"type": "video", "video": "gone.mp4"}, question])
    with pytest.raises(ValueError, match=r"limit of 512; shorten it or lower max_tiles \(num_frames of a video\)"):
        chat(None, [{"type": "video", "video": [RED] * 300, "num_frames": 200}, question])


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
        (RED, "More?", [("<image> <image>\nWhat?", "red")], "as many as"),
        (RED, ["What?", "Where?"], None, "a list of str"),
        (
            RED,
            [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}],
            None,
            "2 places .* 1 pictures",
        ),
        ([RED, None], "Q", None, "picture 2 of 2 is None"),
        (RED, "Q", ("Hi", "hello"), "put this one pair into a list"),
        (RED, "Q", [("a", "b", "c")], "pairs or of messages"),
        (RED, "Q", [("a", None)], "has no answer"),
        (RED, "Q", [("user", "Hi"), ("assistant", "hello")], r"\(role, text\) pairs"),
        (RED, "Q", [("human", "Hi"), ("AI", "hello")], r"\(role, text\) pairs"),
        # Gradio's files, as it keeps them in pairs and in messages.
        (RED, "Q", [(("/tmp/a.png",), "a circle")], "entry 1 of the history holds .*type': 'image'"),
        (RED, "Q", [{"role": "user", "content": ("/tmp/a.png", "alt")}], "entry 1 of the history holds"),
        (np.zeros((0, 8, 8, 3), np.uint8), "Q", None, "ndarray without a picture"),
        (iter([]), "Q", None, "without a picture"),
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


def test_the_callers_model_stays_as_it_was(processor, monkeypatch):
    model = tiny_model(text_config={"vocab_size": len(processor.tokenizer)}).to(torch.bfloat16)
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    monkeypatch.setattr("mono_internvl.chat_mono_internvl.cpu_has_bfloat16_units", lambda: False)
    model.train()
    model.model.language_model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    model.chat(None, "Hello", processor=processor, max_new_tokens=2)
    assert model.dtype == torch.bfloat16
    assert {name: module.training for name, module in model.named_modules()} == before
    assert isinstance(cpu_has_bfloat16_units(), bool)


def test_training_mode_answers_as_evaluation(model, chat):
    want = chat(RED, "What is it?", max_new_tokens=8)
    model.train()
    model.gradient_checkpointing_enable()
    try:
        assert chat(RED, "What is it?", max_new_tokens=8) == want
        assert model.training
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_histories_of_both_forms(chat):
    pairs = [("<image>\nWhich?", "a red one")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhich?"}]},
        {"role": "assistant", "content": "a red one"},
    ]
    first, grown_pairs = chat([RED, BLUE], "And this?", history=pairs, return_history=True, max_new_tokens=8)
    second, grown = chat([RED, BLUE], "And this?", history=messages, return_history=True, max_new_tokens=8)
    assert first == second
    assert grown_pairs == [*pairs, ("<image>\nAnd this?", first)]
    assert grown[:2] == messages
    assert grown[2:] == [
        {"role": "user", "content": "<image>\nAnd this?"},
        {"role": "assistant", "content": second},
    ]


def test_the_mark_is_a_word_without_pictures_and_in_parts(chat):
    _, history = chat(None, "What does <image> do?", return_history=True, max_new_tokens=4)
    assert history[0][0] == [{"type": "text", "text": "What does <image> do?"}]
    # The word of the earlier turn stays one when a picture comes.
    chat(RED, "And this?", history=history, max_new_tokens=4)
    parts = [{"type": "image"}, {"type": "text", "text": "Turn this into an <image> tag."}]
    _, history = chat(RED, parts, return_history=True, max_new_tokens=4)
    assert history[0][0] == parts


def test_frames_as_one_array(chat):
    frames = np.stack([np.asarray(RED), np.asarray(BLUE.resize(RED.size))])
    want = chat([RED, BLUE.resize(RED.size)], "Which?", max_new_tokens=6)
    assert chat(frames, "Which?", max_new_tokens=6) == want
    assert chat((frame for frame in frames), "Which?", max_new_tokens=6) == want


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"system_prompt": "x"}, TypeError, "system_prompt.*did you mean 'system'"),
        ({"max_tile": 1}, TypeError, "max_tile.*did you mean 'max_tiles'"),
        ({"num_frame": 1}, TypeError, "num_frame.*did you mean 'num_frames'"),
        ({"num_frames": 2, "fps": 1}, ValueError, "num_frames=2 and fps=1 both say"),
        ({"fps": "fast"}, ValueError, "fps must be a positive number"),
        ({"max_tiles": "most"}, ValueError, 'max_tiles must be "auto" or a whole number of at least 1'),
        ({"return_dict_in_generate": True}, ValueError, "return_dict_in_generate"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences"),
        ({"max_new_tokens": "64"}, ValueError, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number"),
        ({"temperature": 0.7, "do_sample": False}, ValueError, "temperature cannot matter"),
        ({"temperature": 0, "do_sample": True}, ValueError, "temperature=0"),
        ({"generation_config": {"max_new_token": 3}}, TypeError, "did you mean 'max_new_tokens'"),
        ({"stop_strings": []}, ValueError, "stop_strings must be"),
        ({"stop_strings": ["a", ""]}, ValueError, "stop_strings must be"),
        ({"stop_strings": 5}, ValueError, "stop_strings must be"),
        ({"stopping_criteria": print}, TypeError, "stopping_criteria must be a list"),
        ({"do_sample": "yes"}, ValueError, "do_sample must be True or False"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a number"),
        ({"temperature": -1}, ValueError, "temperature must not be negative"),
        ({"top_p": 1.5}, ValueError, "top_p is a share"),
        ({"streamer": []}, TypeError, "streamer must be"),
        ({"streamer": TextIteratorStreamer}, TypeError, "the class TextIteratorStreamer"),
        ({"num_patches_list": [1]}, TypeError, "not num_patches_list.*legacy.md"),
    ],
)
def test_an_option_is_honoured_or_refused(chat, options, error, message):
    with pytest.raises(error, match=message):
        chat(RED, "Q", **options)


def test_profiles_are_applied_when_asked_for(model, chat):
    """A profile of another colour space: with it the model is given other pixels."""

    def tiles(color, **options):
        picture, seen = Image.new("RGB", (60, 60), color), []
        picture.info["icc_profile"] = exchanged_profile()
        handle = model.model.vision_embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        chat([picture], "What?", max_new_tokens=1, **options)
        handle.remove()
        return seen[0].float()

    red, green = (200, 30, 30), (30, 200, 30)
    torch.testing.assert_close(tiles(red, convert_to_srgb=True), tiles(green), atol=0.05, rtol=0)
    assert (tiles(red) - tiles(green)).abs().max() > 1
    picture = Image.new("RGB", (60, 60), red)
    with pytest.raises(ValueError, match="convert_to_srgb"):
        chat([picture], "What?", convert_to_srgb="yes")


def test_options_that_work(chat):
    greedy = chat(RED, "What is it?", max_new_tokens=8)
    assert chat(RED, "What is it?", temperature=0, max_new_tokens=8) == greedy
    assert chat(RED, "What is it?", generation_config={"max_new_tokens": 8}) == greedy
    config = GenerationConfig(max_new_tokens=8)
    before = config.to_dict()
    assert chat(RED, "What is it?", generation_config=config) == greedy
    assert config.to_dict() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat(RED, "What is it?", generation_config=GenerationConfig(max_new_tokens=3), max_new_tokens=8)
    chat(RED, "What is it?", stop_strings=["e"], max_new_tokens=8)
    assert chat(RED, "What is it?", system="Be short.", max_new_tokens=8) != ""
    assert chat(RED, "What is it?", max_new_tokens=np.int64(8)) == greedy
    chat(RED, "What is it?", temperature=np.float32(0.5), top_p=1, max_new_tokens=2)


def test_what_the_models_own_configuration_asks_of_generate(model, chat):
    """`generate` may return a dict and several answers; `chat` has one, cut at the configuration's stops."""
    want, own = chat(RED, "What is it?", max_new_tokens=6), model.generation_config
    try:
        model.generation_config = GenerationConfig(
            return_dict_in_generate=True, output_scores=True, num_beams=2, num_return_sequences=2, max_new_tokens=2
        )
        assert isinstance(chat(RED, "What is it?", max_new_tokens=6), str)
        model.generation_config = GenerationConfig(stop_strings=[want[0]], max_new_tokens=2)
        assert len(chat(RED, "What is it?", max_new_tokens=6)) < len(want)
        model.generation_config = GenerationConfig(max_new_tokens=2)
        assert chat(RED, "What is it?", max_new_tokens=None) == chat(RED, "What is it?", max_new_tokens=2)
    finally:
        model.generation_config = own
    assert chat(RED, "What is it?", max_new_tokens=6) == want


def test_float16_by_autocast_is_refused(chat):
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(ValueError, match="autocast in float16.*overflow to NaN"),
    ):
        chat(RED, "What is it?")


def test_a_configuration_makes_a_model_of_one_dtype(model):
    """Also that of a loaded model, whose parts say their dtypes."""
    config = copy.deepcopy(model.config)
    config.text_config.dtype = torch.bfloat16
    assert len({tensor.dtype for tensor in type(model)(config).parameters()}) == 1


def test_the_released_way_of_calling_points_to_the_page(model, processor):
    for call in (
        lambda: model.chat(processor.tokenizer, None, "Hello", {"max_new_tokens": 2}),
        # As VLMEvalKit calls it.
        lambda: model.chat(processor.tokenizer, pixel_values=None, question="Hello", verbose=True),
        lambda: model.chat(pixel_values=None, questions=["Hello"]),
        lambda: model.batch_chat(processor.tokenizer, None, ["Hello"], {}),
        lambda: model.extract_feature(torch.zeros(1, 3, 56, 56)),
    ):
        with pytest.raises(TypeError, match="legacy.md"):
            call()


def test_a_failure_ends_a_waiting_streamer(chat, processor):
    for error, call in (
        (ValueError, lambda streamer: chat([RED, BLUE], "<image> only", streamer=streamer)),
        (TypeError, lambda streamer: chat(RED, streamer=streamer)),
        (TypeError, lambda streamer: chat(RED, question="Q", streamer=streamer)),
        (ValueError, lambda streamer: chat(RED, "Q", num_beams=2, streamer=streamer)),
    ):
        streamer = TextIteratorStreamer(processor.tokenizer, timeout=10)
        with pytest.raises(error):
            call(streamer)
        assert "".join(streamer) == ""


def test_a_history_as_an_array(chat):
    pairs = [("Hi", "hello")]
    want = chat(None, "And?", history=pairs, return_history=True)
    assert chat(None, "And?", history=np.array(pairs, dtype=object), return_history=True) == want
