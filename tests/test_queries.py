"""Learnable queries and expert gates: routed with visual tokens, in all kinds of prompts; absent where not asked."""

import copy
import json

import pytest
import torch
from PIL import Image

from conftest import IMAGE, ROOT, tiles, tiny_config, tiny_model
from mono_internvl import (
    MonoInternVLConfig,
    MonoInternVLForCausalLM,
    MonoInternVLImageProcessor,
    MonoInternVLProcessor,
)
from mono_internvl.common.parameters import count_by_part, group_of
from mono_internvl.modeling_mono_internvl import make_routing_plan
from mono_internvl.training.data import encode_conversation
from mono_internvl.training.groups import train_only


QUERY = 118
QUERIES = {"num_learnable_queries": 5, "query_grids": [2, 1], "query_token_id": QUERY}
# Text, a picture of two tiles, a block of queries, text.
ONE = torch.tensor([[1, 7, 111, *[IMAGE] * 8, 112, *[QUERY] * 5, 9, 15, 4]])
# A picture of one tile and its block, text, another picture and its block, text.
TWO = torch.tensor([[1, 111, *[IMAGE] * 4, 112, *[QUERY] * 5, 9, 15, 111, *[IMAGE] * 4, 112, *[QUERY] * 5, 6, 4]])


@pytest.fixture
def model():
    return tiny_model(**QUERIES)


