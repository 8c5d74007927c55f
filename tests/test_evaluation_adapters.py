"""The paper's settings, and the harnesses themselves on a made-up data set where they are installed.

Each harness has an environment of its own; elsewhere its tests are skipped and say so.
"""

import base64
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from conftest import ROOT
from mono_internvl.common.models import load_model, resolve_model
from mono_internvl.evaluation import settings
from mono_internvl.evaluation.settings import (
    CHOICE,
    CHOICE_CHINESE,
    SHORT,
    Setting,
    ask,
    paper_parts,
    paper_prompt,
    setting_for,
)


def needs(module: str):
    found = importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not found, reason=f"{module} has an environment of its own, see docs/evaluation.md")


PLATE = ROOT / "examples" / "plate.png"


@pytest.mark.parametrize(
    ("name", "max_tiles"),
    [
        *[(name, 24) for name in ("InfoVQA_VAL", "infovqa_test", "OCRBench", "ocrbench", "HRBench4K")],
        *[(name, 18) for name in ("DocVQA_TEST", "docvqa_val")],
        *[(name, 12) for name in ("ChartQA_TEST", "MMMU_DEV_VAL", "mmmu_val", "MME-RealWorld", "vcr_wiki_en_easy")],
        *[(name, 6) for name in ("MME", "mme", "MMBench_TEST_EN", "SEEDBench_IMG", "GQA_TestDev_Balanced", "POPE", "")],
    ],
)
def test_tiles_of_the_paper(name, max_tiles):
    assert setting_for(name).max_tiles == max_tiles
    assert setting_for(name).scale == (2 if "mmmu" in name.lower() else 1)


@pytest.mark.parametrize("name", ["MMMU_Pro_10c", "mme_cot", "OCRBench_v2", "chartqapro", "MMVet_v2"])
def test_benchmarks_of_others_that_begin_alike_are_left_alone(name):
    assert setting_for(name) == Setting() and paper_prompt("What?", name) == "What?"


@pytest.mark.parametrize(
    ("dataset", "given", "expected"),
    [
        ("chartqa", "How many?\nAnswer the question with a single word.", f"How many?{SHORT}"),
        ("textvqa_val", f"How many?{SHORT}", f"How many?{SHORT}"),
        ("docvqa_val", "How many?", f"How many?{SHORT}"),
        ("mmmu_val", "Which?\nA. x\nB. y\n\nAnswer with the option's letter from the given choices directly.", None),
        ("mmmu_val", "Which?\nAnswer the question using a single word or phrase.", f"Which?{SHORT}"),
        (
            "ccbench",
            "这是什么？\nA. 茶\n请直接使用所提供的选项字母作为答案回答。",
            f"这是什么？\nA. 茶{CHOICE_CHINESE}",
        ),
        (
            "mme",
            f"Is it? Please answer yes or no.{SHORT}",
            "Is it? Answer the question using a single word or phrase.",
        ),
        (
            "hallusion_bench_image",
            "Is it?",
            "Is it? Please answer yes or no. Answer the question using a single word or phrase.",
        ),
        ("mmvet", f"Why?{SHORT}", "Why?"),
        ("mathvista_testmini", "Why?", "Why?"),
        ("pope", f"Is it?{SHORT}", f"Is it?{SHORT}"),  # not one of the paper's
        ("vcr_wiki_en_easy", "What is the covered text?", "What is the covered text?"),
    ],
)
def test_prompts_end_as_the_papers(dataset, given, expected):
    assert paper_prompt(given, dataset) == (f"Which?\nA. x\nB. y{CHOICE}" if expected is None else expected)


class Recorder:
    """Stands for a model; keeps what `chat` was asked."""

    def chat(self, pictures, prompt, **options):
        self.asked = (pictures, prompt, options)
        return "answer"


def marked(parts) -> str:
    """Parts as one string, with a sign at each picture that no text holds."""
    return "".join(part["text"] if part["type"] == "text" else "▣" for part in parts)


