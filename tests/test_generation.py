"""However it is generated, the answer is the plain uncached one: cache kinds, batches, beams, chunks, assistants."""

import pytest
import torch
import transformers.generation.utils as generation_utils

from conftest import IMAGE, MASK, ROWS, tiles, tiny_model


NEW = 12
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def plain(model, row, pixels):
    """Greedy, one full forward a token, ids of the picture suppressed as `generate` does."""
    ids = row[None]
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(ids, pixel_values=pixels).logits[0, -1]
        logits[IMAGE - 2 : IMAGE + 1] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    return ids[0, row.shape[0] :].tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def expected(model):
    return [plain(model, ROWS[0], tiles()), plain(model, ROWS[1, 3:], None)]


def generated(model, rows, mask, **options):
    sequences = model.generate(rows, attention_mask=mask, **{**OPTIONS, **options})
    return [row[rows.shape[1] :].tolist() for row in sequences]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_mixed_batch(model, expected, backend, cache):
    model.set_attn_implementation(backend)
    assert generated(model, ROWS, MASK, pixel_values=tiles(), use_cache=cache) == expected


def test_single_rows(model, expected):
    assert generated(model, ROWS[:1], MASK[:1], pixel_values=tiles()) == expected[:1]
    assert generated(model, ROWS[1:, 3:], MASK[1:, 3:]) == expected[1:]


def test_static_cache(model, expected):
    assert generated(model, ROWS, MASK, pixel_values=tiles(), cache_implementation="static") == expected


def test_from_embeddings(model, expected):
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ROWS).clone()
        embeds[ROWS == IMAGE] = model.get_image_features(tiles()).pooler_output.flatten(0, 1)
    for cache in (True, False):
        sequences = model.generate(
            inputs_embeds=embeds, attention_mask=MASK, visual_token_mask=ROWS == IMAGE, use_cache=cache, **OPTIONS
        )
        assert [row[-NEW:].tolist() for row in sequences] == expected


def test_uint8_pixels(model):
    raw = (tiles().sigmoid() * 255).to(torch.uint8)
    first = generated(model, ROWS[:1], MASK[:1], pixel_values=raw)
    floats = model.model.vision_embeddings.normalize(raw)
    assert first == generated(model, ROWS[:1], MASK[:1], pixel_values=floats)


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_keep_each_rows_tiles(model, beams):
    """Rows with different numbers of tiles: a batch gives what each row gives alone."""
    second = ROWS[:1].clone()
    second[0, 3:7] = torch.tensor([20, 21, 22, 23])
    rows, mask = torch.cat([ROWS[:1], second, ROWS[1:]]), torch.cat([MASK[:1], MASK[:1], MASK[1:]])
    pixels = tiles(3)
    together = generated(model, rows, mask, pixel_values=pixels, num_beams=beams)
    alone = [
        generated(model, rows[:1], mask[:1], pixel_values=pixels[:2], num_beams=beams)[0],
        generated(model, rows[1:2], mask[1:2], pixel_values=pixels[2:], num_beams=beams)[0],
        generated(model, rows[2:, 3:], mask[2:, 3:], num_beams=beams)[0],
    ]
    assert together == alone
    swapped = generated(model, rows, mask, pixel_values=pixels.flip(0), num_beams=beams)
    assert swapped[:2] != alone[:2]


def test_several_return_sequences(model, expected):
    torch.manual_seed(0)
    many = generated(model, ROWS, MASK, pixel_values=tiles(), do_sample=True, top_k=1, num_return_sequences=3)
    assert many == [expected[0]] * 3 + [expected[1]] * 3
    torch.manual_seed(0)
    beams = generated(model, ROWS, MASK, pixel_values=tiles(), num_beams=4, num_return_sequences=4)
    assert len(beams) == 8 and len({tuple(row) for row in beams[:4]}) > 1


def test_assisted_decoding(model, expected):
    assistant = tiny_model(seed=4)
    assert generated(model, ROWS[:1], MASK[:1], pixel_values=tiles(), assistant_model=assistant) == expected[:1]
    assert generated(model, ROWS[:1], MASK[:1], pixel_values=tiles(), prompt_lookup_num_tokens=3) == expected[:1]


def test_chunked_prefill(model, expected):
    options = {"pixel_values": tiles(), "prefill_chunk_size": 5}
    if hasattr(generation_utils, "_slice_mm_encoder_output"):
        assert generated(model, ROWS[:1], MASK[:1], **options) == expected[:1]
    else:
        with pytest.raises(ValueError, match="transformers >= 5.23"):
            generated(model, ROWS[:1], MASK[:1], **options)
    assert generated(model, ROWS[1:, 3:], MASK[1:, 3:], prefill_chunk_size=5) == expected[1:]


def test_a_new_picture_in_a_later_turn(model):
    """Reusing the cache of turn 1, with turn 2's picture in the new part, equals one whole prompt."""
    follow_up = torch.tensor([[8, 111, *[IMAGE] * 4, 112, 40, 41]])
    whole = torch.cat([ROWS[:1], follow_up], 1)
    pixels = tiles(3)
    reference = generated(model, whole, torch.ones_like(whole), pixel_values=pixels)
    first = model.generate(
        ROWS[:1], attention_mask=MASK[:1], pixel_values=pixels[:2], return_dict_in_generate=True, **OPTIONS
    )
    cache = first.past_key_values
    cache.crop(ROWS.shape[1] - cache.get_seq_length())
    continued = generated(model, whole, torch.ones_like(whole), pixel_values=pixels[2:], past_key_values=cache)
    assert continued == reference


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 5.0}, {"num_beams": 3}])
def test_picture_tokens_are_never_generated(options):
    model = tiny_model(seed=5)
    with torch.no_grad():
        model.lm_head.weight[IMAGE - 2 : IMAGE + 1] = model.lm_head.weight.abs().max() * 50
    free = model(ROWS[1:, 3:]).logits[0, -1].argmax()
    assert int(free) in range(IMAGE - 2, IMAGE + 1)
    out = generated(model, ROWS, MASK, pixel_values=tiles(), **options)
    assert not {IMAGE - 2, IMAGE - 1, IMAGE} & {token for row in out for token in row}


def test_a_callers_generation_config_is_not_changed(model):
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=4, pad_token_id=2)
    before = config.to_dict()
    model.generate(ROWS[:1], attention_mask=MASK[:1], pixel_values=tiles(), generation_config=config)
    assert config.to_dict() == before


def test_static_cache_without_padding(model, expected):
    """A static cache has empty places, which an unpadded prompt's last query must not see."""
    one = generated(model, ROWS[:1], MASK[:1], pixel_values=tiles(), cache_implementation="static")
    two = generated(model, ROWS[1:, 3:], MASK[1:, 3:], cache_implementation="static")
    assert [*one, *two] == expected