def logits_of(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def by_hand(model, ids, pixels):
    """The same prompt with its embeddings and its mask made here."""
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == IMAGE] = model.get_image_features(pixels).pooler_output.flatten(0, 1)
    queries = model.model.learnable_queries.weight
    embeds[ids == QUERY] = queries.repeat(int((ids == QUERY).sum()) // len(queries), 1)
    return model(inputs_embeds=embeds, visual_token_mask=(ids == IMAGE) | (ids == QUERY)).logits


@pytest.mark.parametrize("ids", [ONE, TWO])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_queries_take_their_places_and_go_the_visual_way(ids, backend):
    model = tiny_model(**QUERIES, attn_implementation=backend, visual_attention_experts="qkvo")
    with torch.no_grad():
        expected = by_hand(model, ids, tiles())
    torch.testing.assert_close(logits_of(model, ids, pixel_values=tiles()), expected, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        model.model.learnable_queries.weight[3] += 1
    assert (logits_of(model, ids, pixel_values=tiles()) - expected)[:, -1].abs().max() > 1e-3


def test_the_plan_holds_queries_behind_visual_tokens():
    mask = (TWO == IMAGE) | (TWO == QUERY)
    plan = make_routing_plan(TWO == IMAGE, int(mask.sum()), TWO == QUERY)
    flat = TWO.flatten()
    assert flat[plan.visual].tolist() == [IMAGE] * 8 + [QUERY] * 10
    assert plan.text.tolist() == [i for i in range(TWO.shape[1]) if not mask.flatten()[i]]


def test_batches_turns_and_chunks_equal_the_single_uncached_result(model):
    alone = logits_of(model, ONE, pixel_values=tiles())
    both = logits_of(model, TWO, pixel_values=tiles(seed=2))
    filler = torch.full((1, TWO.shape[1] - ONE.shape[1]), 2)
    ids, mask = torch.cat([torch.cat([filler, ONE], 1), TWO]), torch.ones(2, TWO.shape[1], dtype=torch.long)
    mask[0, : filler.shape[1]] = 0
    batch = logits_of(model, ids, attention_mask=mask, pixel_values=torch.cat([tiles(), tiles(seed=2)]))
    torch.testing.assert_close(batch[:1, filler.shape[1] :], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch[1:], both, atol=1e-5, rtol=1e-4)

    # The second picture in a later turn, on top of a cache; then one token after the other.
    second, pixels = 14, tiles(seed=2)
    with torch.no_grad():
        cache = model(TWO[:, :second], pixel_values=pixels[:1], use_cache=True).past_key_values
        later = model(TWO[:, second:-1], pixel_values=pixels[1:], past_key_values=cache)
        last = model(TWO[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([later.logits, last], 1), both[:, second:], atol=1e-5, rtol=1e-4)
    kept = logits_of(model, TWO, pixel_values=pixels, logits_to_keep=1)
    torch.testing.assert_close(kept, both[:, -1:], atol=1e-5, rtol=1e-4)
    # A kept position that is a query is computed with the others.
    reaching = logits_of(model, TWO, pixel_values=pixels, logits_to_keep=4)
    torch.testing.assert_close(reaching, both[:, -4:], atol=1e-5, rtol=1e-4)


def test_queries_whose_pictures_lie_in_the_cache(model):
    whole, after = logits_of(model, ONE, pixel_values=tiles()), 12
    assert set(ONE[0, :after].tolist()).isdisjoint({QUERY}) and ONE[0, after] == QUERY

    def prefix():
        with torch.no_grad():
            return model(ONE[:, :after], pixel_values=tiles(), use_cache=True).past_key_values

    rest = logits_of(model, ONE[:, after:], past_key_values=prefix())
    torch.testing.assert_close(rest, whole[:, after:], atol=1e-5, rtol=1e-4)
    kept = logits_of(model, ONE[:, after:], past_key_values=prefix(), logits_to_keep=1)
    torch.testing.assert_close(kept, whole[:, -1:], atol=1e-5, rtol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    alone = model.generate(ONE, attention_mask=torch.ones_like(ONE), pixel_values=tiles(), **options)
    cached = model.generate(ONE, attention_mask=torch.ones_like(ONE), past_key_values=prefix(), **options)
    assert cached.tolist() == alone.tolist()
    with pytest.raises(ValueError, match="1 of the rows hold a part of a block"):
        model(ONE[:, after + 1 :], past_key_values=prefix())
    # A graph cannot ask whether there are some, so there it is an assertion; text goes through.
    compiled = torch.compile(model, backend="eager")
    text = torch.tensor([[1, 7, 9, 15]])
    torch.testing.assert_close(logits_of(compiled, text), logits_of(model, text), atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="learnable queries without their pictures"):
        logits_of(compiled, ONE[:, after:])
    with pytest.raises(ValueError, match="continuous batching takes text only"):
        model.generate_batch([ONE[0, after:].tolist()])


def test_packed_samples(model):
    alone = [logits_of(model, ids, pixel_values=tiles(seed=seed)) for seed, ids in enumerate((ONE, TWO))]
    positions = torch.cat([torch.arange(ONE.shape[1]), torch.arange(TWO.shape[1])])[None]
    pixels = torch.cat([tiles(seed=0), tiles(seed=1)])
    packed = logits_of(model, torch.cat([ONE, TWO], 1), pixel_values=pixels, position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-4)


def test_generation_with_beams_never_emits_a_query(model):
    options = {"attention_mask": torch.ones_like(TWO), "pixel_values": tiles(), "max_new_tokens": 6, "pad_token_id": 2}
    with torch.no_grad():
        model.lm_head.weight[QUERY] = model.lm_head.weight.abs().max() * 50 * model.lm_head.weight.mean(0).sign()
    greedy = model.generate(TWO, do_sample=False, **options)
    assert QUERY not in greedy[0, TWO.shape[1] :]
    beams = model.generate(TWO, num_beams=3, do_sample=False, **options)
    assert QUERY not in beams[0, TWO.shape[1] :]
    static = model.generate(TWO, do_sample=False, cache_implementation="static", **options)
    assert static.tolist() == greedy.tolist()
    with pytest.raises(ValueError, match="prefill_chunk_size may cut a block"):
        model.generate(TWO, do_sample=False, prefill_chunk_size=8, **options)


def test_a_part_of_a_block_is_refused(model):
    ids = torch.cat([ONE[:, :-6], ONE[:, -3:]], 1)
    with pytest.raises(ValueError, match=r"1 of the rows hold a part of a block .*id 118.* multiple of 5"):
        model(ids, pixel_values=tiles())
    # Rows are counted one by one: two parts make no block.
    ids = torch.cat([ids, torch.cat([ONE[:, :-3], ONE[:, -6:-3]], 1)[:, : ids.shape[1]]])
    with pytest.raises(ValueError, match="part of a block"):
        model(ids, pixel_values=torch.cat([tiles(), tiles()]))


@pytest.mark.parametrize("with_picture", [True, False])
def test_gradients_reach_queries_and_labels_leave_them_out(model, with_picture):
    model.train()
    ids = ONE if with_picture else torch.tensor([[1, 7, 8, 9]])
    loss = model(ids, pixel_values=tiles() if with_picture else None, labels=ids).loss
    loss.backward()
    gradient = model.model.learnable_queries.weight.grad
    assert gradient is not None and bool(gradient.abs().sum() > 0) == with_picture
    labels = ids.masked_fill((ids == IMAGE) | (ids == QUERY), -100)
    torch.testing.assert_close(model(ids, pixel_values=tiles() if with_picture else None, labels=labels).loss, loss)


def test_queries_and_gates_are_loaded_saved_and_initialised(tmp_path):
    model = tiny_model(**QUERIES, text_config={"expert_gates": True})
    model.save_pretrained(tmp_path / "whole")
    again = MonoInternVLForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits_of(again, TWO, pixel_values=tiles()), logits_of(model, TWO, pixel_values=tiles()))
    config = MonoInternVLConfig.from_pretrained(tmp_path / "whole")
    assert (config.num_learnable_queries, config.query_grids, config.query_token_id) == (5, [2, 1], QUERY)
    # A checkpoint without them: missing weights are named, not left to chance.
    tiny_model().save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="learnable_queries.weight"):
        MonoInternVLForCausalLM.from_pretrained(tmp_path / "without", config=copy.deepcopy(config))
    torch.manual_seed(0)
    drawn = MonoInternVLForCausalLM(tiny_config(num_learnable_queries=100, query_token_id=QUERY))
    assert drawn.config.query_grids == [8, 6]
    assert drawn.model.learnable_queries.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_model_without_has_neither_weights_nor_fields_of_them():
    model = tiny_model()
    assert not [name for name in model.state_dict() if "quer" in name or "gate." in name.replace("gate_proj.", "")]
    saved = model.config.to_diff_dict()
    assert not [name for name in saved if "quer" in name] and "expert_gates" not in saved["text_config"]


def test_an_output_gate_scales_its_expert():
    model = tiny_model(text_config={"expert_gates": True})
    layer = model.model.language_model.layers[0]
    x = torch.randn(2, 3, 64)
    for expert in (layer.mlp, layer.visual_mlp):
        gated = expert(x)
        gate, expert.output_gate = expert.output_gate, None
        torch.testing.assert_close(gated, expert(x) * torch.sigmoid(x @ gate.weight.T))
        expert.output_gate = gate


def test_groups_of_queries_and_gates():
    model = tiny_model(**QUERIES, text_config={"expert_gates": True})
    assert group_of("model.learnable_queries.weight") == "learnable_queries"
    assert {group_of(name) for name, _ in model.named_parameters() if "output_gate" in name} == {"expert_gates"}
    train_only(model, ["learnable_queries", "expert_gates"])
    trained = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"learnable_queries", "output_gate"}
    counts = count_by_part(model)
    assert (counts["learnable queries"], counts["expert gates"]) == (5 * 64, 3 * 2 * 64)
    assert not {"learnable queries", "expert gates"} & set(count_by_part(tiny_model()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_learnable_queries": -1}, "num_learnable_queries=-1 must be an integer that is not negative"),
        ({"num_learnable_queries": 0}, r"query_grids=\[2, 1\] and query_token_id=118 need num_learnable_queries"),
        ({"query_grids": [2, 2]}, r"query_grids=\[2, 2\] must be sides of squares of 5 queries together"),
        ({"query_grids": None}, r"query_grids=\[2\] must be sides"),
        ({"query_placement": "end"}, "query_placement='end' must be one of image, question"),
        ({"query_token_id": None}, "query_token_id=None must be an id of its own"),
        ({"query_token_id": IMAGE}, "query_token_id=113 must be an id of its own"),
        ({"query_token_id": 120}, "query_token_id=120 must be an id of its own in the vocabulary of 120"),
        ({"query_token_id": 0}, "query_token_id=0 must be an id of its own .* of padding"),
        ({"query_token_id": 1}, "query_token_id=1 must be an id of its own .* begins or ends a text"),
        ({"query_token_id": 109}, "query_token_id=109 must be an id of its own .* begins or ends a text"),
    ],
)
def test_what_a_configuration_must_say(changes, message, tmp_path):
    roles = {"text_config": {"pad_token_id": 0, "bos_token_id": 1}}
    with pytest.raises(ValueError, match=message):
        tiny_config(**{**QUERIES, **roles, **changes})
    # What overrides a file's is asked the same.
    tiny_config(**QUERIES, **roles).save_pretrained(tmp_path)
    changes = {**changes, "query_grids": None} if changes.get("num_learnable_queries") == 0 else changes
    with pytest.raises(ValueError, match="num_learnable_queries|query_"):
        MonoInternVLConfig.from_pretrained(tmp_path, **changes)


def test_a_place_is_said_where_there_are_queries_to_stand_there():
    nano = MonoInternVLProcessor.from_pretrained(ROOT)
    with pytest.raises(ValueError, match="query_placement='question' needs num_learnable_queries"):
        tiny_config(query_placement="question")
    with pytest.raises(ValueError, match="query_placement='question' needs num_learnable_queries"):
        MonoInternVLProcessor(nano.image_processor, nano.tokenizer, query_placement="question")


# ------------------------------------------------------------------------------------------------------- the processor


@pytest.fixture(scope="module", params=["image", "question"])
def talking(request, tmp_path_factory):
    """A folder of a model with five queries, and its processor: the nano's tokenizer and one token more."""
    processor = MonoInternVLProcessor.from_pretrained(ROOT)
    processor.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<QUERY_CONTEXT>"]}, replace_extra_special_tokens=False
    )
    token = processor.tokenizer.convert_tokens_to_ids("<QUERY_CONTEXT>")
    processor = MonoInternVLProcessor(
        MonoInternVLImageProcessor(tile_size=56, max_tiles=4),
        processor.tokenizer,
        num_learnable_queries=5,
        query_placement=request.param,
    )
    options = {**QUERIES, "query_token_id": token, "query_placement": request.param}
    model = tiny_model(text_config={"vocab_size": len(processor.tokenizer)}, **options)
    model.config.image_token_id = processor.image_token_id
    model.config.query_token_id = token
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


