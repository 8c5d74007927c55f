"""The slower rest of tests/test_compile.py: whole generations, checkpointed training, changing pictures; on a CPU.

Everything is compiled with `fullgraph=True`, so that a graph break is an error.
"""

import pytest
import torch
from model_suite import MonoInternVLModelTester
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from mono_internvl import MonoInternVLForCausalLM


IMAGE, TOKENS_PER_TILE = MonoInternVLModelTester.image_token_id, MonoInternVLModelTester.tokens_per_tile
BATCH, LENGTH = 2, 16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> MonoInternVLForCausalLM:
    torch.manual_seed(0)
    model = MonoInternVLForCausalLM(MonoInternVLModelTester(None, "qkvo").get_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15)
    return model


def batch(tiles_per_row: int = 1) -> dict[str, torch.Tensor]:
    """Rows of one length: without padding the attention mask is left out, which is a path of its own."""
    generator = torch.Generator().manual_seed(tiles_per_row)
    ids = torch.randint(4, 99, (BATCH, LENGTH), generator=generator)
    ids[:, 1 : 1 + tiles_per_row * TOKENS_PER_TILE] = IMAGE
    pixels = torch.randn(BATCH * tiles_per_row, TOKENS_PER_TILE, 3 * 28 * 28, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def compiled(model: MonoInternVLForCausalLM) -> torch.nn.Module:
    return torch.compile(model, fullgraph=True, backend="eager")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_other_numbers_of_tiles(model):
    run = compiled(model)
    for tiles in (1, 2, 3):
        close(run(**batch(tiles)).logits, model(**batch(tiles)).logits)


@torch.no_grad()
def test_a_static_cache_gives_the_numbers_of_a_growing_one(model):
    def logits_of(run, cache):
        rows, inputs = [], batch()
        for step in range(3):
            rows.append(run(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
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


def test_checkpointed_training_step(model):
    model.train()
    model.gradient_checkpointing_enable()
    inputs = batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    gradients = []
    for run in (model, compiled(model)):
        model.zero_grad()
        run(**inputs, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected)