@pytest.mark.parametrize(
    ("dataset", "video", "size", "max_tiles", "prompt"),
    [
        ("MMMU_DEV_VAL", False, (20, 10), 12, "Image-1: ▣\nImage-2: ▣\nWhich?"),
        ("InfoVQA_VAL", False, (10, 5), 24, "Image-1: ▣\nImage-2: ▣\nWhich?"),
        ("Video-MME", True, (10, 5), 1, "Frame1: ▣\nFrame2: ▣\nWhich?"),
    ],
)
def test_ask_is_greedy_with_the_tiles_of_the_benchmark(dataset, video, size, max_tiles, prompt):
    recorder = Recorder()
    pictures = [Image.new("RGB", (10, 5))] * 2
    assert ask(recorder, "processor", pictures, "Which?", dataset, video=video) == "answer"
    seen, asked, options = recorder.asked
    assert [picture.size for picture in seen] == [size, size] and marked(asked) == prompt
    assert options == {"max_tiles": max_tiles, "processor": "processor", "do_sample": False, "max_new_tokens": 1024}


IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("pictures", "prompt", "expected"),
    [
        (1, "Which is in <image>?", "Which is in ▣?"),  # as many marks as pictures: places
        (1, "In <image>, what? Look at <image>.", "▣In <image>, what? Look at <image>."),  # else words
        (2, "Which fits <image>?\nA. <image>\nB. see <image>", None),
        (0, "What does the tag <image> do?", "What does the tag <image> do?"),
        (1, [IMAGE, text("What does <image> do?")], "▣What does <image> do?"),
        (2, [text("Left:"), IMAGE, text("Right:"), IMAGE, text("Which?")], "Left:▣Right:▣Which?"),
        (2, [IMAGE, IMAGE, text("Which?")], "Image-1: ▣\nImage-2: ▣\nWhich?"),
        (2, [IMAGE, text("A"), text("B"), IMAGE], "▣A\nB▣"),
    ],
)
def test_pictures_stand_where_the_benchmark_has_them(pictures, prompt, expected):
    recorder = Recorder()
    ask(recorder, "processor", [Image.new("RGB", (10, 5))] * pictures, prompt, "")
    seen, asked, _ = recorder.asked
    expected = expected or f"Image-1: ▣\nImage-2: ▣\n{prompt}"
    assert len(seen) == pictures and marked(asked) == expected
    assert sum(part["type"] == "image" for part in asked) == pictures


def test_frames_are_named_where_they_stand():
    recorder = Recorder()
    frames = [Image.new("RGB", (10, 5))] * 2
    ask(recorder, "processor", frames, [text("Watch <image>."), IMAGE, IMAGE, text("What?")], "", video=True)
    assert marked(recorder.asked[1]) == "Watch <image>.\nFrame1: ▣\nFrame2: ▣\nWhat?"


def test_earlier_turns_and_a_system_prompt_are_passed_on():
    recorder = Recorder()
    history = [{"role": "user", "content": [IMAGE, text("A?")]}, {"role": "assistant", "content": [text("B")]}]
    pictures = [Image.new("RGB", (10, 5))] * 2
    ask(recorder, "processor", pictures, [IMAGE, text("C?")], "", system="Be short.", history=history)
    _, asked, options = recorder.asked
    assert marked(asked) == "▣C?" and options["history"] == history and options["system"] == "Be short."


def test_the_ending_is_that_of_the_last_text():
    parts = [text("哪个？"), IMAGE, text("\nA. 1\nB. 2")]
    assert paper_parts(parts, "ccbench") == [*parts[:2], text(f"\nA. 1\nB. 2{CHOICE_CHINESE}")]
    assert paper_parts([text("How many in"), IMAGE], "chartqa") == [text("How many in"), IMAGE, text(SHORT)]
    assert paper_parts([IMAGE, text(f"Is it?{SHORT}")], "pope") == [IMAGE, text(f"Is it?{SHORT}")]


def test_questions_that_hold_the_word_image_are_answered(model, processor, monkeypatch):
    monkeypatch.setitem(settings.GREEDY, "max_new_tokens", 2)
    picture = Image.new("RGB", (60, 40), "red")
    for pictures, question in (
        ([picture], "Which of these is in <image>?"),
        ([picture], "In <image>, what is left? Look at <image> again."),
        ([picture] * 2, "Which fits <image>?\nA. <image>\nB. see <image>"),
        ([], "What does the tag <image> do?"),
        ([picture] * 2, [text("Left:"), IMAGE, text("Right:"), IMAGE, text("Which?")]),
    ):
        assert isinstance(ask(model, processor, pictures, question, "mmvet"), str)