RED, BLUE = (Image.new("RGB", size, colour) for size, colour in (((56, 56), "red"), ((112, 56), "blue")))


AGAIN = "<|im_start|>user\n<QUERY_CONTEXT>\n{}<|im_end|>"


def encoded(processor, messages, **options):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **options
    )


def picture(image, text):
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}


def test_blocks_stand_where_the_processor_says(talking):
    processor = MonoInternVLProcessor.from_pretrained(talking)
    token = processor.query_token_id
    messages = [picture(RED, "What is it?"), {"role": "assistant", "content": "Red."}, picture(BLUE, "And this?")]
    inputs = encoded(processor, messages)
    ids = inputs["input_ids"][0].tolist()
    text = processor.tokenizer.decode(ids)
    block = "<QUERY_CONTEXT>" * 5
    if processor.query_placement == "image":
        assert text.count(f"</img>{block}\nWhat is it?") == 1 and text.count(f"</img>{block}\nAnd this?") == 1
    else:
        assert f"What is it?<|im_end|><|im_start|>user\n{block}\nWhat is it?<|im_end|>" in text
        assert text.endswith(
            f"And this?<|im_end|><|im_start|>user\n{block}\nAnd this?<|im_end|><|im_start|>assistant\n"
        )
    assert ids.count(token) == 10
    # What is rendered as text says the same, and can be encoded as it is; so can counts be taken without pixels.
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered.count("<QUERY_CONTEXT>") == 2
    again = processor(text=rendered, images=[RED, BLUE], max_tiles=4, return_tensors="pt")
    assert again["input_ids"].tolist() == [ids]
    plain = [{**m, "content": [{"type": "image"}, m["content"][1]]} if m["role"] == "user" else m for m in messages]
    without_answer = processor.apply_chat_template(messages, tokenize=True)
    assert processor.count_tokens(plain, [(56, 56), (112, 56)]) == len(without_answer[0])
    # Text alone has none, and typed text never becomes one.
    typed = encoded(processor, [{"role": "user", "content": "<QUERY_CONTEXT> Hi"}])["input_ids"][0].tolist()
    assert token not in typed


