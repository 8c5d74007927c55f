"""The output head whose weight is padded for one call: the same logits, gradients and names as a plain layer."""

import peft
import pytest
import torch
from torch import nn

from conftest import tiny_model
from mono_internvl.output_head_mono_internvl import PADDED_ROWS, PADDED_ROWS_TRAINED, MonoInternVLOutputHead


class OnCuda(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.fixture(params=["padded", "split"])
def aligned(request, monkeypatch):
    """As on a GPU; the calls that were not plain."""
    calls = []

    def way(self, x):
        calls.append(x.shape)
        return request.param

    monkeypatch.setattr(MonoInternVLOutputHead, "way", way)
    return calls


def pair(vocab=121, hidden=24):
    torch.manual_seed(0)
    head, plain = MonoInternVLOutputHead(hidden, vocab), nn.Linear(hidden, vocab, bias=False)
    plain.load_state_dict(head.state_dict())
    return head, plain


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 121])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (0, 24), (1, 1, 24)])
def test_logits_and_gradients_are_those_of_a_plain_layer(aligned, vocab, shape):
    head, plain = pair(vocab)
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    logits, expected = head(x), plain(y)
    assert aligned and logits.shape == expected.shape and logits.dtype == expected.dtype
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-5)
    assert head.weight.grad.shape == head.weight.shape
    torch.testing.assert_close(head.weight.grad, plain.weight.grad, atol=1e-6, rtol=1e-5)


def test_on_a_cpu_it_is_the_plain_product():
    head, plain = pair()
    x = torch.randn(2 * PADDED_ROWS, 24)
    assert head.way(x) == "plain" and torch.equal(head(x), plain(x))
    assert list(head.state_dict()) == ["weight"] and isinstance(head, nn.Linear) and head.bias is None


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype", "trained", "expected"),
    [
        (1, 121, torch.bfloat16, False, "split"),
        (PADDED_ROWS - 1, 121, torch.bfloat16, False, "split"),
        (PADDED_ROWS, 121, torch.bfloat16, False, "padded"),
        (1, 63, torch.bfloat16, False, "padded"),
        (1, 120, torch.bfloat16, False, "plain"),
        (1, 124, torch.bfloat16, False, "split"),
        (1, 124, torch.float32, False, "plain"),
        (1, 121, torch.float32, False, "split"),
        (PADDED_ROWS_TRAINED - 1, 121, torch.bfloat16, True, "plain"),
        (PADDED_ROWS_TRAINED, 121, torch.bfloat16, True, "padded"),
        (PADDED_ROWS_TRAINED, 120, torch.bfloat16, True, "plain"),
    ],
)
def test_the_rule(rows, vocab, dtype, trained, expected):
    head = MonoInternVLOutputHead(24, vocab).to(dtype)
    x = torch.zeros(1, rows, 24, dtype=dtype).as_subclass(OnCuda)
    with torch.set_grad_enabled(trained):
        assert head.way(x) == expected


def test_a_frozen_head_has_no_backward_to_align():
    head = MonoInternVLOutputHead(24, 121).requires_grad_(False)
    x = torch.zeros(PADDED_ROWS_TRAINED, 24).as_subclass(OnCuda)
    assert head.way(x) == "split"
    assert head.way(torch.zeros(PADDED_ROWS_TRAINED, 24).requires_grad_().as_subclass(OnCuda)) == "padded"


def test_a_weight_of_another_class_keeps_its_own_product():
    class Quantised(torch.Tensor):
        pass

    head = MonoInternVLOutputHead(24, 121)
    x = torch.zeros(PADDED_ROWS, 24).as_subclass(OnCuda)
    assert head.way(x) == "padded"
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Quantised), requires_grad=False)
    assert head.way(x) == "plain"


def whole(model, **kwargs):
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(3))
    return model(ids, labels=ids, **kwargs)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_what_it_teaches_are_the_same(aligned, tied, monkeypatch):
    torch.manual_seed(0)
    model = tiny_model(text_config={"tie_word_embeddings": tied, "vocab_size": 121}).train()
    out = whole(model)
    out.loss.backward()
    assert aligned
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(MonoInternVLOutputHead, "way", lambda self, x: "plain")
    expected = whole(model)
    expected.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_under_compile_and_lora(aligned):
    model = tiny_model(text_config={"vocab_size": 121}).eval()
    expected = whole(model).logits
    head, x = model.lm_head, torch.randn(2, 9, model.lm_head.in_features)
    torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), head(x))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"])).eval()
    aligned.clear()
    torch.testing.assert_close(whole(wrapped).logits, expected)
    assert aligned, "the adapter's base layer is still the head"


def test_resizing_keeps_the_head():
    model = tiny_model()
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(131)
    assert type(model.lm_head) is MonoInternVLOutputHead and model.lm_head.out_features == 131
    assert torch.equal(model.lm_head.weight[: len(before)], before)
    assert whole(model).logits.shape[-1] == 131


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 300, PADDED_ROWS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype, rows):
    torch.manual_seed(0)
    head = MonoInternVLOutputHead(2048, 92553).to("cuda", dtype)
    plain = nn.Linear(2048, 92553, bias=False, device="cuda", dtype=dtype)
    plain.load_state_dict(head.state_dict())
    x = torch.randn(rows, 2048, device="cuda", dtype=dtype)
    exact = x.double() @ head.weight.double().T
    with torch.no_grad():
        assert head.way(x) != "plain"
        error, own = (((f(x).double() - exact).norm() / exact.norm()).item() for f in (head, plain))
    assert error <= 1.5 * own
    if rows == 300:
        weight = torch.randn(rows, 92553, device="cuda", dtype=dtype)
        (head(x) * weight).sum().backward()
        exact = weight.double().T @ x.double()
        assert (head.weight.grad.double() - exact).norm() / exact.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_head_made_of_a_plain_layer_keeps_all_that_it_had():
    linear = nn.Linear(24, 121, bias=False).eval()
    linear._is_hf_initialized = True
    seen = []
    linear.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    head = MonoInternVLOutputHead.of(linear)
    assert head.weight is linear.weight and not head.training and head._is_hf_initialized
    assert torch.equal(head(torch.ones(2, 24)), nn.functional.linear(torch.ones(2, 24), linear.weight))
    assert seen == [MonoInternVLOutputHead] and head._parameters is not linear._parameters


def test_a_vocabulary_that_was_resized_is_not_drawn_anew():
    model = tiny_model()
    model.resize_token_embeddings(126, mean_resizing=False)
    before = model.lm_head.weight.detach().clone()
    assert isinstance(model.lm_head, MonoInternVLOutputHead)
    model.post_init()
    assert torch.equal(model.lm_head.weight, before)