def test_both_adapters_are_declared():
    assert "mono_internvl.evaluation.lmms_eval:manifest" in (ROOT / "setup.py").read_text()
    for name in ("lmms_eval", "vlmevalkit"):
        assert importlib.util.find_spec(f"mono_internvl.evaluation.{name}") is not None


def run(*arguments, folder, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------- lmms-eval

TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {folder}/plates.jsonl
task: plates
test_split: train
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.score
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
TASK_CODE = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def score(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""
QUESTIONS = ["What color is the star?", "How many stars are there?", "Describe the image."]


def nano_answers(prompts, picture=PLATE) -> list[str]:
    model, _ = load_model(resolve_model(None), device="cpu")  # in the precision that the adapters choose
    return [model.chat(picture, prompt, max_tiles=6) for prompt in prompts]


@needs("lmms_eval")
def test_lmms_eval_end_to_end(tmp_path):
    (tmp_path / "plates.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "utils.py").write_text(TASK_CODE)
    answers = [*nano_answers(QUESTIONS[:2]), "something else"]
    rows = [{"image": str(PLATE), "question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    (tmp_path / "plates.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(
        *("lmms_eval", "--model", "mono_internvl", "--include_path", tmp_path, "--tasks", "plates"),
        *("--batch_size", "1", "--device", "cpu", "--output_path", tmp_path / "out", "--log_samples"),
        folder=tmp_path,
        HF_HOME=str(tmp_path / "home"),
    )
    (results,) = (tmp_path / "out").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["plates"]["exact,none"] == pytest.approx(2 / 3)


@needs("lmms_eval")
def test_lmms_eval_gets_the_papers_prompts():
    from lmms_eval.api.instance import Instance

    from mono_internvl.evaluation import lmms_eval as adapter

    model = adapter.MonoInternVLForLmmsEval(device="cpu")
    model.model = Recorder()
    document = {"question": "How many?"}
    model.task_dict = {"chartqa": {"test": [document]}}
    picture = Image.new("RGB", (4, 4))

    def messages(doc):
        parts = [{"type": "image", "url": picture}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": parts}]

    arguments = ("", messages, {"max_new_tokens": 3}, 0, "chartqa", "test")
    request = Instance("generate_until", arguments, 0, {"task": "chartqa", "doc_id": 0, "repeats": 1})
    assert model.generate_until([request]) == ["answer"]
    _, asked, options = model.model.asked
    assert asked == [IMAGE, text(f"How many?{SHORT}")]
    assert options["max_tiles"] == 12 and options["max_new_tokens"] == 1024
    turns = [
        {"role": "system", "content": [text("Be short.")]},
        {"role": "user", "content": [{"type": "image", "url": picture}, text("A?")]},
        {"role": "assistant", "content": [text("B")]},
        {"role": "user", "content": [text("What is <image>?")]},
    ]
    model.task_dict = {"few": {"test": [document]}}
    again = Instance("generate_until", ("", lambda doc: turns, {}, 0, "few", "test"), 0, request.metadata)
    model.generate_until([again])
    seen, asked, options = model.model.asked
    assert len(seen) == 1 and asked == [text("What is <image>?")] and options["system"] == "Be short."
    assert options["history"] == [
        {"role": "user", "content": [IMAGE, text("A?")]},
        {"role": "assistant", "content": [text("B")]},
    ]
    turns.pop()
    with pytest.raises(ValueError, match="few, document 0: the last message must be the user's"):
        model.generate_until([again])
    with pytest.raises(ValueError, match=r"unknown model_args pretraind \(did you mean pretrained\?\)"):
        adapter.MonoInternVLForLmmsEval(pretraind="x")
    with pytest.raises(NotImplementedError, match="choose a task that generates"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="batch_size=4"):
        adapter.MonoInternVLForLmmsEval(batch_size=4)


# ---------------------------------------------------------------------------------------------------------- VLMEvalKit


@needs("vlmeval")
def test_vlmevalkit_end_to_end(tmp_path):
    """A table in its own format; a name that it does not know is a multiple-choice benchmark to it."""
    import pandas as pd

    picture = base64.b64encode(PLATE.read_bytes()).decode()
    choices = {"A": "orange", "B": "green", "C": "red"}
    rows = [{"index": i, "image": picture, "question": q, "answer": "A", **choices} for i, q in enumerate(QUESTIONS)]
    (tmp_path / "LMUData").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "LMUData" / "Plates.tsv", sep="\t", index=False)
    run(
        *("mono_internvl.evaluation.vlmevalkit", "--model", "nano", "--data", "Plates"),
        *("--work-dir", tmp_path / "out", "--mode", "infer"),
        folder=tmp_path,
        LMUData=str(tmp_path / "LMUData"),
    )
    (table,) = [path for path in (tmp_path / "out").rglob("nano_Plates.*") if path.suffix in (".xlsx", ".tsv")]
    answers = pd.read_excel(table) if table.suffix == ".xlsx" else pd.read_csv(table, sep="\t")
    asked = [f"{question}\nA. orange\nB. green\nC. red{CHOICE}" for question in QUESTIONS]
    (stored, *_) = (tmp_path / "LMUData" / "images").rglob("0.*")  # encoded anew, as JPEG
    assert list(answers["prediction"].map(str)) == nano_answers(asked, stored)


@needs("vlmeval")
def test_vlmevalkit_gets_the_papers_prompts():
    import pandas as pd

    from mono_internvl.evaluation import vlmevalkit as adapter

    model = adapter.MonoInternVLForVLMEvalKit(device="cpu")
    model.set_dump_image(lambda line: [str(PLATE)])
    line = pd.Series({"hint": "Look.", "question": "Which?", "A": "one", "B": "two", "C": float("nan")})

    def prompt(dataset, row=line):
        assert model.use_custom_prompt(dataset)
        picture, last = model.build_prompt(row, dataset)
        assert picture == {"type": "image", "value": str(PLATE)} and last["type"] == "text"
        return last["value"]

    body = "Look.\nWhich?\nA. one\nB. two"
    assert prompt("MMBench_TEST_EN") == body + CHOICE
    assert prompt("ScienceQA_TEST") == body + CHOICE
    assert prompt("CCBench", pd.Series({"question": "哪个？", "A": "一"})) == f"哪个？\nA. 一{CHOICE_CHINESE}"
    assert prompt("MMMU_DEV_VAL", pd.Series({"question": "How much?"})) == f"How much?{SHORT}"
    assert prompt("ChartQA_TEST", pd.Series({"question": "How much?"})) == f"How much?{SHORT}"
    assert prompt("MME", pd.Series({"question": "Is it?"})) == f"Is it?{settings.PAPER_SETTINGS['mme'].ending}"
    assert prompt("MMVet", pd.Series({"question": "Why?"})) == "Why?"
    assert prompt("POPE", pd.Series({"question": "Is it?"})) == f"Is it?{SHORT}"
    assert not model.use_custom_prompt("MLVU")  # a video benchmark builds its own

    model.model = Recorder()
    message = [{"type": "image", "value": str(PLATE)}, {"type": "text", "value": "How much?"}]
    assert model.generate(message, dataset="DocVQA_TEST") == "answer"
    _, asked, options = model.model.asked
    assert asked == [IMAGE, text("How much?")] and options["max_tiles"] == 18
    with pytest.raises(ValueError, match="DocVQA_TEST, 'How much\\?': .*no such picture"):
        model.generate_inner([{"type": "image", "value": "gone.png"}, message[1]], dataset="DocVQA_TEST")
    # MMMU says where its pictures stand.
    row = pd.Series({"question": "Is <image 2> like <image 1>?", "A": "yes", "B": "no"})
    model.set_dump_image(lambda line: ["a.png", "b.png", "c.png"])
    built = [part["value"] for part in model.build_prompt(row, "MMMU_DEV_VAL")]
    assert built == ["c.png", "Is ", "b.png", " like ", "a.png", f"?\nA. yes\nB. no{CHOICE}"]


@needs("vlmeval")
def test_vlmevalkit_lists_registered_models():
    from vlmeval.config import supported_VLM

    from mono_internvl.evaluation.vlmevalkit import register

    with pytest.raises(TypeError, match="devcie"):
        register("My-Model", None, devcie="cpu")
    register("My-Model", None, device="cpu")
    assert supported_VLM["My-Model"]().generate([{"type": "text", "value": "Hello"}]).startswith("hello")
