"""The folder alone is enough: no installed package, everything through transformers' Auto classes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, tiny_model


SCRIPT = """
import json, sys
sys.modules["mono_internvl"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor,
                          AutoTokenizer, pipeline)

folder, saved = sys.argv[1:3]
picture = Image.open(sys.argv[3])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
answers = []
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    answers.append(model.chat(picture, "What color is the star?", max_new_tokens=6))
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype=torch.float32)
piped = pipe(text=messages, max_new_tokens=6, do_sample=False)
still, said = {"type": "image", "image": picture}, lambda text: {"type": "text", "text": text}
video = [{"role": "user", "content": [{"type": "video", "video": [picture] * 3}, said("What is it?")]}]
named = [said("Frame1: "), still, said("\\nFrame2: "), still, said("\\nWhat is it?")]
filmed = [
    pipe(text=asked, generate_kwargs={"max_new_tokens": 6}, **options)[0]["generated_text"][-1]["content"]
    for asked, options in ((video, {"num_frames": 2}), ([{"role": "user", "content": named}], {"max_tiles": 1}))
]
assert filmed[0] == filmed[1], filmed
model.save_pretrained(saved)
processor.save_pretrained(saved)
again = AutoModel.from_pretrained(saved, trust_remote_code=True, dtype=torch.float32)
answers.append(again.chat(picture, "What color is the star?", max_new_tokens=6))
AutoProcessor.from_pretrained(saved, trust_remote_code=True)
print(json.dumps({"answers": answers, "piped": piped[0]["generated_text"][-1]["content"], "type": config.model_type,
                  "image_token": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == config.image_token_id}))
"""


def run_alone(folder: Path, tmp_path: Path) -> dict:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "saved"), str(ROOT / "examples" / "plate.png")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "to instantiate a model of type" not in done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(result: dict) -> None:
    assert result["type"] == "mono_internvl" and result["image_token"]
    assert len(set(result["answers"])) == 1
    assert isinstance(result["piped"], str)


def test_a_saved_folder_stands_alone(tmp_path):
    from transformers import AutoTokenizer

    from mono_internvl import MonoInternVLImageProcessor, MonoInternVLProcessor

    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    processor = MonoInternVLProcessor(MonoInternVLImageProcessor(tile_size=56, max_tiles=2), tokenizer)
    model = tiny_model(text_config={"vocab_size": len(tokenizer)})
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(tmp_path / "folder")
    processor.save_pretrained(tmp_path / "folder")
    check(run_alone(tmp_path / "folder", tmp_path))


def test_the_repository_stands_alone(tmp_path):
    """Also as a clone with tests, docs and .git beside the model's files."""
    if not (ROOT / "model.safetensors").exists():
        pytest.skip("the nano's weights are not in this checkout")
    result = run_alone(ROOT, tmp_path)
    check(result)
    assert result["answers"][0] in ("red", "green", "blue", "yellow", "purple", "orange", "black")


TWO_VERSIONS = """
import sys
sys.modules["mono_internvl"] = None
from transformers import AutoModel, AutoProcessor
models = [AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:3]]
processors = [AutoProcessor.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:3]]
for things in (models, processors):
    print([getattr(sys.modules[type(thing).__module__], "VERSION", None) for thing in things])
"""


def test_two_versions_in_one_process_get_their_own_classes(folder, tmp_path):
    folders = []
    for version in "ab":
        folders.append(tmp_path / version / "tiny")
        shutil.copytree(folder, folders[-1])
        for name in ("modeling_mono_internvl.py", "processing_mono_internvl.py"):
            code = folders[-1] / name
            code.write_text(code.read_text() + f"\nVERSION = '{version}'\n")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_VERSIONS, *map(str, folders)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-2:] == ["['a', 'b']"] * 2
