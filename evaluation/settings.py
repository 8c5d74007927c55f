"""How the paper's scores were made: tiles, prompt endings and greedy decoding by benchmark, for any harness.

Names differ between harnesses (`MMMU_DEV_VAL`, `mmmu_val`): the letters and digits at a name's start decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..image_processing_mono_internvl import load_image
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor


GREEDY = {"do_sample": False, "max_new_tokens": 1024}

SHORT = "\nAnswer the question using a single word or phrase."
CHOICE = "\nAnswer with the option's letter from the given choices directly."
CHOICE_CHINESE = "\n请直接回答选项字母。"

_CHINESE = re.compile(r"[\u4e00-\u9fff]")
# What harnesses end their own prompts with.
_SHORT_ENDING = re.compile(
    r"\s*(?:please answer yes or no\.?\s*)?(?:answer the question (?:using|with) a single word(?: or phrase)?|"
    r"provide a short and direct response)\.?$"
)
_CHOICE_ENDING = re.compile(
    r"\s*(?:(?:please )?answer with the option(?:'s)? letter (?:from the given choices directly|only)|"
    r"please select the correct answer from the options above|"
    r"请直接(?:回答选项字母|使用所提供的选项字母作为答案回答))[.。]?$"
)


class Setting(NamedTuple):
    """`ending` follows the question; None: the harness's own prompt stays. `scale`: pictures are enlarged first."""

    max_tiles: int = 6
    ending: str | None = None
    scale: int = 1


PAPER_SETTINGS = {
    "infovqa": Setting(24, SHORT),
    "ocrbench": Setting(24, SHORT),
    "hrbench": Setting(24, CHOICE),
    "docvqa": Setting(18, SHORT),
    "chartqa": Setting(12, SHORT),
    "mmmu": Setting(12, CHOICE, scale=2),
    "mmerealworld": Setting(12, CHOICE),
    "vcr": Setting(12),
    "textvqa": Setting(6, SHORT),
    "gqa": Setting(6, SHORT),
    "mmbench": Setting(6, CHOICE),
    "ccbench": Setting(6, CHOICE),
    "seedbench": Setting(6, CHOICE),
    "scienceqa": Setting(6, CHOICE),
    "ai2d": Setting(6, CHOICE),
    "mme": Setting(6, " Answer the question using a single word or phrase."),
    "hallusionbench": Setting(6, " Please answer yes or no. Answer the question using a single word or phrase."),
    "mmvet": Setting(6, ""),
    "mathvista": Setting(6, ""),
}
# Benchmarks of others whose names begin like one of these.
OTHERS = ("mmmupro", "mmecot", "mmebench", "mmesci", "ocrbenchv2", "chartqapro", "docvqahi", "mmvetv2", "mmevideo")


def setting_for(dataset: str) -> Setting:
    """The paper's setting of a benchmark, by the longest name that begins the given one; else 6 tiles."""
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    if name.startswith(OTHERS):
        return Setting()
    known = [prefix for prefix in PAPER_SETTINGS if name.startswith(prefix)]
    return PAPER_SETTINGS[max(known, key=len)] if known else Setting()


def choice_ending(question: str) -> str:
    return CHOICE_CHINESE if _CHINESE.search(question) else CHOICE


def paper_prompt(text: str, dataset: str) -> str:
    """A harness's finished prompt with the paper's ending in place of the harness's; others' benchmarks stay."""
    ending = setting_for(dataset).ending
    if ending is None:
        return text
    bare = text.rstrip()
    lowered = bare.lower()
    for found, own in ((_SHORT_ENDING.search(lowered), SHORT), (_CHOICE_ENDING.search(lowered), CHOICE)):
        if found:
            bare = bare[: found.start()]
            # The harness knows which of a benchmark's questions are open and which have choices.
            ending = own if ending in (SHORT, CHOICE) else ending
    return bare + (choice_ending(bare) if ending == CHOICE else ending)


def ask(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    pictures: Sequence[Any],
    prompt: str,
    dataset: str,
    *,
    video: bool = False,
) -> str:
    """One answer under the paper's settings.

    Args:
        pictures: what `load_image` takes; the pictures of one question share its tiles.
        prompt: complete, with its ending.
        video: pictures are frames, of one tile each, named `Frame1: ` and so on.
    """
    setting = setting_for(dataset)
    loaded = [_enlarge(load_image(picture), setting.scale) for picture in pictures]
    if video:
        prompt = "".join(f"Frame{i + 1}: <image>\n" for i in range(len(loaded))) + prompt
    max_tiles = 1 if video else setting.max_tiles
    return model.chat(loaded, prompt, max_tiles=max_tiles, processor=processor, **GREEDY)  # type: ignore[return-value,arg-type]


def _enlarge(picture: Image.Image, scale: int) -> Image.Image:
    return picture if scale == 1 else picture.resize((picture.width * scale, picture.height * scale))
