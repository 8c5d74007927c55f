"""Every token goes through exactly one expert, whatever the cache holds; text never meets the visual path."""

import pytest
import torch

from conftest import IMAGE, MASK, ROWS, tiles, tiny_config, tiny_model
from mono_internvl import MonoInternVLForCausalLM
from mono_internvl.experts_mono_internvl import combine, dispatch
from mono_internvl.modeling_mono_internvl import make_routing_plan


class Rows:
    """Counts the rows that each module of a kind sees."""

    def __init__(self, model, *names):
        self.seen = {name: [] for name in names}
        for path, module in model.named_modules():
            for name in names:
                if path.endswith(f".{name}"):
                    module.register_forward_hook(self._hook(name))

    def _hook(self, name):
        return lambda module, inputs, output: self.seen[name].append(
            inputs[0].reshape(-1, inputs[0].shape[-1]).shape[0]
        )


@pytest.mark.parametrize("experts", ["none", "qkv", "qkvo"])
def test_every_token_passes_one_expert(experts):
    model = tiny_model(visual_attention_experts=experts)
    rows = Rows(model, "mlp", "visual_mlp")
    with torch.no_grad():
        model(ROWS, attention_mask=MASK, pixel_values=tiles())
    assert rows.seen == {"mlp": [22] * 3, "visual_mlp": [8] * 3}
    if experts != "none":
        rows = Rows(model, "q_proj", "visual_q_proj", "k_proj", "visual_k_proj", "o_proj")
        with torch.no_grad():
            model(ROWS, attention_mask=MASK, pixel_values=tiles())
        assert rows.seen["q_proj"] == rows.seen["k_proj"] == [22] * 3
        assert rows.seen["visual_q_proj"] == rows.seen["visual_k_proj"] == [8] * 3
        assert rows.seen["o_proj"] == ([22] * 3 if experts == "qkvo" else [30] * 3)


@pytest.mark.parametrize("experts", ["none", "qkv", "qkvo"])
def test_text_never_reads_the_visual_path(experts):
    """Text-only calls and decoding give the same with poisoned visual weights."""
    model = tiny_model(visual_attention_experts=experts)
    text = ROWS[1:, 3:]
    with torch.no_grad():
        expected = model(text).logits
        prefill = model(ROWS[:1], pixel_values=tiles(1).repeat(2, 1, 1), use_cache=True)
        step = model(torch.tensor([[5]]), past_key_values=prefill.past_key_values).logits
        for name, parameter in model.named_parameters():
            if "visual_" in name or "vision_" in name or "projector" in name:
                parameter.fill_(float("nan"))
        assert torch.equal(model(text).logits, expected)
        assert torch.equal(model(text, pixel_values=tiles(0)).logits, expected)
        prefill.past_key_values.crop(-1)
        assert torch.equal(model(torch.tensor([[5]]), past_key_values=prefill.past_key_values).logits, step)


