"""The examples run as their first lines say, at nano size, and do what they are for."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from conftest import ROOT
from helpers_cli import run
from mono_internvl import MonoInternVLForCausalLM
from mono_internvl.training.data import Collator
from mono_internvl.training.run import run_stage
from mono_internvl.training.sources import FileRecords


EXAMPLES, CONFIGS = ROOT / "examples", ROOT / "training" / "configs"
EASY_VQA = EXAMPLES / "easy_vqa"
PLATES = EXAMPLES / "plates.jsonl"
pytestmark = pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the nano is not in the repository")


@pytest.fixture
def example(monkeypatch):
    """Imports an example as a script's folder lets it be imported."""
    monkeypatch.syspath_prepend(str(EASY_VQA))
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


# ----------------------------------------------------------------------------------------------------------- easy-VQA


ANSWERED = [("what color is the shape?", "red"), ("is there a circle?", "yes"), ("what shape is present?", "circle")]
ANSWERED += [("is no teal shape present?", "yes"), ("is there a triangle?", "no")]


class FakeEasyVQA:
    """The functions of the package `easy_vqa`, over ten drawn pictures of training and two to test with."""

    def __init__(self, folder):
        self.paths = {"train": {}, "test": {}}
        for split, count in (("train", 10), ("test", 2)):
            (folder / split / "images").mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (64, 64), "white")
                ImageDraw.Draw(image).ellipse((10, 10, 20 + 3 * number, 20 + 3 * number), fill="red")
                self.paths[split][number] = str(folder / split / "images" / f"{number}.png")
                image.save(self.paths[split][number])

    def get_train_image_paths(self):
        return self.paths["train"]

    def get_test_image_paths(self):
        return self.paths["test"]

    def get_train_questions(self):
        return [list(column) for column in zip(*((q, a, i) for i in range(10) for q, a in ANSWERED), strict=True)]

    def get_test_questions(self):
        return [list(column) for column in zip(*((q, a, i) for i in (1, 0) for q, a in ANSWERED), strict=True)]


@pytest.fixture
def easy_vqa(example, tmp_path, monkeypatch):
    """A folder of the example's records, where `data/easy_vqa` is what its recipes name."""
    monkeypatch.setitem(sys.modules, "easy_vqa", FakeEasyVQA(tmp_path / "package"))
    monkeypatch.chdir(tmp_path)
    example("make_records").main(Path("data/easy_vqa"))
    return tmp_path / "data" / "easy_vqa"


def test_easy_vqa_becomes_records(easy_vqa):
    def rows(name):
        return [json.loads(line) for line in (easy_vqa / f"{name}.jsonl").read_text().splitlines()]

    train, val, test = rows("train"), rows("val"), rows("test")
    # Nine pictures of five questions, four in a record and one; a picture to choose by; two to test with.
    assert [len(row["conversations"]) for row in train] == [8, 2] * 9
    assert len(val) == 5 and len({row["image"] for row in val}) == 1 and len(test) == 10
    assert not {row["image"] for row in train} & {row["image"] for row in val}
    assert {row["category"] for row in test} == {"yes or no", "color", "shape"}
    assert all("image" not in row and len(row["conversations"]) == 2 for row in rows("blind_train"))
    assert len(rows("blind_train")) == 45 and len(rows("blind_test")) == 10
    source = FileRecords(easy_vqa / "train.jsonl")
    first = source[0].messages
    assert first[0]["content"][1]["image"] == str(easy_vqa / train[0]["image"])
    assert (easy_vqa / train[0]["image"]).stat().st_size and [m["role"] for m in first] == ["user", "assistant"] * 4
    assert sum(m["content"][-1:] == [{"type": "image"}] for m in first) == 0


def test_easy_vqa_of_the_package(example):
    # The example's folder has the package's name, and is found where the package is not.
    package = importlib.import_module("easy_vqa")
    if package.__file__ is None:
        pytest.skip("easy-vqa, the data set's package, is not installed")
    make = example("make_records")
    questions = make.by_picture(*package.get_train_questions())
    assert len(questions) == 4000 and sum(map(len, questions.values())) == 38575
    assert {make.category_of(answer) for asked in questions.values() for _, answer in asked} == {
        *("yes or no", "color", "shape")
    }


def test_easy_vqa_trains_scores_and_is_drawn(example, easy_vqa, tmp_path):
    pytest.importorskip("matplotlib")
    for name, trains in (("easy_vqa", "trains"), ("easy_vqa_lora", "adapters of 236,544 train")):
        lines: list[str] = []
        changes = {"steps": 1, "batch_size": 2, "save_steps": 1, "log_steps": 1}
        run_stage(EASY_VQA / f"{name}.yaml", changes, write=lines.append)
        states = {line.split()[0]: line.split(maxsplit=2)[2] for line in lines[1:5]}
        others = {"trains"} if name == "easy_vqa" else {"frozen"}
        assert states.pop("visual_experts") == trains and set(states.values()) == others
        for model in (f"runs/{name}/model", f"runs/{name}/checkpoint-1"):
            scores = tmp_path / "runs" / name / "val-1.json"
            result = run("evaluate", "--model", model, "--data", "data/easy_vqa/val.jsonl", "--json", scores)
            assert result.exit_code == 0, result.stderr
            assert json.loads(scores.read_text())["total"] == 5
    curves = example("curves")
    curves.main(tmp_path / "runs", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (900, 360)
    assert [step for step, _ in curves.accuracies(tmp_path / "runs" / "easy_vqa")] == [1]
    with pytest.raises(typer.BadParameter, match="holds no run of easy_vqa"):
        curves.main(tmp_path / "data", tmp_path / "none.png")


def test_what_the_question_alone_gives(example, easy_vqa, capsys):
    baselines = example("baselines")
    train = [("a?", "yes")] * 3 + [("a?", "no"), ("b?", "no")]
    found = baselines.shares(train, [("a?", "yes"), ("b?", "yes"), ("b?", "no"), ("c?", "yes")])
    assert list(found.values()) == [1 / 2, 3 / 4, 3 / 4]
    baselines.main(easy_vqa)
    assert capsys.readouterr().out.splitlines()[-1].endswith("100.0%")
