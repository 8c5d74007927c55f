"""How the paper's scores were made: tiles, prompt endings and greedy decoding by benchmark, for any harness.

Names differ between harnesses (`MMMU_DEV_VAL`, `mmmu_val`): the letters and digits at a name's start decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..image_processing_mono_internvl import load_image
from ..modeling_mono_internvl import MonoInternVLForCausalLM, place_images
from ..processing_mono_internvl import MonoInternVLProcessor
from ..prompt_mono_internvl import frame_name


Parts = list[dict[str, str]]

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


def paper_parts(parts: Parts, dataset: str) -> Parts:
    """`paper_prompt` for a question of several parts: the ending is that of its last text."""
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    ending = setting_for(dataset).ending
    if ending is None:
        return parts
    *before, last = parts if parts and parts[-1]["type"] == "text" else [*parts, {"type": "text", "text": ""}]
    ended = paper_prompt(last["text"], dataset)
    if ending == CHOICE and ended.endswith(CHOICE) and choice_ending(text) != CHOICE:
        # The question may be Chinese where its last part is a number.
        ended = ended.removesuffix(CHOICE) + CHOICE_CHINESE
    return [*before, {"type": "text", "text": ended}]


def ask(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    pictures: Sequence[Any],
    prompt: str | Parts,
    dataset: str,
    *,
    video: bool = False,
    system: str | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> str:
    """One answer under the paper's settings.

    Args:
        pictures: what `load_image` takes, those of the history first; the pictures of one question share its tiles.
        prompt: complete, with its ending: parts `{"type": "text", "text"}` and `{"type": "image"}`, each picture where
            the benchmark has it, or a string. In a string `<image>` marks a picture's place where there are as many
            marks as pictures; else it is a word, as it always is in parts, and the pictures go in front.
        video: pictures are frames, of one tile each, named `Frame1: ` and so on.
        system: the system prompt; default: the model's.
        history: messages `{"role", "content"}` before this one, with parts as above.

    Raises:
        ValueError, OSError: a picture that cannot be read, parts and pictures that differ in number, a question that is
            empty or too long.
    """
    setting = setting_for(dataset)
    loaded = [_enlarge(load_image(picture), setting.scale) for picture in pictures]
    own = len(loaded) - sum(part["type"] == "image" for message in history for part in message["content"])
    parts = _placed(prompt, own) if isinstance(prompt, str) else _joined(prompt)
    if video:
        parts = _framed(parts)
    elif sum(part["type"] == "image" for part in parts[:own]) == own > 1:
        # All in front: named, as `chat` names them.
        parts = _joined([*_marked(place_images("", own)), *parts[own:]], between="")
    options: dict[str, Any] = {"max_tiles": 1 if video else setting.max_tiles, "processor": processor, **GREEDY}
    if system is not None:
        options["system"] = system
    if history:
        options["history"] = list(history)
    return model.chat(loaded, parts, **options)  # type: ignore[return-value,arg-type]


def _marked(text: str) -> Parts:
    """A string with `<image>` marks as parts."""
    first, *others = text.split("<image>")
    parts: Parts = [{"type": "text", "text": first}]
    for after in others:
        parts += [{"type": "image"}, {"type": "text", "text": after}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _placed(prompt: str, count: int) -> Parts:
    if count and prompt.count("<image>") == count:
        return _marked(prompt)
    return [{"type": "image"}] * count + [{"type": "text", "text": prompt}]


def _joined(parts: Sequence[dict[str, str]], between: str = "\n") -> Parts:
    """Neighbouring texts as one."""
    joined: Parts = []
    for part in parts:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + between + part["text"]}
        else:
            joined.append(dict(part))
    return joined


def _framed(parts: Parts) -> Parts:
    """Each frame on a line of its own, with its name."""
    framed: Parts = []
    frames = 0
    for part in parts:
        if part["type"] == "text":
            framed.append(part)
            continue
        frames += 1
        begun = bool(framed) and not framed[-1]["text"].endswith("\n")
        named = "\n" * begun + frame_name(frames)
        framed += [{"type": "text", "text": named}, {"type": "image"}, {"type": "text", "text": "\n"}]
    return _joined(framed, between="")


def _enlarge(picture: Image.Image, scale: int) -> Image.Image:
    return picture if scale == 1 else picture.resize((picture.width * scale, picture.height * scale))