def test_chat_answers_with_queries_and_from_the_folder_alone(talking):
    model = MonoInternVLForCausalLM.from_pretrained(talking)
    processor = MonoInternVLProcessor.from_pretrained(talking)
    answer, history = model.chat(RED, "What is it?", max_new_tokens=5, return_history=True)
    inputs = encoded(processor, [picture(RED, "What is it?")])
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert processor.answer_decoder()(out[0, inputs["input_ids"].shape[1] :].tolist()) == answer
    later = model.chat([RED, BLUE], "And this: <image>?", history=history, max_new_tokens=5)
    assert isinstance(later, str)
    without = MonoInternVLProcessor(processor.image_processor, processor.tokenizer)
    with pytest.raises(ValueError, match="the model has .*5.* but the processor .*0"):
        model.chat(RED, "What is it?", processor=without)


def test_only_questions_are_said_again(talking):
    processor = MonoInternVLProcessor.from_pretrained(talking)

    def said(*messages):
        return processor.apply_chat_template(list(messages)).partition("人工智能助手。<|im_end|>")[2]

    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    shown = {**picture(RED, "Here."), "role": "assistant", "tool_calls": [call]}
    text = said({"role": "user", "content": "Show one."}, shown)
    assert text.count("<QUERY_CONTEXT>") == text.count("Here.") == text.count("look") == 1
    assert "</img><QUERY_CONTEXT>\nHere." in text
    # A training example of it has one answer.
    example = encode_conversation(processor, [{"role": "user", "content": "Show one."}, {**shown, "train": True}])
    assert processor.tokenizer.decode(example["labels"][example["labels"] != -100].tolist()).count("Here.") == 1
    if processor.query_placement == "image":
        return
    # Names of pictures and frames stand beside them, and not where there are none.
    video = {"role": "user", "content": [{"type": "video", "video": [RED, BLUE]}, {"type": "text", "text": "What?"}]}
    assert said(video).endswith("Frame2: <img><IMG_CONTEXT></img>\nWhat?<|im_end|>" + AGAIN.format("What?"))
    named = processor.conversation([("Look.\nImage-1: <image>\nImage-2: <image>\nSame?", None)], [RED, BLUE])
    assert said(*named).endswith(AGAIN.format("Look.\nSame?"))
    within = processor.conversation([("Is <image> as <image>?", None)], [RED, BLUE])
    assert said(*within).endswith(AGAIN.format("Is  as ?"))


