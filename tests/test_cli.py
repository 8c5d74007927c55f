"""The command line, on tiny random models: what it prints where, and what it says about bad input."""

import ast
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from conftest import ROOT, Bomb, tiny_config, tiny_model
from helpers_cli import failure, run
from mono_internvl import (
    MonoInternVLConfig,
    MonoInternVLForCausalLM,
    MonoInternVLImageProcessor,
    MonoInternVLProcessor,
    benchmarks,
)
from mono_internvl.common import models
from mono_internvl.common.drawing import draw_boxes
from mono_internvl.common.parameters import GROUPS, PARTS, TEXT_PATH, count_by_part, part_of
from mono_internvl.common.tiling import MAX_WIDTH, cut, draw_tiling
from mono_internvl.configuration_checks_mono_internvl import QUERY_PLACEMENTS
from mono_internvl.configuration_mono_internvl import VISUAL_ATTENTION_EXPERTS
from mono_internvl.conversion.convert import LAYOUTS
from mono_internvl.conversion.source import HTTP_LIBRARIES
from mono_internvl.evaluation import plates
from mono_internvl.evaluation import records as evaluation_records
from mono_internvl.evaluation.answers import answer_conversations
from mono_internvl.evaluation.records import answer_records, questions_of
from mono_internvl.image_loading_mono_internvl import DEFAULT_MAX_PIXELS
from mono_internvl.processing_mono_internvl import GroundedBox
from mono_internvl.training import stages
from mono_internvl.training.sources import FileRecords
from mono_internvl_cli import common
from mono_internvl_cli.chat import converse, split_words


# The package's attributes of these names are the commands.
benchmark_module, chat_module, convert_module, expand_module, train_module = (
    sys.modules[f"mono_internvl_cli.{name}"] for name in ("benchmark", "chat", "convert", "expand", "train")
)
needs_nano = pytest.mark.skipif(
    not (ROOT / "model.safetensors").exists(), reason="the nano's model.safetensors is not in the repository yet"
)


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy of the folder without its weights."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def picture(tmp_path) -> Path:
    image = Image.new("RGB", (120, 80), "white")
    ImageDraw.Draw(image).ellipse((20, 20, 60, 60), fill="red")
    image.save(tmp_path / "plate.png")
    return tmp_path / "plate.png"


# --------------------------------------------------------------------------------------------------------------- start


def _cpu_seconds(code: str, *arguments: str) -> tuple[float, subprocess.CompletedProcess]:
    """User and system time of a fresh interpreter that runs `code`, its start included."""
    code = f"import atexit, sys, time\natexit.register(lambda: print(time.process_time(), file=sys.stderr))\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    return float(done.stderr.splitlines()[-1]), done


@pytest.fixture(scope="module")
def fast() -> float:
    """The CPU seconds that help and wrong usage may take."""
    seconds, _ = min((_cpu_seconds("import transformers") for _ in range(2)), key=lambda pair: pair[0])
    return max(1.0, 1.5 * seconds)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("--help", 0, "chat"),
        ("chat --help", 0, "--max-tiles"),
        ("train --help", 0, "--resume"),
        ("serve --help", 0, "--allow-private-network"),
        ("", 2, "Usage"),
        ("paint", 2, "No such command 'paint'"),
        ("chat --modle x Hi", 2, "--modle"),
        ("chat Hi --dtype int8", 2, "int8 is not one of"),
        ("chat Hi --max-tiles many", 2, "auto or a whole number"),
        ("tiles a.png", 2, "--out"),
        ("expand a b --visual-attention-experts kv", 2, "none, qkv, qkvo"),
        ("convert a b --to ours", 2, "official, native"),
        ("benchmark speed", 2, "preprocess, routing"),
        ("train --list", 0, "nano/s2_instruction"),
        ("train", 2, "nano/s2_instruction"),
        ("train nano/txt", 1, "no recipe nano/txt; did you mean nano/text?"),
        ("train mine.yaml", 1, "no recipe mine.yaml"),
        ("train nano/text --stepps 3", 2, "no such option: --stepps; did you mean --steps?"),
        ("train nano/text --steps", 2, "--steps needs a value"),
    ],
)
def test_help_and_wrong_usage_do_not_wait_for_the_library(arguments, status, said, fast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (
        "import mono_internvl_cli\n"
        "try: mono_internvl_cli.main()\n"
        "finally: assert not {'mono_internvl', 'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)"
    )
    seconds, done = _cpu_seconds(code, *arguments.split())
    assert done.returncode == status, done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
    assert seconds <= fast


def test_what_the_commands_repeat_is_the_librarys():
    assert tuple(models.DTYPES) == common.DTYPES
    assert models.FLOAT16 == common.FLOAT16
    assert common.DEFAULT_MAX_PIXELS == DEFAULT_MAX_PIXELS
    assert common.HTTP_LIBRARIES == HTTP_LIBRARIES
    assert benchmark_module.PARTS == benchmarks.PARTS
    assert convert_module.LAYOUTS == LAYOUTS
    assert expand_module.VISUAL_ATTENTION_EXPERTS == VISUAL_ATTENTION_EXPERTS
    assert expand_module.QUERY_PLACEMENTS == QUERY_PLACEMENTS
    assert tuple(field.name for field in dataclasses.fields(stages.Stage)) == train_module.KEYS
    assert train_module.recipe_names() == stages.recipe_names() != []


def test_errors_are_one_line_of_bearable_length():
    assert common.one_line(ValueError("two\n  lines")) == "two lines"
    assert common.one_line(KeyError()) == "KeyError"
    assert common.one_line(MemoryError()) == "out of memory (MemoryError)"
    long = common.one_line(OSError("long " * 500))
    assert len(long) < 650 and long.startswith("long long") and long.endswith("--debug)")


def test_the_library_neither_imports_its_command_line_nor_prints():
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).parts[0]
        if room in ("cli", "tests", "examples", "build", "__main__.py") or room.startswith("."):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any({"cli", "mono_internvl_cli", "rich"} & set(name.split(".")) for name in imported), file
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), file