def test_the_blend_formula(monkeypatch):
    """Routing equals the released formula: both experts on all rows, chosen by mask."""
    model = tiny_model()
    with torch.no_grad():
        routed = model(ROWS, attention_mask=MASK, pixel_values=tiles()).logits
        visual = (ROWS == IMAGE)[..., None]
        for layer in model.model.language_model.layers:
            monkeypatch.setattr(
                layer,
                "feed_forward",
                lambda x, plan, layer=layer: torch.where(visual, layer.visual_mlp(x), layer.mlp(x)),
            )
        blended = model(ROWS, attention_mask=MASK, pixel_values=tiles()).logits
    torch.testing.assert_close(routed[MASK.bool()], blended[MASK.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("experts", ["none", "qkv", "qkvo"])
def test_equal_experts_are_bit_identical_to_dense(experts):
    """V = T: a text-only, an all-visual and a dense run give the same bits."""
    model = tiny_model(visual_attention_experts=experts)
    state = model.state_dict()
    model.load_state_dict({name: state[name.replace("visual_", "")] for name in state})
    embeds = model.get_input_embeddings()(ROWS[1:, 3:])
    with torch.no_grad():
        dense = model.model(inputs_embeds=embeds).last_hidden_state
        every = torch.ones(embeds.shape[:2], dtype=torch.bool)
        assert torch.equal(model.model(inputs_embeds=embeds, visual_token_mask=every).last_hidden_state, dense)
        none = torch.zeros_like(every)
        assert torch.equal(model.model(inputs_embeds=embeds, visual_token_mask=none).last_hidden_state, dense)


def test_attention_experts_start_as_the_text_ones():
    """With copied weights every variant computes what v1 computes."""
    plain = tiny_model()
    state = plain.state_dict()
    for experts in ("qkv", "qkvo"):
        model = MonoInternVLForCausalLM(tiny_config(visual_attention_experts=experts)).eval()
        model.load_state_dict(
            {name: state.get(name, state.get(name.replace(".visual_", "."))) for name in model.state_dict()}
        )
        with torch.no_grad():
            torch.testing.assert_close(
                model(ROWS, attention_mask=MASK, pixel_values=tiles()).logits[MASK.bool()],
                plain(ROWS, attention_mask=MASK, pixel_values=tiles()).logits[MASK.bool()],
                atol=1e-4,
                rtol=1e-4,
            )


def test_a_plan_is_a_permutation():
    mask = torch.rand(3, 50) < 0.4
    plan = make_routing_plan(mask, int(mask.sum()))
    assert sorted([*plan.text.tolist(), *plan.visual.tolist()]) == list(range(150))
    assert mask.flatten()[plan.visual].all() and not mask.flatten()[plan.text].any()
    x = torch.randn(3, 50, 8)
    assert torch.equal(combine(*dispatch(x, plan), plan, x.shape[:2]), x)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["none", "qkvo"])
@pytest.mark.parametrize("keep", [1, 2, 3, 4, 6, 15, 40])
def test_the_last_layer_computes_only_what_is_kept(backend, experts, keep):
    model = tiny_model(visual_attention_experts=experts)
    model.set_attn_implementation(backend)
    with torch.no_grad():
        whole = model(ROWS, attention_mask=MASK, pixel_values=tiles()).logits
        rows = Rows(model, "mlp", "visual_mlp", "q_proj")
        kept = model(ROWS, attention_mask=MASK, pixel_values=tiles(), logits_to_keep=keep).logits
        one = model(ROWS[:1], pixel_values=tiles(), logits_to_keep=keep).logits
    torch.testing.assert_close(kept, whole[:, -keep:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one, whole[:1, -keep:], atol=1e-5, rtol=1e-5)
    if keep <= 4:  # the kept rows are text, so the last layer does only them
        assert rows.seen["mlp"][:3] == [22, 22, 2 * keep]
        assert rows.seen["q_proj"][2] == 2 * keep
        assert len(rows.seen["visual_mlp"]) == 4  # two layers of two calls


def test_kept_positions_as_a_tensor():
    model = tiny_model()
    with torch.no_grad():
        whole = model(ROWS[:1], pixel_values=tiles()).logits
        some = model(ROWS[:1], pixel_values=tiles(), logits_to_keep=torch.tensor([3, 14])).logits
    torch.testing.assert_close(some, whole[:, [3, 14]], atol=1e-5, rtol=1e-5)


def test_counts_that_differ_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="give 4 visual tokens but the input has 8 image placeholders"):
        model(ROWS[:1], pixel_values=tiles(1))
    with pytest.raises(ValueError, match="give 12 visual tokens but the input has 8"):
        model(ROWS[:1], pixel_values=tiles(3))
    with pytest.raises(ValueError, match=r"expected \[tiles, patches, 2352\]"):
        model(ROWS[:1], pixel_values=torch.randn(2, 4, 100))
    with pytest.raises(ValueError, match="square number"):
        model(ROWS[:1], pixel_values=torch.randn(2, 3, 2352))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ROWS[:1], inputs_embeds=torch.zeros(1, 15, 64))
    with pytest.raises(ValueError, match=r"\[B, T\] = \(1, 15\)"):
        model(ROWS[:1], visual_token_mask=torch.zeros(1, 4, dtype=torch.bool))