def test_what_the_processor_refuses(talking):
    processor = MonoInternVLProcessor.from_pretrained(talking)
    with pytest.raises(ValueError, match="0 blocks of learnable queries .* for 1 pictures"):
        processor(text="<IMG_CONTEXT> What?", images=RED)
    with pytest.raises(ValueError, match="2 <QUERY_CONTEXT> stand together; .* is one, or 5"):
        processor(text="<IMG_CONTEXT><QUERY_CONTEXT><QUERY_CONTEXT> What?", images=RED)
    with pytest.raises(ValueError, match="1 blocks of learnable queries .* for 0 pictures"):
        processor(text="<QUERY_CONTEXT> What?", images=[])
    with pytest.raises(ValueError, match="query_placement='end' must be one of image, question"):
        MonoInternVLProcessor(processor.image_processor, processor.tokenizer, query_placement="end")
    with pytest.raises(ValueError, match="need <QUERY_CONTEXT> in the tokenizer"):
        nano = MonoInternVLProcessor.from_pretrained(ROOT)
        MonoInternVLProcessor(nano.image_processor, nano.tokenizer, num_learnable_queries=5)
    limit = encoded(processor, [picture(RED, "What is it?")])["input_ids"].shape[1] - 12
    with pytest.raises(ValueError, match="would cut a picture out"):
        encoded(processor, [picture(RED, "What?")], truncation=True, max_length=min(limit, 60))


def test_training_examples_hold_queries_and_learn_none(talking):
    processor = MonoInternVLProcessor.from_pretrained(talking)
    example = encode_conversation(processor, [picture(RED, "What?"), {"role": "assistant", "content": "Red."}])
    ids, labels = example["input_ids"], example["labels"]
    assert (ids == processor.query_token_id).sum() == 5
    assert (labels[ids == processor.query_token_id] == -100).all()
    assert processor.tokenizer.decode(labels[labels != -100].tolist()) == "Red.<|im_end|>"
    # Others' collators copy the ids.
    for tensors in ("pt", None):
        inputs = processor.apply_chat_template(
            [picture(RED, "What?")], tokenize=True, return_dict=True, return_tensors=tensors
        )
        inputs["labels"] = inputs["input_ids"].clone() if tensors else [list(row) for row in inputs["input_ids"]]
        labels = torch.as_tensor(inputs["labels"])
        assert processor.query_token_id in torch.as_tensor(inputs["input_ids"]) and (labels == -100).sum() == 4 + 5
        assert not {processor.query_token_id, processor.image_token_id} & set(labels.flatten().tolist())
    saved = json.loads((talking / "processor_config.json").read_text())
    assert (saved["num_learnable_queries"], saved["query_placement"]) == (5, processor.query_placement)