def test_an_import_that_fails_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mono_internvl.common.models", None)
    assert "mono_internvl.common.models" in failure("chat", "Hi")


def test_python_m_runs_the_commands(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mono_internvl", "chat", "missing.png", "What?"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: no such picture: missing.png\n"


@pytest.mark.parametrize("arguments", [("chat", "--modle", "x", "Hi"), ("paint",), ("inspect",), ("tiles", "a.png")])
def test_wrong_usage_is_status_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("Usage: ") and "\nError: " in result.stderr


def test_debug_raises(tmp_path):
    result = run("--debug", "inspect", tmp_path / "none")
    assert isinstance(result.exception, models.ModelError)
    result = run("inspect", tmp_path / "none", env={"MONO_INTERNVL_DEBUG": "1"})
    assert isinstance(result.exception, models.ModelError)


# ---------------------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize(
    "options", [(), ("--stream",), ("--temperature", "0.7", "--top-p", "0.9"), ("--max-tiles", "1")]
)
def test_chat_prints_the_answer_alone(folder, picture, options):
    result = run("chat", picture, "What is it?", "--model", folder, "--max-new-tokens", 4, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.endswith("\n")


def test_chat_streams_what_it_would_print(folder, picture):
    command = ("chat", picture, picture, "What is it?", "--model", folder, "--max-new-tokens", 12)
    assert run(*command, "--stream").stdout == run(*command, "--no-stream").stdout


def test_chat_answers_as_the_model_does(folder, picture):
    model = MonoInternVLForCausalLM.from_pretrained(folder)
    result = run("chat", picture, "What is it?", "--model", folder, "--max-new-tokens", 8, "--dtype", "float32")
    assert result.stdout == model.chat(picture, "What is it?", max_new_tokens=8) + "\n"


def test_chat_text_only_and_prompt_from_stdin(folder):
    given = run("chat", "Hello", "--model", folder, "--max-new-tokens", 4)
    piped = run("chat", "--model", folder, "--max-new-tokens", 4, input="Hello")
    assert given.exit_code == piped.exit_code == 0
    assert given.stdout == piped.stdout


def test_chat_bad_pictures(tmp_path, folder, picture):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:600])
    for name, reason in (
        ("missing.png", "no such picture"),
        ("missing", "no such picture"),
        ("text.png", "not a picture"),
        ("empty.jpg", "0 bytes"),
        ("cut.jpg", "damaged or truncated"),
        (".", "folder"),
    ):
        message = failure("chat", tmp_path / name, "What is it?", "--model", folder)
        assert reason in message and str(tmp_path / name) in message
    assert "max_pixels" in failure("chat", picture, "What?", "--model", folder, "--max-pixels", 100)
    # Pictures are looked at before a model is.
    assert "no such picture" in failure("chat", "missing.png", "What?", "--model", "nobody/nothing")


def test_chat_bad_prompts(folder, picture):
    assert "prompt is empty" in failure("chat", picture, " ", "--model", folder)
    assert "prompt is empty" in failure("chat", picture, "--model", folder, input="")
    assert "2 <image> marks" in failure("chat", picture, "<image> or <image>?", "--model", folder)
    long = failure("chat", "word " * 2000, "--model", folder)
    assert "limit of 512" in long


def test_chat_wrong_usage(folder, picture, tmp_path):
    for arguments, reason in (
        (("What is it?", picture), "pictures come first"),
        (("What is it?", "--draw", tmp_path / "o.png"), "exactly one picture"),
        (("Hi", "--top-p", "0.5"), "--temperature"),
        (("Hi", "--dtype", "int8"), "not one of"),
        (("Hi", "--max-tiles", "0"), "--max-tiles"),
        (("Hi", "--temprature", "1"), "--temperature"),
    ):
        result = run("chat", *arguments, "--model", folder)
        assert result.exit_code == 2, result.output
        assert reason.lower() in " ".join(result.stderr.split()).lower()


def test_chat_refuses_float16_and_unknown_devices(folder):
    assert "overflow to NaN" in failure("chat", "Hi", "--model", folder, "--dtype", "float16")
    assert "'gpu'" in failure("chat", "Hi", "--model", folder, "--device", "gpu")
    if not torch.cuda.is_available():
        assert "CUDA" in failure("chat", "Hi", "--model", folder, "--device", "cuda")


