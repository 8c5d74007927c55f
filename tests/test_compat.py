"""One model on every tested version of transformers: the cache's two names, unknown keywords, continuous batching."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.continuous_batching import input_outputs

from conftest import tiny_model
from mono_internvl import compat_mono_internvl as compat


def ids(length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 100, (1, length), generator=generator)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_known_by_both_names(tiny, name, recwarn):
    row = ids()
    whole = tiny(input_ids=row).logits
    cache = DynamicCache(config=tiny.config.text_config)
    tiny(input_ids=row[:, :5], **{name: cache})
    rest = tiny(input_ids=row[:, 5:], **{name: cache})
    torch.testing.assert_close(rest.logits, whole[:, 5:], atol=1e-4, rtol=1e-4)
    assert compat.cache_of(rest) is cache and rest.cache is cache
    continued = tiny.generate(
        row, max_new_tokens=3, do_sample=False, **{name: DynamicCache(config=tiny.config.text_config)}
    )
    assert torch.equal(continued, tiny.generate(row, max_new_tokens=3, do_sample=False))
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


def test_two_caches_are_an_error(tiny):
    caches = [DynamicCache(config=tiny.config.text_config) for _ in range(2)]
    with pytest.raises(ValueError, match="two names"):
        tiny(input_ids=ids(), cache=caches[0], past_key_values=caches[1])


def test_an_unknown_keyword_is_an_error_that_names_the_nearest(tiny):
    row = ids()
    for forward in (tiny, tiny.model, tiny.model.language_model):
        with pytest.raises(TypeError, match="'attention_maks' .did you mean 'attention_mask'"):
            forward(input_ids=row, attention_maks=torch.ones_like(row))
    with pytest.raises(TypeError, match="did you mean 'pixel_values'"):
        tiny(input_ids=row, pixel_value=None)
    with pytest.raises(TypeError, match="image_size"):
        tiny.get_image_features(torch.zeros(1, 3, 56, 56), image_size=1)


def test_what_transformers_passes_down_is_known():
    paged = set(input_outputs.PagedAttentionArgs.__annotations__) - {"input_ids", "attention_mask", "position_ids"}
    assert paged <= compat.PAGED_KEYWORDS


def test_a_version_newer_than_the_newest_tested_one_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(compat.logger, "warning", said.append)
    compat.warn_if_untested("5.24.0")
    assert not said
    compat.warn_if_untested("5.25.1")
    assert "5.25.1 is newer than 5.24.0" in said[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("count", [1, 3])
def test_continuous_batching_answers_as_generate(attention, count):
    model = tiny_model(seed=3)
    model.set_attn_implementation(attention)
    prompts = [ids(length, seed)[0].tolist() for seed, length in enumerate((6, 11, 4))][:count]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2)
    wanted = [
        model.generate(torch.tensor([p]), generation_config=config, attention_mask=torch.ones(1, len(p)))[0, len(p) :]
        for p in prompts
    ]
    # Left to itself the engine takes most of the machine's memory.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    answers = sorted(found.values(), key=lambda answer: int(answer.request_id.rpartition("_")[2]))
    assert [answer.error for answer in answers] == [None] * count
    assert [answer.generated_tokens for answer in answers] == [row.tolist() for row in wanted]


def test_continuous_batching_refuses_what_it_cannot_do(tiny):
    token = tiny.config.image_token_id
    with pytest.raises(ValueError, match="takes text only"):
        tiny.generate_batch([[5, token, 6]])
    with pytest.raises(ValueError, match="takes text only"):
        tiny.generate_batch({"input_ids": [[5]], "pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a list of token ids"):
        tiny.generate_batch(["Hello"])
    with pytest.raises(TypeError, match="did you mean 'max_new_tokens'"):
        tiny.generate_batch([[5]], max_new_token=3)


def test_placeholders_are_never_targets(tiny):
    token, tiles = tiny.config.image_token_id, torch.rand(1, 3, 56, 56)
    patches = tiny.config.vision_config.tokens_per_tile
    row = torch.tensor([[5, *[token] * patches, 6, 7, 8]])
    masked = row.masked_fill(row == token, -100)
    wanted = tiny(input_ids=row, pixel_values=tiles, labels=masked).loss
    torch.testing.assert_close(tiny(input_ids=row, pixel_values=tiles, labels=row).loss, wanted)
    # Whoever counts the targets of a step counts placeholders too.
    counted = (row[:, 1:] != -100).sum()
    torch.testing.assert_close(
        tiny(input_ids=row, pixel_values=tiles, labels=row, num_items_in_batch=counted).loss, wanted
    )
    shifted = torch.cat([row[:, 1:], torch.full((1, 1), -100)], dim=1)
    torch.testing.assert_close(tiny(input_ids=row, pixel_values=tiles, shift_labels=shifted).loss, wanted)


def test_what_wraps_the_patch_embedding_is_heard(tiny):
    seen = []
    handle = tiny.model.vision_embeddings.patch_embedding.register_forward_hook(
        lambda *call: seen.append(call[2].shape)
    )
    tiles = torch.rand(2, 3, 56, 56)
    plain = tiny.get_image_features(tiles).pooler_output
    handle.remove()
    assert seen
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny, peft.LoraConfig(r=2, target_modules=["patch_embedding"], init_lora_weights=False)
    )
    changed = adapted.base_model.model.get_image_features(tiles).pooler_output
    assert not torch.allclose(plain, changed)
    changed.sum().backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora" in name]
    assert len(grads) == 2 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("place", ["disk_offload", "cpu_offload"])
def test_offloaded_weights_are_read_through_their_modules(processor, tmp_path, place):
    accelerate = pytest.importorskip("accelerate")
    from PIL import Image

    model = tiny_model(seed=7, text_config={"vocab_size": len(processor.tokenizer)})
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    picture = Image.new("RGB", (80, 60), "red")
    wanted = model.chat(picture, "What is it?", processor=processor, max_new_tokens=4)
    options = {"execution_device": torch.device("cpu")}
    if place == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), **options)
    else:
        accelerate.cpu_offload(model, **options)
    assert model.chat(picture, "What is it?", processor=processor, max_new_tokens=4) == wanted
