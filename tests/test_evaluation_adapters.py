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
from mono_internvl.cli.common import load_model, resolve_model
from mono_internvl.evaluation import settings
from mono_internvl.evaluation.settings import CHOICE, CHOICE_CHINESE, SHORT, Setting, ask, paper_prompt, setting_for


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


@pytest.mark.parametrize(
    ("dataset", "video", "size", "max_tiles", "prompt"),
    [
        ("MMMU_DEV_VAL", False, (20, 10), 12, "Which?"),
        ("InfoVQA_VAL", False, (10, 5), 24, "Which?"),
        ("Video-MME", True, (10, 5), 1, "Frame1: <image>\nFrame2: <image>\nWhich?"),
    ],
)
def test_ask_is_greedy_with_the_tiles_of_the_benchmark(dataset, video, size, max_tiles, prompt):
    recorder = Recorder()
    pictures = [Image.new("RGB", (10, 5))] * 2
    assert ask(recorder, "processor", pictures, "Which?", dataset, video=video) == "answer"
    seen, asked, options = recorder.asked
    assert [picture.size for picture in seen] == [size, size] and asked == prompt
    assert options == {"max_tiles": max_tiles, "processor": "processor", "do_sample": False, "max_new_tokens": 1024}


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
def test_lmms_eval_gets_the_papers_prompts(monkeypatch):
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
    assert asked == f"How many?{SHORT}" and options["max_tiles"] == 12 and options["max_new_tokens"] == 1024
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
def test_vlmevalkit_gets_the_papers_prompts(monkeypatch):
    import pandas as pd

    from mono_internvl.evaluation import vlmevalkit as adapter

    model = adapter.MonoInternVLForVLMEvalKit(device="cpu")
    model.set_dump_image(lambda line: [str(PLATE)])
    line = pd.Series({"hint": "Look.", "question": "Which?", "A": "one", "B": "two", "C": float("nan")})

    def text(dataset, row=line):
        assert model.use_custom_prompt(dataset)
        picture, last = model.build_prompt(row, dataset)
        assert picture == {"type": "image", "value": str(PLATE)} and last["type"] == "text"
        return last["value"]

    body = "Look.\nWhich?\nA. one\nB. two"
    assert text("MMBench_TEST_EN") == body + CHOICE
    assert text("ScienceQA_TEST") == body + CHOICE
    assert text("CCBench", pd.Series({"question": "哪个？", "A": "一"})) == f"哪个？\nA. 一{CHOICE_CHINESE}"
    assert text("MMMU_DEV_VAL", pd.Series({"question": "How much?"})) == f"How much?{SHORT}"
    assert text("ChartQA_TEST", pd.Series({"question": "How much?"})) == f"How much?{SHORT}"
    assert text("MME", pd.Series({"question": "Is it?"})) == f"Is it?{settings.PAPER_SETTINGS['mme'].ending}"
    assert text("MMVet", pd.Series({"question": "Why?"})) == "Why?"
    assert text("POPE", pd.Series({"question": "Is it?"})) == f"Is it?{SHORT}"
    assert not model.use_custom_prompt("MLVU")  # a video benchmark builds its own

    model.model = Recorder()
    message = [{"type": "image", "value": str(PLATE)}, {"type": "text", "value": "How much?"}]
    assert model.generate(message, dataset="DocVQA_TEST") == "answer"
    _, asked, options = model.model.asked
    assert asked == "How much?" and options["max_tiles"] == 18


@needs("vlmeval")
def test_vlmevalkit_lists_registered_models():
    from vlmeval.config import supported_VLM

    from mono_internvl.evaluation.vlmevalkit import register

    register("My-Model", None, device="cpu")
    assert supported_VLM["My-Model"]().generate([{"type": "text", "value": "Hello"}]).startswith("hello")