def test_the_question_of_attention_is_no_file(folder, picture, tmp_path):
    result = run("attention", picture, "other.png", "-o", tmp_path / "o.png", "--model", folder)
    assert result.exit_code == 2 and "other.png names a file" in " ".join(result.stderr.split())


def test_split_words(picture):
    assert split_words([]) == ([], None)
    assert split_words(["Hello"]) == ([], "Hello")
    assert split_words([str(picture)]) == ([str(picture)], None)
    assert split_words([str(picture), "https://a/b", "Why?"]) == ([str(picture), "https://a/b"], "Why?")
    assert split_words(["x.png"]) == (["x.png"], None)
    assert split_words(["What is in x.png?"]) == ([], "What is in x.png?")
    assert split_words(["a" * 5000]) == ([], "a" * 5000)


@pytest.mark.parametrize(
    "word",
    [
        *(
            "missing.png",
            "my photo.png",
            "no/my photo.jpg",
            "What is x.png",
            "scan.pdf",
            "clip.mp4",
            "IMG_1.HEIC",
            "x.cr2",
        ),
        *("*.png", "*", "pics/*", "pics/", "./x", "../x", "~/x", "/no/such", "C:\\pics\\a", "pics\\cat", "notes.md"),
        *("'missing.png'", "missing.png ", "file:///x/y", "s3://bucket/a"),
    ],
)
def test_what_was_meant_as_a_file_is_never_the_prompt(word, folder, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ([word], [picture, word]):
        message = failure("chat", *words, "--model", folder, input="")
        assert word.strip().strip("'") in message
    # Said to be the prompt, it is.
    assert run("chat", "--prompt", word, "--model", folder, "--max-new-tokens", 1).exit_code == 0


@pytest.mark.parametrize("name", ["Hello", "folder"])
def test_a_word_that_is_an_existing_name_is_that_file(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "Hello").write_text("no picture")
    message = failure("chat", name, "--model", folder, input="")
    assert name in message and "--prompt" in message
    assert run("chat", "-p", name, "--model", folder, "--max-new-tokens", 1).exit_code == 0


@pytest.mark.parametrize(
    "prompt",
    [
        "What is in plate.png?",
        "and/or?",
        "1/2+1/3=?",
        "3.14",
        "U.S.",
        "e.g.",
        "这是什么/哪里",
        "a*b=?",
        "<image>",
        "Describe it.",
    ],
)
def test_prompts_that_look_a_little_like_files_are_prompts(prompt):
    assert split_words([prompt]) == ([], prompt)


def test_pictures_and_prompt_by_option_and_from_stdin(folder, picture):
    model = ("--model", folder, "--max-new-tokens", 4)
    expected = run("chat", picture, "What is it?", *model).stdout
    for arguments, given in (
        (("--image", picture, "What is it?"), None),
        (("-i", picture, "-p", "What is it?"), None),
        ((picture, "--prompt", "What is it?"), None),
        ((picture, "-"), "What is it?"),
        ((picture, "-p", "-"), "What is it?"),
        ((picture,), "What is it?"),
    ):
        result = run("chat", *arguments, *model, input=given)
        assert (result.stdout, result.stderr) == (expected, ""), arguments
    result = run("chat", "--image", picture, picture, "What is it?", *model)
    assert result.exit_code == 2 and "an --image of its own" in " ".join(result.stderr.split())
    assert "stdin" in failure("chat", "-", "What is it?", *model)
    assert "it names a file: missing.png" in failure("chat", *model, input="missing.png\n")
    assert "not text" in failure("chat", picture, *model, input=b"\x89PNG\r\n\xff\xfe")
    assert "the prompt is one word, in quotes" in failure("chat", "What", "is", "it?", *model)
    assert run("chat", "Hi", "--temperature", "nan", *model).exit_code == 2


def test_the_word_image_is_a_word(folder, picture, monkeypatch):
    """Without pictures, and with them where one says so; else marks and pictures are counted."""
    asked = []
    processor = MonoInternVLProcessor.from_pretrained(folder)

    class Model:
        def chat(self, images, prompt, **options):
            asked.append((len(images), prompt))
            return "yes", []

    monkeypatch.setattr(chat_module, "load_model", lambda *args, **kwargs: (Model(), processor))
    assert run("chat", "What does <image> do?").exit_code == 0
    assert run("chat", picture, "Is <image> like <image>?", "--literal").exit_code == 0
    assert asked == [(0, "What does <image> do?"), (1, [{"type": "text", "text": "Is <image> like <image>?"}])]
    message = failure("chat", picture, "Is <image> like <image>?")
    assert "2 <image> marks" in message and "--literal" in message


# --------------------------------------------------------------------------------------------------------------- model


def test_missing_models(tmp_path):
    assert "no such model folder" in failure("chat", "Hi", "--model", tmp_path / "none")
    assert "no config.json" in failure("chat", "Hi", "--model", tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in failure("inspect", tmp_path / "file")
    assert "owner/name" in failure("inspect", "nonsense")


def test_folder_without_weights(broken):
    message = failure("chat", "Hi", "--model", broken)
    assert "model.safetensors" in message and str(broken) in message


def test_damaged_weights(broken, folder):
    whole = (folder / "model.safetensors").read_bytes()
    for data in (whole[:5000], b"no safetensors at all", b""):
        (broken / "model.safetensors").write_bytes(data)
        message = failure("chat", "Hi", "--model", broken)
        assert f"{broken / 'model.safetensors'} is damaged" in message


def test_damaged_config_and_tokenizer(broken):
    text = (broken / "tokenizer.json").read_text(encoding="utf-8")
    (broken / "tokenizer.json").write_text(text[:1000], encoding="utf-8")
    assert str(broken) in failure("chat", "Hi", "--model", broken)
    (broken / "config.json").write_text("{")
    assert "config.json" in failure("inspect", broken)


def test_missing_shard(broken, folder):
    shards = broken / "shards"
    MonoInternVLForCausalLM.from_pretrained(folder).save_pretrained(shards, max_shard_size="200KB")
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(names) > 1
    for path in shards.iterdir():
        if path.suffix != ".py" and path.name != names[0]:
            path.rename(broken / path.name)
    assert names[0] in failure("chat", "Hi", "--model", broken)


def test_pickle_never_runs_code(broken, tmp_path):
    mark = tmp_path / "executed"
    for writer in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        writer({"lm_head.weight": Bomb(mark)}, broken / "pytorch_model.bin")
        assert str(broken) in failure("chat", "Hi", "--model", broken)
        assert not mark.exists()


def test_image_token_that_the_tokenizer_does_not_mean(broken, folder):
    config = json.loads((broken / "config.json").read_text())
    config["image_token_id"] -= 3
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    message = failure("chat", "Hi", "--model", broken)
    right = config["image_token_id"] + 3
    assert f"--image-token-id {right}" in message
    assert run("chat", "Hi", "--model", broken, "--max-new-tokens", 2, "--image-token-id", right).exit_code == 0


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    """What PEFT's `save_pretrained` writes of an adapter that says something else than its base."""
    peft = pytest.importorskip("peft")
    model = MonoInternVLForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapter_folders_answer_as_the_adapted_model(folder, adapter, picture, tmp_path, monkeypatch):
    import peft

    base = MonoInternVLForCausalLM.from_pretrained(folder)
    plain = base.chat(picture, "What is it?", max_new_tokens=8)
    adapted = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    expected = adapted.chat(
        picture, "What is it?", max_new_tokens=8, processor=MonoInternVLProcessor.from_pretrained(folder)
    )
    assert expected != plain
    command = ("chat", picture, "What is it?", "--max-new-tokens", 8, "--dtype", "float32", "--model")
    assert run(*command, adapter).stdout == expected + "\n"
    # A processor of the adapter's own, as training writes it, is taken.
    MonoInternVLProcessor.from_pretrained(folder, max_tiles=1).save_pretrained(adapter)
    assert models.load_processor(str(adapter)).image_processor.max_tiles == 1
    # A relative base is found from where one stands, and beside the adapter.
    written = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "base").symlink_to(folder)
    for place, name in ((tmp_path, "base"), (tmp_path / "adapter", "../base"), (Path("/"), "../base")):
        monkeypatch.chdir(place)
        (adapter / "adapter_config.json").write_text(json.dumps({**written, "base_model_name_or_path": name}))
        assert run(*command, adapter).exit_code == 0


def test_merge_writes_a_model_of_its_own(folder, adapter, picture, tmp_path):
    out = tmp_path / "merged"
    result = run("merge", adapter, out)
    assert result.exit_code == 0 and "written to" in result.stderr, result.output
    command = ("chat", picture, "What is it?", "--max-new-tokens", 8, "--dtype", "float32", "--model")
    assert run(*command, out).stdout == run(*command, adapter).stdout
    assert MonoInternVLConfig.from_pretrained(out).dtype == MonoInternVLConfig.from_pretrained(folder).dtype
    run("merge", adapter, tmp_path / "rounded", "--dtype", "bfloat16")
    assert MonoInternVLConfig.from_pretrained(tmp_path / "rounded").dtype == torch.bfloat16
    assert run("merge", adapter, tmp_path / "other", "--dtype", "int8").exit_code == 2
    assert "overflow to NaN" in failure("merge", adapter, tmp_path / "other", "--dtype", "float16")
    assert "not an empty folder" in failure("merge", adapter, out)
    assert "no adapter_config.json" in failure("merge", folder, tmp_path / "other")


def test_adapters_without_what_they_need_are_refused_by_name(adapter, monkeypatch):
    file = adapter / "adapter_config.json"
    written = json.loads(file.read_text())

    def refusal(**changed) -> str:
        file.write_text(json.dumps({**written, **changed}))
        return failure("chat", "Hi", "--model", adapter)

    gone = refusal(base_model_name_or_path="/no/such/base")
    assert "/no/such/base" in gone and str(file) in gone
    assert "does not name the model" in refusal(base_model_name_or_path=None)
    assert "does not fit its base" in refusal(target_modules=["q_proj"])
    file.write_text("{")
    assert f"{file} is damaged" in failure("chat", "Hi", "--model", adapter)
    file.write_text(json.dumps(written))
    (adapter / "adapter_model.safetensors").rename(adapter / "away")
    assert "no adapter_model.safetensors" in failure("chat", "Hi", "--model", adapter)
    (adapter / "away").rename(adapter / "adapter_model.safetensors")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refusal()


# ---------------------------------------------------------------------------------------------------------------- draw


class _Answering:
    """Stands in for a model that grounds."""

    def __init__(self, answer):
        self.answer = answer

    def chat(self, images, prompt, *, history=None, keep_grounding_tags=False, **kwargs):
        assert keep_grounding_tags
        return self.answer, [(prompt, self.answer)]


@pytest.mark.parametrize("found", [True, False])
def test_draw(folder, picture, tmp_path, monkeypatch, found):
    answer = "<ref>circle</ref><box>[[150, 240, 520, 770]]</box>" if found else "no idea"
    processor = MonoInternVLProcessor.from_pretrained(folder)
    monkeypatch.setattr(chat_module, "load_model", lambda *args, **kwargs: (_Answering(answer), processor))
    out = tmp_path / "drawn.png"
    result = run("chat", picture, "Where?", "--model", folder, "--draw", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == answer + "\n"
    assert ("1 boxes drawn" if found else "no box in the answer") in result.stderr
    with Image.open(out) as drawn, Image.open(picture) as before:
        assert drawn.size == before.size
        assert (drawn.convert("RGB").tobytes() != before.convert("RGB").tobytes()) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.png", "plate.png"]


def test_draw_refuses_what_it_cannot_write(folder, picture, tmp_path):
    assert "ending" in failure("chat", picture, "Where?", "--model", folder, "--draw", tmp_path / "out.txt")
    assert "no such folder" in failure(
        "chat", picture, "Where?", "--model", folder, "--draw", tmp_path / "no" / "o.png"
    )


def test_boxes_stay_in_the_picture():
    picture = Image.new("RGB", (60, 40), "white")
    plain = GroundedBox("", (10.0, 10.0, 20.0, 20.0))
    assert draw_boxes(picture, [plain]).getpixel((10, 10)) == (255, 77, 79)
    boxes = [
        plain,
        GroundedBox("a label wider than the picture", (-5.0, 0.0, 90.0, 60.0)),
        GroundedBox("x", (50.0, 30.0, 40.0, 20.0)),
        GroundedBox("星", (0.0, 0.0, 0.0, 0.0)),
    ]
    assert draw_boxes(picture, boxes).size == picture.size
    assert picture.getcolors() == [(60 * 40, (255, 255, 255))]


# ------------------------------------------------------------------------------------------------------------ dialogue


def test_dialogue_keeps_history_and_survives_mistakes(monkeypatch, capsys, picture, tmp_path):
    lines = iter(
        [
            "First?",
            "",
            f"/image {tmp_path / 'none.png'}",
            f"/image {picture}",
            "/image",
            str(picture),
            "other.png",
            "/help",
            "fail",
            "Second?",
            "/reset",
            "3?",
        ]
    )
    calls = []

    def read():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def answer(pictures, prompt, *, history, return_history, streamer, **options):
        if prompt == "fail":
            raise ValueError("the model\nrefuses")
        calls.append((len(pictures), prompt, list(history or [])))
        streamer("pie")
        streamer("ces")
        return "pieces", [*(history or []), (prompt, "pieces")]

    monkeypatch.setattr(chat_module, "_read_line", read)
    converse(answer, [], {}, True, 10**6)
    assert calls == [
        (0, "First?", []),
        (1, "Second?", [("First?", "pieces")]),
        (0, "3?", []),
    ]
    printed = capsys.readouterr()
    assert printed.out == "pieces\n" * 3
    assert "error: the model refuses" in printed.err
    assert "no such picture" in printed.err and "picture 1: 120 x 80 px" in printed.err
    assert "/image needs a file or URL" in printed.err
    assert f"{picture} names a file" in printed.err and "other.png names a file" in printed.err


# --------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("size", [(640, 240), (60, 900), (300, 300), (1, 1), (4000, 30)])
@pytest.mark.parametrize("options", [{}, {"use_thumbnail": False}, {"tile_size": 28, "max_tiles": 39}])
def test_tiles_drawing_fits(size, options):
    processor = MonoInternVLImageProcessor(**options)
    tiling, seen = cut(Image.new("RGB", size, "gray"), processor)
    assert tiling.tiles == len(seen) == processor.get_number_of_tiles(size[1], size[0])
    drawing = draw_tiling("a name that is far too long for its line " * 5, tiling, seen)
    assert drawing.width <= MAX_WIDTH
    assert drawing.height <= 2000


def test_tiles_are_what_the_model_gets():
    image = Image.effect_noise((224, 112), 80).convert("RGB")
    tiling, seen = cut(image, MonoInternVLImageProcessor(tile_size=112, max_tiles=2))
    assert (tiling.cols, tiling.rows, tiling.visual_tokens) == (2, 1, 3 * 16)
    assert seen[0].tobytes() == image.crop((0, 0, 112, 112)).tobytes()
    assert seen[1].tobytes() == image.crop((112, 0, 224, 112)).tobytes()


def test_tiles_command(picture, tmp_path, folder):
    out = tmp_path / "out.png"
    result = run("tiles", picture, "-o", out, "--tile-size", 56, "--max-tiles", 6)
    assert result.exit_code == 0, result.stderr
    assert "3 x 2 tiles of 56 px + thumbnail = 7 tiles" in result.stdout
    assert "28 visual tokens = 7 x (56/28)^2" in result.stdout
    assert Image.open(out).width > 120
    assert "tiles of 56 px" in run("tiles", picture, "-o", out, "--model", folder).stdout


@pytest.mark.parametrize("size", [(50, 50), (112, 56), (56, 140), (320, 240), (2000, 1400)])
def test_tiles_draws_auto_as_the_processor_cuts(size, tmp_path, folder):
    """Also with a model whose number is 4, which auto does not exceed."""
    path, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", size, "gray").save(path)
    for options, processor in (
        (("--tile-size", 56), MonoInternVLImageProcessor(tile_size=56)),
        (("--model", folder), MonoInternVLProcessor.from_pretrained(folder).image_processor),
    ):
        result = run("tiles", path, "-o", out, "--max-tiles", "auto", *options)
        tiles = processor.get_number_of_tiles(size[1], size[0], max_tiles="auto")
        assert f"{tiles * 4:,} visual tokens = {tiles} x (56/28)^2" in result.stdout, result.stderr
        cols, rows = processor.grid_of(*size, max_tiles="auto")
        assert (f"{cols} x {rows} tiles of 56 px" if cols * rows > 1 else "1 tile of 56 px") in result.stdout


@pytest.mark.parametrize("command", ["chat", "tiles", "evaluate", "attention"])
@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "Auto", "many", "", "1_0", "²"])
def test_max_tiles_is_auto_or_a_number_in_every_command(command, wrong):
    result = run(command, "--max-tiles", wrong)
    assert result.exit_code == 2
    assert "give auto or a whole number of at least 1" in " ".join(result.stderr.replace("│", " ").split())
    assert "N|auto" in run(command, "--help").stdout


