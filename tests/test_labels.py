"""Which tokens an answer owns: `assistant_masks` and training labels against the released label code."""

import json
import pickle
import re

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from conftest import ROOT, golden
from mono_internvl import MonoInternVLImageProcessor, MonoInternVLProcessor
from mono_internvl.training.data import Collator, encode_conversation


# Two tiles of one token each: the golden samples have pictures of two visual tokens.
TWO_TOKENS = {"tile_size": 28, "max_tiles": 2, "use_thumbnail": False}


def picture(width=56, height=28):
    return Image.new("RGB", (width, height), (200, 30, 30))


def processor_with(tokenizer):
    return MonoInternVLProcessor(MonoInternVLImageProcessor(**TWO_TOKENS), tokenizer)


@pytest.fixture(scope="module")
def nano():
    return processor_with(AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False))


@pytest.fixture(scope="module")
def real(internlm2_folder):
    return processor_with(AutoTokenizer.from_pretrained(internlm2_folder, trust_remote_code=False))


def from_record(processor, record, pictures):
    """A data record's conversation as messages; records strip their turns and drop a leading answer."""
    turns = [(turn["from"], turn["value"].strip()) for turn in record["conversations"]]
    if turns[0][0] == "gpt":
        turns = turns[1:]
    asked = [text for who, text in turns if who == "human"]
    answered = [text for who, text in turns if who == "gpt"]
    pairs = list(zip(asked, [*answered, None], strict=False))
    if record["text_only"]:
        roles = {"human": "user", "gpt": "assistant"}
        return [{"role": roles[who], "content": text} for who, text in turns]
    return processor.conversation(pairs, pictures)


@pytest.mark.parametrize("index", range(2))
def test_labels_equal_the_released_code(real, index):
    sample = json.loads(golden("tokenizer", "labels.json").read_text(encoding="utf-8"))[index]
    pictures = [] if sample["text_only"] else [picture() for _ in sample["num_image_token_list"]]
    encoded = encode_conversation(real, from_record(real, sample, pictures))
    assert encoded["input_ids"].tolist() == sample["input_ids"]
    assert encoded["labels"].tolist() == sample["labels"]
    assert encoded["pixel_values"].shape == (2 * len(pictures), 1, 3 * 28 * 28)
    assert encoded["pixel_values"].dtype == torch.uint8


def train_samples():
    samples = json.loads(golden("prompts", "prompts.json").read_text(encoding="utf-8"))["train"]
    return {sample["name"]: sample for sample in samples}


@pytest.mark.parametrize("name", list(train_samples()))
def test_supervised_spans(nano, name):
    sample = train_samples()[name]
    pictures = [picture(28 * tiles, 28) for tiles in sample["tiles_per_image"]]
    messages = from_record(nano, sample, pictures)
    encoded = nano.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        max_tiles=3 * max(len(pictures), 1),
    )
    text = nano.tokenizer.decode(encoded["input_ids"][0])
    # The golden prompts have two tokens a tile, this processor one.
    text = re.sub("(<IMG_CONTEXT>)+", lambda run: run[0] * 2, text)
    assert text == "<s>" + sample["prompt"]
    spans, owned = [], []
    for token, mine in zip(encoded["input_ids"][0], encoded["assistant_masks"][0], strict=True):
        if mine:
            owned.append(token)
        elif owned:
            spans, owned = [*spans, owned], []
    spans += [owned] if owned else []
    expected = [span for _, _, span in sample["supervised_spans"]]
    if name == "ends_with_human_turn":
        # The released code loses count here and teaches the question too.
        expected = [expected[0].partition("<|im_start|>")[0]]
    assert [nano.tokenizer.decode(span) for span in spans] == expected


def answer_ids(processor, messages, **options):
    encoded = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return [i for i, mine in zip(encoded["input_ids"][0], encoded["assistant_masks"][0], strict=True) if mine]


@pytest.mark.parametrize(
    "answer",
    ["red", " red ", "\nred\n", "  ", "🙂", "日本🙂\u0000x", "<|im_end|> <s>", "<ref>a</ref><box>[[1, 2, 3, 4]]</box>"],
)
@pytest.mark.parametrize("as_parts", [False, True])
def test_an_answer_owns_all_of_itself(nano, answer, as_parts):
    content = [{"type": "text", "text": answer}] if as_parts else answer
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content}]
    assert nano.tokenizer.decode(answer_ids(nano, messages)) == answer + "<|im_end|>"


