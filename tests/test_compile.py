"""`torch.compile(fullgraph=True)` of prefill, decoding and a training step: one graph, the same numbers."""

import pytest
import torch
from transformers import StaticCache

from conftest import MASK, ROWS, tiles, tiny_model


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