def test_every_max_tiles_is_the_shared_option():
    """One rule of reading for all commands, those to come too; `attention` and `evaluate` are heard below."""
    found = {}
    for path in sorted((ROOT / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg) and node.arg == "max_tiles":
                found[path.stem] = ast.unparse(node.annotation)
    assert found.pop("export") == "MaxTilesNumberOption"  # a GGUF file has no "auto"
    assert found.keys() >= {"attention", "chat", "evaluate", "tiles"} and set(found.values()) == {"MaxTilesOption"}
    assert (common.read_max_tiles("auto"), common.read_max_tiles(" 7 ")) == ("auto", 7)


def test_max_tiles_auto_reaches_the_model(picture, folder, tmp_path, monkeypatch):
    Image.new("RGB", (56, 56), "gray").save(tmp_path / "small.png")
    seen = []
    original = MonoInternVLProcessor.apply_chat_template
    monkeypatch.setattr(
        MonoInternVLProcessor,
        "apply_chat_template",
        lambda *args, **kwargs: seen.append(kwargs["processor_kwargs"]["max_tiles"]) or original(*args, **kwargs),
    )
    auto = ("--model", folder, "--max-tiles", "auto")
    assert run("chat", tmp_path / "small.png", "Hi", "--max-new-tokens", 1, *auto).exit_code == 0
    run("attention", tmp_path / "small.png", "Hi", "-o", tmp_path / "out.png", "--max-new-tokens", 2, *auto)
    assert run("evaluate", "--count", 6, *auto).exit_code == 0
    assert len(seen) >= 3 and set(seen) == {"auto"}


def test_tiles_bad_input(picture, tmp_path):
    out = tmp_path / "out.png"
    assert "no such picture" in failure("tiles", tmp_path / "none.png", "-o", out)
    assert "multiple of 28" in failure("tiles", picture, "-o", out, "--tile-size", 100)
    assert "min_tiles" in failure("tiles", picture, "-o", out, "--min-tiles", 5, "--max-tiles", 2)
    assert "ending" in failure("tiles", picture, "-o", tmp_path / "out")
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_the_released_size():
    facts = json.loads(run("inspect", "2b", "--json").stdout)
    assert facts["total"] == 3_111_355_392
    assert facts["text_path"] == 1_889_146_880
    assert facts["groups"] == {
        "token embedding": 189_548_544,
        "output head": 189_548_544,
        "attention": 301_989_888,
        "text FFN (T-experts)": 1_207_959_552,
        "visual FFN (V-experts)": 1_207_959_552,
        "norms": 100_352,
        "patch embedding + positions": 1_653_760,
        "projector MLP": 12_595_200,
    }
    assert facts["dtype"] == "bfloat16"
    assert facts["config"]["tokens_per_tile"] == 256 and facts["config"]["expert_kernel"] == "auto"
    assert facts["expert_kernel_refusal"] or torch.cuda.is_available()


def test_inspect_prints_a_table(folder):
    result = run("inspect", folder)
    assert result.exit_code == 0, result.stderr
    assert "visual FFN (V-experts)" in result.stdout and "text path" in result.stdout


@pytest.mark.parametrize("experts", ["none", "qkv", "qkvo"])
def test_groups_hold_every_parameter(experts):
    model = tiny_model(visual_attention_experts=experts)
    groups = count_by_part(model)
    class_row = model.model.vision_embeddings.class_embedding.numel()
    assert sum(groups.values()) == sum(p.numel() for p in model.parameters()) + class_row
    # q and o are 64 x 64, k and v 32 x 64, in 3 layers.
    own = {"none": None, "qkv": 3 * (64 * 64 + 2 * 32 * 64), "qkvo": 3 * (2 * 64 * 64 + 2 * 32 * 64)}
    assert groups.get("visual attention experts") == own[experts]
    assert set(TEXT_PATH) < set(groups)
    assert {part.group for part in PARTS} == set(GROUPS)


def test_a_parameter_of_no_part_is_refused():
    with pytest.raises(ValueError, match="model.adapter.weight belongs to no known part"):
        part_of("model.adapter.weight")


def test_groups_count_tied_matrices_once():
    tied = MonoInternVLForCausalLM(MonoInternVLConfig(**{**tiny_config().to_dict(), "tie_word_embeddings": True}))
    assert count_by_part(tied)["output head"] == 0


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_bad_input(tmp_path):
    model_file = tmp_path / "tokenizer.model"
    assert str(model_file) in failure("tokenizer", model_file, tmp_path / "out")
    model_file.write_bytes(b"nothing of the kind")
    assert str(model_file) in failure("tokenizer", model_file, tmp_path / "out")
    assert "folder" in failure("tokenizer", tmp_path, tmp_path / "out")
    assert "is a file" in failure("tokenizer", model_file, model_file)
    (tmp_path / "tokenizer.json").write_text("mine")
    assert "--force" in failure("tokenizer", model_file, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


def test_tokenizer_prints_the_number_of_tokens(tmp_path, monkeypatch):
    class Built:
        def get_vocab_size(self):
            return 92553

    def convert(model_file, folder, *, progress):
        progress(10, 20)
        return Built()

    monkeypatch.setattr("mono_internvl.tokenization.convert_tokenizer", convert)
    (tmp_path / "tokenizer.json").write_text("old")
    result = run("tokenizer", tmp_path / "tokenizer.model", tmp_path, "--force")
    assert result.exit_code == 0
    assert result.stdout == f"92,553 tokens -> {tmp_path / 'tokenizer.json'}\n"
    assert result.stderr == ""


# ------------------------------------------------------------------------------------------------------------ evaluate


def _examples(count):
    sizes = ((56, 56), (200, 90), (60, 160))
    for i in range(count):
        question = "What color is the circle, and where is it?" if i % 2 else "What color is it?"
        yield Image.effect_noise(sizes[i % 3], 60).convert("RGB"), "color", question, "red"


def test_batches_answer_as_chat_does(folder):
    model = MonoInternVLForCausalLM.from_pretrained(folder).eval()
    processor = MonoInternVLProcessor.from_pretrained(folder)
    examples = list(_examples(7))
    seen = []
    results = plates.evaluate(model, processor, examples, batch_size=3, max_new_tokens=6, progress=seen.append)
    assert [outcome.place for outcome in results.outcomes] == list(range(7))
    assert seen[-1] == 7
    for outcome, (picture, _, question, _) in zip(results.outcomes, examples, strict=True):
        assert outcome.given == model.chat(picture, question, max_new_tokens=6)
    assert results.scores == {"color": (0, 7)}
    assert len(results.errors) == 7


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["speed"], 2, "no such benchmark: speed; allowed are preprocess, routing"),
        (["all", "prefill"], 2, "one of all and picture alone"),
        (["picture"], 2, "picture needs --json FILE"),
        (["prefill", "--picture", "x.jpg"], 1, "must end in .png, .svg, .pdf"),
        (["decode", "--picture", "x.png"], 2, "drawn from the part prefill"),
        (["decode", "--json", "."], 1, "it is a folder"),
        (["decode", "--json", "nowhere/x.json"], 1, "no such folder nowhere"),
        (["decode", "--device", "tpu"], 1, "'tpu' is not one of cpu, cuda"),
        (
            ["picture", "--json", "bad.json", "--picture", "x.png"],
            1,
            "bad.json is no report of mono-internvl benchmark",
        ),
        (["picture", "--json", "empty.json", "--picture", "x.png"], 1, "empty.json is no report"),
    ],
)
def test_benchmark_refuses_before_it_measures(tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("no JSON")
    (tmp_path / "empty.json").write_text("[]")
    result = run("benchmark", *arguments)
    assert result.exit_code == status and message in " ".join(result.stderr.split()), result.stderr


def test_devices_are_refused_by_name(folder, tmp_path):
    for device in ("meta", "xla", "cuda:9", "gpu"):
        assert f"device {device}" in failure("evaluate", "--model", folder, "--device", device).replace("'", "")
    assert "it is a folder" in failure("evaluate", "--model", folder, "--json", tmp_path)


def test_evaluate_command(folder, tmp_path):
    pytest.importorskip("matplotlib", reason="the evaluation pictures are drawn by matplotlib")
    out = tmp_path / "results.json"
    result = run(
        "evaluate", "--model", folder, "--count", 6, "--boxes", 2, "--json", out, "--show-errors", 1, "--max-tiles", 1
    )
    assert result.exit_code == 0, result.stderr
    assert "caption" in result.stdout and "expected 'circle'" in result.stdout
    assert "median IoU of the boxes: 0.000" in result.stdout
    written = json.loads(out.read_text())
    assert written["total"] == 8 and len(written["outcomes"]) == 8 and written["median_iou"] == 0
    assert set(written["categories"]) == {"shape", "color", "count", "number", "position", "caption", "box"}
    assert "no such folder" in failure("evaluate", "--model", folder, "--json", tmp_path / "no" / "out.json")


@pytest.fixture
def records(tmp_path) -> Path:
    """Six answers in three records: one of two turns, one of two pictures and one that is not learnt, one of text."""
    for i, size in enumerate(((56, 56), (200, 90), (60, 160))):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{i}.png")
    ask, answer = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}
    look = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " And "}, {"type": "image"}]}
    rows = [
        {"image": "0.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "Red."}] * 2},
        {"images": ["1.png", "2.png"], "messages": [look, answer, ask, {**answer, "train": False}, ask, answer]},
        {"messages": [{"role": "system", "content": "Be brief."}, ask, answer], "category": "color"},
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "records.jsonl"


def test_records_are_asked_as_chat_would_be(folder, records, monkeypatch):
    model = MonoInternVLForCausalLM.from_pretrained(folder).eval()
    processor = MonoInternVLProcessor.from_pretrained(folder)
    source = FileRecords(records)
    asked = [q for i in range(3) for q in questions_of(source[i].messages, source[i].category or "questions")]
    # Two of the first, of the second the learnt first and last, one of the third.
    assert [len(q.messages) for q in asked] == [1, 3, 1, 5, 2]
    assert [q.expected for q in asked] == ["Red.", "Red.", "red", "red", "red"]
    monkeypatch.setattr(evaluation_records, "MAX_NEW_TOKENS", 6)
    seen = []
    results = answer_records(model, processor, asked, batch_size=2, progress=seen.append)
    assert seen[-1] == 5 and [outcome.place for outcome in results.outcomes] == list(range(5))
    assert results.outcomes[2].question == "<image> And <image>" and results.outcomes[1].question == "Q"
    for outcome, q in zip(results.outcomes, asked, strict=True):
        alone = answer_conversations(model, processor, [q.messages], max_new_tokens=11)
        assert [outcome.given] == alone
    # What is right is right whatever its case and its period.
    given = iter(["red", "blue", "RED", "a red", "red."])
    monkeypatch.setattr(evaluation_records, "answer_conversations", lambda *_, **__: [next(given)])
    results = answer_records(model, processor, asked, batch_size=1)
    assert results.scores["color"][1] == 1 and sum(right for right, _ in results.scores.values()) == 3
    with pytest.raises(ValueError, match="no answer to ask for"):
        list(questions_of([{"role": "user", "content": "?"}]))


def test_evaluate_own_records(folder, records, tmp_path):
    out = tmp_path / "results.json"
    result = run("evaluate", "--model", folder, "--data", records, "--json", out, "--show-errors", 1, "--batch-size", 2)
    assert result.exit_code == 0, result.stderr
    assert "questions" in result.stdout and "expected 'Red.'" in result.stdout and "median" not in result.stdout
    written = json.loads(out.read_text())
    assert written["total"] == written["count"] == 5 and set(written["categories"]) == {"questions", "color"}
    assert written["data"] == str(records)
    # As `train` is told of a source; the first questions alone.
    source = f"[{{path: {records}, max_tiles: 1}}]"
    result = run("evaluate", "--model", folder, "--data", source, "--count", 3, "--json", out)
    assert result.exit_code == 0 and json.loads(out.read_text())["total"] == 3
    assert "no data file gone.jsonl" in failure("evaluate", "--model", folder, "--data", "gone.jsonl")
    records.write_text('{"messages": [{"role": "user", "content": "What?"}]}')
    assert "records.jsonl, line 1: the conversation holds no" in failure("evaluate", "--data", records)


@pytest.mark.parametrize("options", [["--boxes", 2], ["--seed", 0]])
def test_evaluate_refuses_the_plate_worlds_options_beside_records(records, options):
    result = run("evaluate", "--data", records, *options)
    assert result.exit_code == 2 and "leave them out" in " ".join(result.stderr.split())


# ---------------------------------------------------------------------------------------------------------------- nano


@needs_nano
def test_the_bundled_nano_answers_about_the_example():
    result = run("chat", ROOT / "examples" / "plate.png", "How many circles are there?")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "2\n"
    assert result.stderr == ""