def test_pixels_in_every_form():
    from mono_internvl.image_processing_mono_internvl import patchify

    model = tiny_model()
    raw = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    floats = (raw.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = model(ROWS[:1], pixel_values=floats).logits
        for pixels in (patchify(floats), raw, patchify(raw)):
            torch.testing.assert_close(model(ROWS[:1], pixel_values=pixels).logits, expected, atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient_without_a_picture():
    """DDP and FSDP wait for gradients of all parameters, also on a rank that has only text."""
    model = tiny_model(visual_attention_experts="qkvo").train()
    model(ROWS[1:, 3:], labels=ROWS[1:, 3:]).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    visual = [p.grad for n, p in model.named_parameters() if "visual_" in n or "vision_" in n or "projector" in n]
    assert visual and all((grad == 0).all() for grad in visual)


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(visual_attention_experts="qkv").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ROWS, attention_mask=MASK, pixel_values=tiles(), labels=ROWS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bfloat16_and_an_all_visual_forward_are_finite():
    model = tiny_model().to(torch.bfloat16)
    with torch.no_grad():
        assert model(ROWS, attention_mask=MASK, pixel_values=tiles()).logits.isfinite().all()
        only = torch.full((1, 8), IMAGE)
        assert model(only, pixel_values=tiles()).logits.isfinite().all()


@pytest.mark.parametrize("with_picture", [True, False])
def test_kept_logits_train_every_parameter(with_picture):
    """What reinforcement learning asks for: without a part of the last visual expert in the graph DDP would wait."""
    model = tiny_model(visual_attention_experts="qkvo").train()
    ids, pixels = (ROWS[:1], tiles()) if with_picture else (ROWS[1:, 3:], None)
    logits = model(ids, pixel_values=pixels, logits_to_keep=2).logits
    logits.sum().backward()
    assert logits.shape[1] == 2
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("part", ["whole", "text"])
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_a_configuration_records_is_recorded_at_all_positions(part, name):
    model = tiny_model(attn_implementation="eager")
    setattr(model.config if part == "whole" else model.config.text_config, name, True)
    with torch.no_grad():
        recorded = model(ROWS[:1], pixel_values=tiles(), logits_to_keep=1)
        asked = tiny_model(attn_implementation="eager")(ROWS[:1], pixel_values=tiles(), **{name: True})
    key = name.removeprefix("output_")
    assert len(getattr(recorded, key)) == len(getattr(asked, key)) > 0
    for one, other in zip(getattr(recorded, key), getattr(asked, key), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert getattr(model(ROWS[:1], pixel_values=tiles(), **{name: False}), key) is None


@pytest.mark.parametrize("visual", [True, False])
def test_embeddings_and_a_mask_train_as_pictures_do(visual):
    """Whoever embeds pictures himself says by a mask where they are; so does a batch of his without any."""
    model = tiny_model().train()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ROWS[:1])
        mask = ROWS[:1] == IMAGE
        embeds[mask] = model.get_image_features(tiles()).pooler_output.flatten(0, 1)
    mask = mask & visual
    out = model(inputs_embeds=embeds, visual_token_mask=mask, labels=ROWS[:1])
    expected = model.eval()(inputs_embeds=embeds, visual_token_mask=mask).logits
    torch.testing.assert_close(out.logits, expected, atol=1e-6, rtol=1e-6)
    out.loss.backward()
    layers = model.model.language_model.layers
    assert all(layer.visual_mlp.up_proj.weight.grad is not None for layer in layers)
