"""Attention of one query per head with a mask: three ways to the same numbers, chosen by device."""

from types import SimpleNamespace

import pytest
import torch

from mono_internvl import attention_mono_internvl as attention


MODULE = SimpleNamespace(num_key_value_groups=2, training=False)


def inputs(batch=3, heads=4, kv_heads=2, keys=11, width=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k, v = draw(batch, heads, 1, width), draw(batch, kv_heads, keys, width), draw(batch, kv_heads, keys, width)
    # Left padding, and places of a static cache that are not filled yet.
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=device)
    for row in range(batch):
        mask[row, ..., : 2 * row] = False
    mask[..., -3:] = False
    return q, k, v, mask


def exact(q, k, v, mask, scaling):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


WAYS = (attention.grouped_sdpa_forward, attention.cudnn_decode_forward, attention.product_decode_forward)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    "shape", [{}, {"batch": 1, "keys": 4}, {"heads": 6, "kv_heads": 1}, {"heads": 3, "kv_heads": 3}]
)
def test_every_way_gives_the_same(way, additive, shape):
    q, k, v, mask = inputs(**shape)
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    out, weights = way(MODULE, q, k, v, given, scaling=0.3, dropout=0.0)
    assert weights is None and out.shape == (q.shape[0], 1, q.shape[1], q.shape[3])
    torch.testing.assert_close(out.double(), exact(q, k, v, mask, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "cudnn", "chosen"),
    [
        (torch.bfloat16, 128, True, attention.cudnn_decode_forward),
        (torch.float16, 64, True, attention.cudnn_decode_forward),
        (torch.bfloat16, 128, False, attention.product_decode_forward),
        (torch.bfloat16, 256, True, attention.product_decode_forward),
        (torch.bfloat16, 20, True, attention.product_decode_forward),
        (torch.float32, 128, True, attention.product_decode_forward),
    ],
)
def test_the_choice_on_cuda(dtype, width, cudnn, chosen, monkeypatch):
    monkeypatch.setattr(attention, "has_cudnn_attention", lambda: cudnn)
    query = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 16, 1, width))
    assert attention.decode_attention(query) is chosen


def test_the_choice_on_a_cpu():
    assert attention.decode_attention(torch.zeros(1, 4, 1, 8)) is attention.grouped_sdpa_forward


def test_the_choice_does_not_break_a_graph():
    def step(x):
        return x + attention.has_cudnn_attention()

    x = torch.zeros(2)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(x), step(x))


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [17, 1088, 4160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(keys, dtype):
    q, k, v, mask = inputs(heads=16, kv_heads=8, keys=keys, width=128, dtype=dtype, device="cuda")
    reference = exact(q, k, v, mask, 128**-0.5)
    errors = []
    for way in (attention.decode_attention(q), attention.grouped_sdpa_forward):
        out, _ = way(MODULE, q, k, v, mask, scaling=128**-0.5)
        errors.append(((out.double() - reference).norm() / reference.norm()).item())
    assert errors[0] <= max(2 * errors[1], 1e-6), errors


@pytest.mark.gpu
def test_cudnn_is_what_sdpa_chooses():
    from torch.profiler import ProfilerActivity, profile

    q, k, v, mask = inputs(heads=16, kv_heads=8, keys=1088, width=128, dtype=torch.bfloat16, device="cuda")
    assert attention.decode_attention(q) is attention.cudnn_decode_forward
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        attention.cudnn_decode_forward(MODULE, q, k, v, mask, scaling=128**-0.5)
    names = [event.key for event in seen.key_averages()]
    assert any("cudnn" in name for name in names), names
