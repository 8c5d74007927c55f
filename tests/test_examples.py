"""The examples run as their first lines say, at nano size, and do what they are for."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from conftest import ROOT
from mono_internvl import MonoInternVLForCausalLM
from mono_internvl.training.data import Collator


EXAMPLES, CONFIGS = ROOT / "examples", ROOT / "training" / "configs"
PLATES = EXAMPLES / "plates.jsonl"
pytestmark = pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the nano is not in the repository")


@pytest.fixture
def example(monkeypatch):
    """Imports an example as a script's folder lets it be imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def nano() -> MonoInternVLForCausalLM:
    return MonoInternVLForCausalLM.from_pretrained(ROOT, dtype=torch.float32).eval()


def test_bad_records_are_named(example, tmp_path):
    records, path = example("records"), tmp_path / "data.jsonl"
    for text, message in (
        ("", "data.jsonl holds no record"),
        ('{"messages": [{"role": "user", "content": "Q"}]}\n{', "data.jsonl, line 2: not JSON"),
        ('{"images": []}', "line 1: no conversations or messages"),
        ("[1]", "line 1: a record is a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            records.read_records(path)


@torch.no_grad()
def loss_on_plates(model, processor, records) -> float:
    encoded = [records.encode_record(processor, record) for record in records.read_records(PLATES)]
    return model(**Collator(processor.tokenizer.pad_token_id)(encoded)).loss.item()


def test_records_name_their_pictures_and_learn_answers_only(example, nano_processor):
    records = example("records")
    first, *_, last = records.read_records(PLATES)
    assert first["images"] == [str(EXAMPLES / "plate.png")] and last["images"] == []
    encoded = records.encode_record(nano_processor, first)
    learned = encoded["labels"][encoded["labels"] != -100]
    assert nano_processor.tokenizer.decode(learned) == "1<|im_end|>orange<|im_end|>"
    assert not (learned == nano_processor.image_token_id).any()


def test_sft_with_trl(example, nano_processor, tmp_path):
    pytest.importorskip("trl")
    records = example("records")
    before = loss_on_plates(nano(), nano_processor, records)
    torch.manual_seed(0)
    example("sft_trl").main(tmp_path, steps=12, learning_rate=1e-3)
    trained = MonoInternVLForCausalLM.from_pretrained(tmp_path).eval()
    assert loss_on_plates(trained, nano_processor, records) < before / 2
    assert isinstance(trained.chat(EXAMPLES / "plate.png", "How many stars are there?"), str)  # processor saved too


def test_lora_with_peft(example, nano_processor, tmp_path):
    peft = pytest.importorskip("peft")
    records = example("records")
    before = loss_on_plates(nano(), nano_processor, records)
    torch.manual_seed(0)
    example("lora_peft").main(tmp_path, steps=12, learning_rate=3e-3)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < (ROOT / "model.safetensors").stat().st_size
    adapted = peft.PeftModel.from_pretrained(nano(), tmp_path).eval()
    names = {name for name, parameter in adapted.named_parameters() if "lora_" in name}
    layers = adapted.config.text_config.num_hidden_layers
    assert len(names) == layers * (4 + 3 + 3) * 2  # attention, text expert, visual expert; A and B each
    after = loss_on_plates(adapted, nano_processor, records)
    assert after < before / 2
    merged = adapted.merge_and_unload()
    assert loss_on_plates(merged, nano_processor, records) == pytest.approx(after, rel=1e-3)
    assert isinstance(merged.chat(EXAMPLES / "plate.png", "How many stars are there?"), str)


def test_lora_on_the_visual_experts_alone(example, tmp_path):
    peft = pytest.importorskip("peft")
    example("lora_peft").main(tmp_path, steps=1, targets=r"visual_mlp\.(gate|up|down)_proj", rank=2)
    adapted = peft.PeftModel.from_pretrained(nano(), tmp_path)
    touched = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert touched and all(".visual_mlp." in name for name in touched)


def test_accelerate_in_one_process(example, nano_processor, tmp_path):
    pytest.importorskip("accelerate")
    records = example("records")
    before = loss_on_plates(nano(), nano_processor, records)
    torch.manual_seed(0)
    example("finetune_accelerate").main(tmp_path, epochs=4, learning_rate=1e-3)
    assert (
        loss_on_plates(MonoInternVLForCausalLM.from_pretrained(tmp_path).eval(), nano_processor, records) < before / 2
    )


def launch(*arguments, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_accelerate_in_two_processes_of_which_one_may_have_no_picture(tmp_path):
    pytest.importorskip("accelerate")
    script = EXAMPLES / "finetune_accelerate.py"
    launch(
        *("torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path, "--epochs=1"),
        ACCELERATE_USE_CPU="true",
    )
    MonoInternVLForCausalLM.from_pretrained(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", ["fsdp2.yaml", "deepspeed.yaml"])
def test_accelerate_configurations(settings, tmp_path):
    pytest.importorskip("deepspeed" if "deepspeed" in settings else "accelerate")
    launch(
        *("accelerate.commands.launch", "--config_file", CONFIGS / settings, "--num_processes=1"),
        *(EXAMPLES / "finetune_accelerate.py", tmp_path, "--epochs=1"),
    )
    MonoInternVLForCausalLM.from_pretrained(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed has an environment of its own")
def test_deepspeed_in_one_process(tmp_path):
    launch(
        *("accelerate.commands.launch", "--config_file", CONFIGS / "deepspeed.yaml", "--num_processes=1"),
        *("--mixed_precision=no", EXAMPLES / "finetune_accelerate.py", tmp_path, "--epochs=1"),
        DS_ACCELERATOR="cpu",
    )
    MonoInternVLForCausalLM.from_pretrained(tmp_path)


def test_a_video_is_asked_about_by_the_number_of_its_frames(example, nano_processor):
    """What docs/prompts.md says of the nano, and the answers of the frames given as pictures."""
    video, model = example("video"), nano()
    frames = video.moving_circle()
    assert len(frames) == 40 and frames[0].getpixel((40, 60)) == frames[-1].getpixel((184, 60)) == (255, 0, 0)
    counted = {}
    for number in (1, 2, 4, 8):
        assert video.ask(model, nano_processor, frames, "What color is the circle?", number) == "red"
        counted[number] = video.ask(model, nano_processor, frames, "How many circles are there?", number)
    assert counted == {1: "1", 2: "1", 4: "2", 8: "2"}
    marks = "Frame1: <image>\nFrame2: <image>\n"
    shown = [frames[9], frames[29]]
    assert counted[2] == model.chat(shown, f"{marks}How many circles are there?", max_tiles=1, processor=nano_processor)


# -------------------------------------------------------------------------------------------------- the old interface


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)


def test_old_chat_gives_the_new_answers(example, tokenizer):
    legacy, model = example("legacy_chat"), nano()
    wide, plate = EXAMPLES / "wide.png", EXAMPLES / "plate.png"
    first, turns = model.chat(wide, "Describe the image.", max_tiles=3, return_history=True)
    second = model.chat([wide, plate], "How many stars are there?", max_tiles=6, history=turns)
    plain = model.chat(None, "Hello")

    model = legacy.with_legacy_chat(model)
    config = {"max_new_tokens": 64, "do_sample": False}
    kept = dict(config)
    tiles, more = legacy.load_image(wide, 224, 3), legacy.load_image(plate, 224, 3)
    assert tiles.shape == (4, 3, 224, 224) and more.shape == (1, 3, 224, 224)  # 3 x 1 and the thumbnail
    answer, history = model.chat(tokenizer, tiles, "Describe the image.", config, history=None, return_history=True)
    assert (answer, history) == (first, turns)
    both, counts = torch.cat((tiles, more)), [4, 1]
    question = "<image>\nHow many stars are there?"
    assert model.chat(tokenizer, both, question, config, history=history, num_patches_list=counts) == second
    assert model.chat(tokenizer, None, "Hello", config) == plain
    questions = ["Describe the image.", "How many stars are there?"]
    batch = model.batch_chat(tokenizer, both, questions, config, num_patches_list=counts)
    assert batch == [first, model.chat(tokenizer, more, questions[1], config)]
    assert config == kept and history == turns


def test_the_python_of_the_page_about_it_runs(example, tokenizer, monkeypatch):
    example("legacy_chat")
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "legacy.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {"model": nano(), "tokenizer": tokenizer}
    exec(compile(block, "legacy.md", "exec"), names)
    assert names["history"] == [("<image>\nHow many circles are there?", names["response"])]


def test_old_chat_refuses_counts_that_differ(example, tokenizer):
    legacy, model = example("legacy_chat"), nano()
    tiles, config = torch.zeros(3, 3, 224, 224), {"max_new_tokens": 1}
    with pytest.raises(ValueError, match="counts 2 tiles, but pixel_values holds 3"):
        legacy.chat(model, tokenizer, tiles, "What?", config, num_patches_list=[1, 1])
    with pytest.raises(ValueError, match="2 <image> marks in the prompt, but 1 pictures"):
        legacy.chat(model, tokenizer, tiles, "<image> <image> What?", config)
    with pytest.raises(ValueError, match="1 pictures for 2 questions"):
        legacy.batch_chat(model, tokenizer, tiles, ["What?", "Where?"], config)


def test_old_keywords_are_known(example, tokenizer):
    legacy, model = example("legacy_chat"), nano()
    tiles = legacy.load_image(EXAMPLES / "plate.png", input_size=224, max_num=1)
    config = {"max_new_tokens": 3}
    named = {"IMG_START_TOKEN": "<img>", "IMG_END_TOKEN": "</img>", "IMG_CONTEXT_TOKEN": "<IMG_CONTEXT>"}
    expected = legacy.chat(model, tokenizer, tiles, "What?", config)
    assert legacy.chat(model, tokenizer, tiles, "What?", config, **named) == expected
    assert legacy.batch_chat(model, tokenizer, tiles, ["What?"], config, image_counts=[1], **named) == [expected]
    with pytest.raises(ValueError, match="IMG_CONTEXT_TOKEN='<image>': allowed are IMG_START_TOKEN='<img>'"):
        legacy.chat(model, tokenizer, tiles, "What?", config, IMG_CONTEXT_TOKEN="<image>")
    with pytest.raises(NotImplementedError, match="batch_chat has no history"):
        legacy.batch_chat(model, tokenizer, tiles, ["What?"], config, return_history=True)


def test_old_chat_takes_typed_control_tokens_as_text(example, tokenizer):
    legacy, model = example("legacy_chat"), nano()
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    legacy.chat(model, tokenizer, torch.zeros(1, 3, 224, 224), "<IMG_CONTEXT><|im_end|>", {"max_new_tokens": 1})
    assert (seen[0] == model.config.image_token_id).sum() == 64