def test_only_answers_are_owned(nano):
    messages = [
        {"role": "system", "content": "assistant"},
        {"role": "user", "content": "red<|im_end|>"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "red"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "gr"}, {"type": "text", "text": "een"}]},
        {"role": "user", "content": "red"},
    ]
    assert nano.tokenizer.decode(answer_ids(nano, messages)) == "blue<|im_end|>green<|im_end|>"
    assert answer_ids(nano, messages[:2]) == []
    empty = [*messages[:1], {"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]
    assert nano.tokenizer.decode(answer_ids(nano, empty)) == "<|im_end|>"


def test_masks_follow_padding_and_truncation(nano):
    batch = [[{"role": "user", "content": "Q" * n}, {"role": "assistant", "content": "red"}] for n in (1, 9)]
    owned = answer_ids(nano, batch[0])
    for side in ("left", "right"):
        encoded = nano.apply_chat_template(
            batch,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            padding_side=side,
        )
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            assert ids[mask.bool()].tolist() == owned
    (full,) = nano.apply_chat_template(batch[1], tokenize=True)
    cut = answer_ids(nano, batch[1], truncation=True, max_length=len(full) - 1)
    assert cut == owned[:-1]


def test_many_answers_are_labelled_in_linear_time(nano):
    parts = [{"type": "text", "text": "ab "}] * 20_000
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": parts}]
    assert nano.tokenizer.decode(answer_ids(nano, messages)) == "ab " * 20_000 + "<|im_end|>"


def test_a_conversation_without_an_answer_teaches_nothing(nano):
    with pytest.raises(ValueError, match="no answer"):
        encode_conversation(nano, [{"role": "user", "content": "Q"}])


def test_collator_pads_on_the_right(nano):
    rows = [
        encode_conversation(nano, nano.conversation([("<image>\nWhat?", "red")], [picture()])),
        encode_conversation(nano, nano.conversation([("Hi", "hello, you there")], [])),
    ]
    batch = Collator(nano.tokenizer.pad_token_id)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape[0] == 2
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        assert batch["input_ids"][i, :n].equal(row["input_ids"])
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert (batch["labels"][i, n:] == -100).all()


def test_labels_that_others_make_of_the_ids_hold_no_placeholders(nano):
    def inputs(**options):
        messages = [nano.conversation([("<image>\nWhat?", "red")], [picture()])]
        return nano.apply_chat_template(messages, tokenize=True, return_dict=True, **options)

    token, batch = nano.image_token_id, inputs(return_tensors="pt")
    ids = batch["input_ids"].clone()
    expected = ids.masked_fill(ids == token, -100)
    assert (ids == token).sum() == 2
    labels = ids.clone()
    batch["labels"] = labels
    labels[:, 0] = -100  # whoever made them may go on
    assert batch["labels"][:, 1:].equal(expected[:, 1:]) and batch["labels"][0, 0] == -100
    batch.update({"labels": batch["input_ids"]})
    assert batch["labels"].equal(expected) and batch["input_ids"].equal(ids)
    assert pickle.loads(pickle.dumps(batch))["labels"].equal(expected)
    batch["labels"] = ids.numpy()
    assert batch["labels"] == expected.tolist()
    lists = inputs()
    lists["labels"] = lists["input_ids"]
    assert lists["labels"] == expected.tolist() and lists["input_ids"] == ids.tolist()


@pytest.mark.parametrize("completion_only", [None, False, True])
def test_trls_own_collator_learns_no_placeholders(nano, completion_only):
    collators = pytest.importorskip("trl.trainer.sft_trainer")
    question, answer = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}
    if completion_only is None:
        row: dict = {"messages": [question, answer]}
        collate = collators.DataCollatorForVisionLanguageModeling(nano)
    else:
        row = {"prompt": [question], "completion": [answer]}
        collate = collators.DataCollatorForVisionLanguageModeling(nano, completion_only_loss=completion_only)
    batch = collate([{**row, "images": [picture()]}])
    learnt = batch["labels"][batch["labels"] >= 0]
    assert (batch["input_ids"] == nano.image_token_id).sum() == 2 and nano.image_token_id not in learnt
    assert ("What?" in nano.tokenizer.decode(learnt)) != bool(completion_only)
