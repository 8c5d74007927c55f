"""The numbers of the released code on the golden model: logits, generation, gradients, RoPE, the visual embedding."""

import json

import pytest
import torch

from conftest import golden, load_golden


CASES = ["case_text", "case_text_long", "case_image_1tile", "case_image_multi", "case_batch_leftpad"]


def assert_logits(actual, expected, attention_mask):
    keep = attention_mask.bool()
    torch.testing.assert_close(actual[keep], expected[keep], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_logits(variant_a, case, backend):
    data = load_golden("variant_a", f"{case}.safetensors")
    variant_a.set_attn_implementation(backend)
    for positions, logits in (("", "logits"), ("position_ids", "logits_with_position_ids")):
        if logits not in data:
            continue
        with torch.no_grad():
            outputs = variant_a(
                input_ids=data["input_ids"],
                attention_mask=data["attention_mask"],
                pixel_values=data.get("pixel_values"),
                position_ids=data[positions] if positions else None,
            )
        assert_logits(outputs.logits, data[logits], data["attention_mask"])
    variant_a.set_attn_implementation("eager")


@pytest.mark.parametrize("case", CASES)
def test_hidden_states(variant_a, case):
    data = load_golden("variant_a", f"{case}.safetensors")
    if "hidden_states" not in data:
        pytest.skip(f"{case} holds logits only")
    with torch.no_grad():
        outputs = variant_a(
            input_ids=data["input_ids"],
            attention_mask=data["attention_mask"],
            pixel_values=data.get("pixel_values"),
            output_hidden_states=True,
            logits_to_keep=1,
        )
    keep = data["attention_mask"].bool()
    assert len(outputs.hidden_states) == len(data["hidden_states"])
    for actual, expected in zip(outputs.hidden_states, data["hidden_states"], strict=True):
        torch.testing.assert_close(actual[keep], expected[keep], atol=1e-4, rtol=1e-4)


def test_visual_embedding(variant_a):
    data = load_golden("variant_a", "vision.safetensors")
    tiles = load_golden("variant_a", "case_image_multi.safetensors")["pixel_values"]
    with torch.no_grad():
        features = variant_a.get_image_features(tiles).pooler_output
        torch.testing.assert_close(features, data["vit_embeds"], atol=1e-4, rtol=1e-4)
        other = variant_a.get_image_features(data["pixel_values_other_size"]).pooler_output
        torch.testing.assert_close(other, data["vit_embeds_other_size"], atol=1e-4, rtol=1e-4)
        positions = variant_a.model.vision_embeddings.positions(6)
    torch.testing.assert_close(positions, data["position_embedding_resized"][0, 1:], atol=1e-5, rtol=1e-5)


def test_rope(variant_a):
    data = load_golden("variant_a", "rope.safetensors")
    rope = variant_a.model.language_model.rotary_emb
    lengths = sorted({int(name.split(".")[0][3:]) for name in data if name.startswith("seq")})
    assert lengths
    for length in lengths:
        cos, sin = rope(torch.zeros(1), torch.arange(length)[None])
        torch.testing.assert_close(cos[0], data[f"seq{length}.cos"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sin[0], data[f"seq{length}.sin"], atol=1e-5, rtol=1e-5)


def test_continuation_in_chunks(variant_a):
    """Routing follows the token: the same logits wherever the prompt is cut, also inside or before the picture."""
    data = load_golden("variant_a", "continuation.safetensors")
    embeds, mask, expected = data["inputs_embeds"], data["visual_token_mask"].bool(), data["correct_logits"]
    whole = torch.ones_like(data["attention_mask"])
    with torch.no_grad():
        features = variant_a(input_ids=data["input_ids"], pixel_values=data["pixel_values"]).logits
        assert_logits(features, expected, whole)
        for split in range(1, embeds.shape[1]):
            first = variant_a(inputs_embeds=embeds[:, :split], visual_token_mask=mask[:, :split], use_cache=True)
            second = variant_a(
                inputs_embeds=embeds[:, split:],
                visual_token_mask=mask[:, split:],
                past_key_values=first.past_key_values,
            )
            assert_logits(torch.cat([first.logits, second.logits], 1), expected, whole)
        for name in ("text_suffix", "image_in_suffix"):
            split = int(data[f"{name}.split"])
            in_first = bool(mask[:, :split].any())
            first = variant_a(
                input_ids=data["input_ids"][:, :split],
                pixel_values=data["pixel_values"] if in_first else None,
                use_cache=True,
            )
            second = variant_a(
                input_ids=data["input_ids"][:, split:],
                pixel_values=None if in_first else data["pixel_values"],
                past_key_values=first.past_key_values,
            )
            assert_logits(torch.cat([first.logits, second.logits], 1), expected, whole)
        # The test can fail: without a mask the second chunk's picture goes through the text expert.
        split = int(data["image_in_suffix.split"])
        first = variant_a(inputs_embeds=embeds[:, :split], use_cache=True)
        wrong = variant_a(inputs_embeds=embeds[:, split:], past_key_values=first.past_key_values)
        assert (wrong.logits - expected[:, split:]).abs().max() > 1


GREEDY_CASES = ["text", "image_1tile", "image_multi", "batch", "batch_eos"]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("case", GREEDY_CASES)
def test_generate(variant_a, case, use_cache):
    assert_greedy(variant_a, case, use_cache=use_cache)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_greedy_ids_do_not_depend_on_the_backend_or_on_compilation(variant_a, backend, compiled, monkeypatch):
    before = variant_a.config._attn_implementation
    variant_a.set_attn_implementation(backend)
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(variant_a.forward, dynamic=True, fullgraph=True, backend="eager")
        monkeypatch.setattr(variant_a, "forward", forward)
    try:
        for case in GREEDY_CASES:
            assert_greedy(variant_a, case)
    finally:
        variant_a.set_attn_implementation(before)


def assert_greedy(model, case, **options):
    data = load_golden("variant_a", "generate.safetensors")
    source = {"batch": "case_batch_leftpad", "batch_eos": "case_batch_leftpad"}.get(case, f"case_{case}")
    pixels = load_golden("variant_a", f"{source}.safetensors").get("pixel_values")
    inputs = case.replace("_eos", "")
    stop = int(data["batch_eos.eos_token_id"]) if case == "batch_eos" else -1
    sequences = model.generate(
        input_ids=data[f"{inputs}.input_ids"],
        attention_mask=data[f"{inputs}.attention_mask"],
        pixel_values=pixels,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=2,
        **options,
    )
    new = sequences[:, data[f"{inputs}.input_ids"].shape[1] :]
    assert new.tolist() == data[f"{case}.sequences"].tolist()


def test_loss_and_gradients(variant_a):
    data = load_golden("variant_a", "case_train.safetensors")
    expected = load_golden("variant_a", "grads.safetensors")
    norms = json.loads(golden("variant_a", "grad_norms.json").read_text())
    flags = data["image_flags"].bool()
    inputs = {
        "input_ids": data["input_ids"],
        "attention_mask": data["attention_mask"],
        "position_ids": data["position_ids"],
        # The dummy tile of the text-only row belongs to no placeholder.
        "pixel_values": data["pixel_values"][flags],
    }
    variant_a.train()
    outputs = variant_a(**inputs, labels=data["labels"])
    assert_logits(outputs.logits, data["logits"], data["attention_mask"])
    torch.testing.assert_close(outputs.loss, data["loss"][0], atol=1e-4, rtol=1e-4)
    # The golden gradients have placeholders among the targets, which `forward` leaves out.
    labels, vocab_size = data["labels_all_tokens"], variant_a.config.text_config.vocab_size
    outputs = variant_a(**inputs, labels=labels)
    kept = labels.masked_fill(labels == variant_a.config.image_token_id, -100)
    wanted = variant_a.loss_function(logits=outputs.logits, labels=kept, vocab_size=vocab_size)
    torch.testing.assert_close(outputs.loss, wanted)
    loss = variant_a.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab_size)
    torch.testing.assert_close(loss, data["loss_all_tokens"][0], atol=1e-4, rtol=1e-4)
    loss.backward()
    variant_a.eval()

    text = variant_a.config.text_config
    from mono_internvl.weight_mapping_mono_internvl import merge_grouped_qkv

    layers = variant_a.model.language_model.layers
    grads = {name: parameter.grad for name, parameter in variant_a.named_parameters()}
    pairs = {
        "language_model.output.weight": grads["lm_head.weight"],
        "language_model.model.tok_embeddings.weight": grads["model.language_model.embed_tokens.weight"],
        "vision_model.embeddings.position_embedding": grads["model.vision_embeddings.position_embedding"],
        "vision_model.embeddings.patch_embedding.weight": grads["model.vision_embeddings.patch_embedding.weight"],
        "mlp1.1.weight": grads["model.multi_modal_projector.linear_1.weight"],
    }
    for i in range(len(layers)):
        ours, theirs = f"model.language_model.layers.{i}", f"language_model.model.layers.{i}"
        q, k, v = (grads[f"{ours}.self_attn.{part}_proj.weight"] for part in "qkv")
        pairs[f"{theirs}.attention.wqkv.weight"] = merge_grouped_qkv(
            q, k, v, text.num_attention_heads, text.num_key_value_heads, text.head_dim
        )
        pairs[f"{theirs}.attention.wo.weight"] = grads[f"{ours}.self_attn.o_proj.weight"]
        for w, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            pairs[f"{theirs}.feed_forward.{w}.weight"] = grads[f"{ours}.mlp.{name}_proj.weight"]
            pairs[f"{theirs}.feed_forward_ve.{w}.weight"] = grads[f"{ours}.visual_mlp.{name}_proj.weight"]
    for name, grad in pairs.items():
        error = (grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: {error}"
        assert abs(float(grad.norm()) - norms["all_token_labels"][name]) < 1e-4 * max(
            norms["all_token_labels"][name], 1
        )
    variant_a.zero_grad()
