"""`torch.compile(fullgraph=True)`: no graph break in prefill, decoding or training, and the same numbers as without.

Slow to trace, so it runs with the conformance suite (`run.py`) and not with every `pytest`.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from mono_internvl import MonoInternVLConfig, MonoInternVLForCausalLM


IMAGE = 113
BATCH, LENGTH, TOKENS_PER_TILE = 2, 12, 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(params=["none", "qkvo"])
def model(request) -> MonoInternVLForCausalLM:
    text = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    config = MonoInternVLConfig(
        text_config=text,
        vision_config={"hidden_size": 16, "image_size": 56},
        image_token_id=IMAGE,
        visual_attention_experts=request.param,
    )
    torch.manual_seed(0)
    model = MonoInternVLForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15)
    return model


def batch(tiles_per_row: int = 1, length: int = LENGTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tiles_per_row)
    ids = torch.randint(4, 100, (BATCH, length), generator=generator)
    ids[:, 1 : 1 + tiles_per_row * TOKENS_PER_TILE] = IMAGE
    pixels = torch.randn(BATCH * tiles_per_row, TOKENS_PER_TILE, 3 * 28 * 28, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def compiled(model: torch.nn.Module, backend: str = "eager") -> torch.nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"logits_to_keep": 1}], ids=["all", "last"])
@torch.no_grad()
def test_prefill(model, options):
    close(compiled(model)(**batch(), **options).logits, model(**batch(), **options).logits)


@torch.no_grad()
def test_other_numbers_of_tiles_need_no_graph_break(model):
    run = compiled(model)
    for tiles in (1, 2, 3):
        inputs = batch(tiles, length=16)
        close(run(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_decode_with_a_static_cache(model):
    def logits_of(run, cache):
        rows, inputs = [], {**batch(), "logits_to_keep": 1}
        for step in range(4):
            rows.append(run(**inputs, past_key_values=cache, use_cache=True).logits)
            position = torch.full((BATCH, 1), LENGTH + step)
            mask = torch.ones(BATCH, LENGTH + step + 1, dtype=torch.long)
            inputs = {"input_ids": rows[-1].argmax(-1), "attention_mask": mask, "position_ids": position}
        return torch.cat(rows, dim=1)

    text = model.config.text_config
    expected = logits_of(model, DynamicCache(config=text))
    close(logits_of(model, StaticCache(config=text, max_cache_len=32)), expected)
    close(logits_of(compiled(model), StaticCache(config=text, max_cache_len=32)), expected)


def test_generate_compiles_its_decoding(model):
    settings = CompileConfig(fullgraph=True, backend="eager", mode=None)
    # transformers compiles on accelerators only, unless told otherwise.
    settings._compile_all_devices = True
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**batch(), **options)
    actual = model.generate(**batch(), **options, cache_implementation="static", compile_config=settings)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "text"])
def test_training_step(model, pictures, checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = batch()
    if not pictures:
        del inputs["pixel_values"]
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 5)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    gradients = []
    for run in (model, compiled(model)):
        model.zero_grad()
        run(**inputs, use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected)


@pytest.mark.parametrize("model", ["none"], indirect=True)
@torch.no_grad()
def test_placeholders_without_their_pixels_are_not_silent(model):
    run = compiled(model)
    run(**batch())
    for position, token in ((5, IMAGE), (1, 7)):
        inputs = batch()
        inputs["input_ids"][0, position] = token
        with pytest.raises(RuntimeError, match="differ in number"):
            run(**inputs)
