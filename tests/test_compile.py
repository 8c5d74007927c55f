"""`torch.compile(fullgraph=True)` of prefill, decoding and a training step: one graph, the same numbers."""

import pytest
import torch
from test_routing import MASK, ROWS, tiles
from transformers import CompileConfig, StaticCache

from conftest import tiny_model
from mono_internvl.compat_mono_internvl import CACHE
from mono_internvl.generation_mono_internvl import STATIC_CACHE_STEP


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("experts", ["none", "qkvo"])
@pytest.mark.parametrize("keep", [0, 1])
def test_prefill(experts, keep):
    model = tiny_model(visual_attention_experts=experts)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for rows, mask, pixels in ((ROWS, MASK, tiles()), (ROWS[1:, 3:], None, None)):
            inputs = {"input_ids": rows, "attention_mask": mask, "pixel_values": pixels, "logits_to_keep": keep}
            expected = model(**inputs, use_cache=False).logits
            actual = compiled(**inputs, use_cache=False).logits
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("experts", ["none", "qkvo"])
def test_decoding_with_a_static_cache(experts):
    model = tiny_model(visual_attention_experts=experts)
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def steps(forward):
        cache = StaticCache(config=model.config.text_config, max_cache_len=32)
        out = model(ROWS[:1], pixel_values=tiles(), past_key_values=cache)
        logits = [out.logits[:, -1]]
        for i in range(4):
            position = torch.tensor([[ROWS.shape[1] + i]])
            token = logits[-1].argmax(-1, keepdim=True)
            logits.append(forward(token, position_ids=position, past_key_values=cache).logits[:, -1])
        return torch.stack(logits)

    with torch.no_grad():
        torch.testing.assert_close(steps(compiled), steps(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("experts", ["none", "qkv"])
@pytest.mark.parametrize("pictures", [True, False])
def test_training_step(experts, pictures):
    model = tiny_model(visual_attention_experts=experts).train()
    inputs = {"input_ids": ROWS, "attention_mask": MASK, "labels": ROWS, "pixel_values": tiles()}
    if not pictures:
        inputs = {"input_ids": ROWS[1:, 3:], "labels": ROWS[1:, 3:]}
    model(**inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)


def test_a_wrong_number_of_pictures_is_not_silent():
    compiled = torch.compile(tiny_model(), fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="placeholders"):
        compiled(input_ids=ROWS[:1], pixel_values=tiles(1))


def test_generate_compiles_its_step_once_for_all_numbers_of_tiles_and_tokens():
    model = tiny_model()
    graphs = []

    def counting(graph, inputs, **kwargs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(backend=counting, fullgraph=True)
    compile_config._compile_all_devices = True
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    static = {"cache_implementation": "static", "compile_config": compile_config}
    prompts = [(ROWS[:1], tiles()), (ROWS[1:, 3:], None), (ROWS[1:].repeat(1, 7)[:, 3:], None)]
    for number, (ids, pixels) in enumerate(prompts):
        inputs = {"input_ids": ids} if pixels is None else {"input_ids": ids, "pixel_values": pixels}
        expected = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, **static), expected)
        if number == 0:
            compiled = len(graphs)
            assert compiled > 0
    assert len(graphs) == compiled
    longer = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    ids, pixels = prompts[0]
    model.generate(ids, pixel_values=pixels, **longer, **static)
    assert len(graphs) == compiled


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_new_tokens": 6}, STATIC_CACHE_STEP),
        ({"max_length": 40}, STATIC_CACHE_STEP),
        ({"max_new_tokens": STATIC_CACHE_STEP}, 2 * STATIC_CACHE_STEP),
        ({"max_new_tokens": 6, "max_cache_len": 77}, 77),
    ],
)
def test_the_length_of_a_static_cache(options, length):
    model = tiny_model()
    out = model.generate(
        ROWS[1:, 3:],
        **options,
        do_sample=False,
        cache_implementation="static",
        return_dict_in_generate=True,
        eos_token_id=list(range(120)),
    )
    assert out[CACHE].layers[0].keys.shape[2] == length


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_step_is_one_graph_for_all_prompts():
    from torch._dynamo.utils import counters

    model = tiny_model().to("cuda", torch.bfloat16)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    counters.clear()
    graphs = []
    for ids, pixels in [(ROWS[:1], tiles()), (ROWS[1:, 3:], None), (ROWS[1:].repeat(1, 7)[:, 3:], None)]:
        inputs = {"input_ids": ids.cuda()}
        if pixels is not None:
            inputs["pixel_values"] = pixels.cuda()
        expected = model.generate(**inputs, **options)
        answer = model.generate(**inputs, **options, cache_implementation="static")
        # bfloat16 adds up in another order: the first tokens, before ties could have gone another way.
        assert torch.equal(answer[:, : ids.shape[1] + 2], expected[:, : ids.shape[1] + 2])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1] and not counters["graph_break"], (graphs, counters["graph_break"])
