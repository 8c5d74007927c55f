"""InternVL's old interface, for code that cannot change yet:

    model = with_legacy_chat(model)
    pixel_values = load_image("examples/plate.png", max_num=6).to(torch.bfloat16)
    response, history = model.chat(tokenizer, pixel_values, "What is it?", generation_config, return_history=True)

`docs/legacy.md` shows what each old call becomes in the new interface. What differs: typed text is text, so that a
question cannot forge a turn or a picture, and the caller's `generation_config` is not changed.
"""

import functools
import itertools
from typing import Any

import torch
from PIL import Image

from mono_internvl import MonoInternVLForCausalLM, MonoInternVLImageProcessor, MonoInternVLProcessor
from mono_internvl.image_processing_mono_internvl import unpatchify
from mono_internvl.modeling_mono_internvl import place_images


History = list[tuple[str, str]]


def load_image(image_file: Any, input_size: int = 448, max_num: int = 12) -> torch.Tensor:
    """A picture's tiles, float32 [tiles, 3, input_size, input_size], normalised; the thumbnail is last."""
    image_processor = MonoInternVLImageProcessor(tile_size=input_size, max_tiles=max_num)
    return unpatchify(image_processor(image_file, return_tensors="pt")["pixel_values"])


def with_legacy_chat(model: MonoInternVLForCausalLM) -> MonoInternVLForCausalLM:
    """Give this one model the old `chat` and `batch_chat` in place of its own."""
    model.chat = functools.partial(chat, model)  # type: ignore[method-assign]
    model.batch_chat = functools.partial(batch_chat, model)  # type: ignore[assignment]
    return model


def chat(
    model: MonoInternVLForCausalLM,
    tokenizer: Any,
    pixel_values: torch.Tensor | None,
    question: str,
    generation_config: dict[str, Any],
    history: History | None = None,
    return_history: bool = False,
    num_patches_list: list[int] | None = None,
    verbose: bool = False,
    **tokens: str,
) -> str | tuple[str, History]:
    """Ask one question. `pixel_values`: the tiles of all pictures of the conversation, [tiles, 3, S, S];
    `num_patches_list`: how many tiles each picture has, by default all are one picture's; `tokens`: IMG_START_TOKEN and
    so on, which only repeat what the tokenizer knows.

    Raises:
        ValueError: tiles, pictures and `<image>` marks do not match, or a token is another than the tokenizer's.
    """
    _check_tokens(tokens)
    tiles = _tiles_by_picture(pixel_values, num_patches_list)
    turns = list(history or [])
    question = place_images(question, len(tiles) - sum(asked.count("<image>") for asked, _ in turns))
    (response,) = _answer(model, tokenizer, pixel_values, [[*turns, (question, None)]], tiles, generation_config)
    if verbose:
        print(f"{question}\n{response}")
    return (response, [*turns, (question, response)]) if return_history else response


def batch_chat(
    model: MonoInternVLForCausalLM,
    tokenizer: Any,
    pixel_values: torch.Tensor | None,
    questions: list[str],
    generation_config: dict[str, Any],
    num_patches_list: list[int] | None = None,
    history: None = None,
    return_history: bool = False,
    image_counts: list[int] | None = None,
    verbose: bool = False,
    **tokens: str,
) -> list[str]:
    """Ask several questions, each about its own picture, in one batch. `image_counts` is `num_patches_list`'s old name.

    Raises:
        NotImplementedError: a history, which the old one refused too.
        ValueError: tiles, pictures and questions do not match, or a token is another than the tokenizer's.
    """
    if history is not None or return_history:
        raise NotImplementedError("batch_chat has no history; call chat for each conversation")
    _check_tokens(tokens)
    num_patches_list = image_counts if num_patches_list is None else num_patches_list
    tiles = _tiles_by_picture(pixel_values, num_patches_list)
    if tiles and len(tiles) != len(questions):
        raise ValueError(f"{len(tiles)} pictures for {len(questions)} questions; batch_chat takes one each")
    prompts: list[list[tuple[str, str | None]]] = [[(place_images(q, 1 if tiles else 0), None)] for q in questions]
    responses = _answer(model, tokenizer, pixel_values, prompts, tiles, generation_config)
    if verbose:
        print(*(f"{question}\n{response}" for question, response in zip(questions, responses, strict=True)), sep="\n")
    return responses


def _check_tokens(tokens: dict[str, str]) -> None:
    known = {"IMG_START_TOKEN": "<img>", "IMG_END_TOKEN": "</img>", "IMG_CONTEXT_TOKEN": "<IMG_CONTEXT>"}
    for name, token in tokens.items():
        if known.get(name) != token:
            raise ValueError(f"{name}={token!r}: allowed are {', '.join(f'{n}={t!r}' for n, t in known.items())}")


def _tiles_by_picture(pixel_values: torch.Tensor | None, num_patches_list: list[int] | None) -> list[int]:
    total = 0 if pixel_values is None else len(pixel_values)
    tiles = list(num_patches_list) if num_patches_list is not None else [total] * (total > 0)
    if sum(tiles) != total:
        raise ValueError(f"num_patches_list counts {sum(tiles)} tiles, but pixel_values holds {total}")
    return tiles


@torch.no_grad()
def _answer(
    model: MonoInternVLForCausalLM,
    tokenizer: Any,
    pixel_values: torch.Tensor | None,
    prompts: list[list[tuple[str, str | None]]],
    tiles: list[int],
    generation_config: dict[str, Any],
) -> list[str]:
    side = model.config.vision_config.image_size if pixel_values is None else pixel_values.shape[-1]
    processor = MonoInternVLProcessor(MonoInternVLImageProcessor(tile_size=side), tokenizer)
    # The pictures are cut already: a stand-in of one tile marks each one's place, and is widened to its tiles.
    stand_in, left = Image.new("RGB", (side, side)), iter(tiles)
    rows = []
    for turns in prompts:
        pictures = [stand_in] * sum(asked.count("<image>") for asked, _ in turns)
        messages = processor.conversation(turns, pictures)
        (ids,) = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, max_tiles=1)
        runs = [list(run) for _, run in itertools.groupby(ids, key=lambda i: i == processor.image_token_id)]
        rows.append([i for run in runs for i in run * (next(left) if run[0] == processor.image_token_id else 1)])
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values.to(model.device, model.dtype)
    stops = {"eos_token_id": processor.stop_token_ids, "pad_token_id": tokenizer.pad_token_id}
    sequences = model.generate(**inputs, **{**stops, **generation_config})
    decode = processor.answer_decoder()
    return [decode(row) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
