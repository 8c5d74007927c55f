"""The fused expert kernel on the CPU, by Triton's interpreter: run in a process of its own by `test_experts_kernel.py`,
which sets TRITON_INTERPRET before Triton is imported (`TRITON_INTERPRET=1 pytest tests/interpreted_experts.py`).

The judge is the same mathematics in float64. float32 has to be exact to float32's own precision; in bfloat16 the plain
path's error against float64 is the measure, row by row.
"""

import copy
import importlib.util
import logging
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from conftest import MASK, ROOT, ROWS, tiles, tiny_model
from mono_internvl import MonoInternVLTextConfig
from mono_internvl import experts_mono_internvl as experts
from mono_internvl.experts_mono_internvl import kernel_refusal, routed_feed_forward, routed_linear
from mono_internvl.modeling_mono_internvl import MonoInternVLMLP, make_routing_plan


F32, BF16 = torch.float32, torch.bfloat16


class Plan(NamedTuple):
    """All that a plan has to be."""

    text: torch.Tensor
    visual: torch.Tensor


class Case(NamedTuple):
    hidden: int
    inner: int
    shape: tuple[int, ...]
    visual: int
    dtype: torch.dtype
    layout: str = "contiguous"

    def __str__(self):
        sizes = "x".join(map(str, self.shape))
        return f"H{self.hidden}-I{self.inner}-{sizes}-V{self.visual}-{str(self.dtype)[6:]}-{self.layout}"


CASES = [
    # Sizes that fill their blocks, and that do not: with descriptors (rows of a multiple of 16 bytes) and without.
    *(Case(h, i, (1, 40), 17, dtype) for dtype in (F32, BF16) for h, i in ((64, 128), (128, 64), (16, 16), (256, 192))),
    *(Case(h, i, (1, 40), 17, dtype) for dtype in (F32, BF16) for h, i in ((72, 200), (200, 72), (136, 264))),
    *(
        Case(h, i, (1, 40), 17, dtype)
        for dtype in (F32, BF16)
        for h, i in ((37, 51), (65, 129), (7, 5), (1, 1), (33, 8))
    ),
    # Groups: none, one, a single row, more than one block of rows.
    *(Case(72, 40, (1, 20), visual, dtype) for dtype in (F32, BF16) for visual in (0, 1, 16, 19, 20)),
    *(Case(40, 24, (1, 300), visual, F32) for visual in (0, 64, 129, 300)),
    *(Case(16, 24, (1, n), visual, BF16) for n, visual in ((0, 0), (1, 0), (1, 1), (2, 1), (16, 8), (17, 16))),
    # Batches, rows without a batch, and where x lies.
    *(Case(40, 24, (3, 21), 30, dtype) for dtype in (F32, BF16)),
    *(Case(40, 24, (50,), 30, dtype) for dtype in (F32, BF16)),
    *(Case(40, 24, (2, 5, 7), 30, F32, layout) for layout in ("contiguous", "transposed")),
    *(Case(40, 24, (2, 25), 30, dtype, way) for dtype in (F32, BF16) for way in ("transposed", "wider", "shifted")),
    # More tiles than GROUP_M puts together, in rows and columns.
    Case(24, 300, (1, 700), 333, F32),
]


def made(case: Case):
    """x, a plan, two experts, and two linear layers [inner, hidden] of case.dtype; values that bfloat16 has."""
    torch.manual_seed(sum(map(hash, (case.hidden, case.inner, case.visual))) % 1000)
    config = MonoInternVLTextConfig(
        hidden_size=case.hidden, intermediate_size=case.inner, num_attention_heads=1, head_dim=2, num_key_value_heads=1
    )
    modules = [MonoInternVLMLP(config) for _ in "tv"] + [nn.Linear(case.hidden, case.inner, bias=False) for _ in "tv"]
    for module in modules:
        module.to(case.dtype).requires_grad_(False)
    x = torch.randn(*case.shape, case.hidden, dtype=case.dtype)
    if case.layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif case.layout == "wider":
        # A view of wider rows: what lies beside it must not be read into a sum.
        wide = torch.full((*case.shape, case.hidden + 5), torch.nan, dtype=case.dtype)
        wide[..., : case.hidden] = x
        x = wide[..., : case.hidden]
    elif case.layout == "shifted":
        # Its first element lies at no multiple of 16 bytes.
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    rows = x.numel() // case.hidden
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.randperm(rows)[: case.visual]] = True
    return x, make_routing_plan(mask, case.visual), *modules


def exact(x, plan, text, visual):
    """Of [.., H], in float64, by the definition: each row through the module of its group."""
    text, visual = (copy.deepcopy(module).double() for module in (text, visual))
    rows = x.double().reshape(-1, x.shape[-1])
    outs = {}
    for module, index in ((text, plan.text), (visual, plan.visual)):
        outs.update(zip(index.tolist(), module(rows[index]).unbind(), strict=True))
    width = next(iter(outs.values())).shape[-1] if outs else module(rows).shape[-1]
    return torch.stack([outs[i] for i in range(len(rows))]) if outs else rows.new_empty(0, width)


def worst_row(found, expected):
    """The largest relative error of a row."""
    found = found.double().reshape(expected.shape)
    if not found.isfinite().all():
        return float("inf")
    return (
        ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max().item() if len(found) else 0.0
    )


def fault(found, plain, expected) -> str | None:
    """What is wrong with the kernel's result; None where it is right."""
    error, of_plain = worst_row(found, expected), worst_row(plain, expected)
    allowed = 1e-5 if found.dtype == F32 else max(1.5 * of_plain, 2**-8)
    return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}, the plain path's {of_plain:.3g}"


def faults(case: Case) -> list[str]:
    x, plan, text_mlp, visual_mlp, text_linear, visual_linear = made(case)
    found = []
    for function, text, visual in (
        (routed_feed_forward, text_mlp, visual_mlp),
        (routed_linear, text_linear, visual_linear),
    ):
        assert kernel_refusal(x, plan, text, visual) is None
        fused, plain = function(x, plan, text, visual), function(x, plan, text, visual, "plain")
        assert (fused.shape, fused.dtype) == (plain.shape, plain.dtype) and fused.is_contiguous()
        if (wrong := fault(fused, plain, exact(x, plan, text, visual))) is not None:
            found.append(f"{function.__name__}: {wrong}")
    return found


@pytest.fixture
def lines(monkeypatch):
    """What is logged, each message once as if nothing had been logged before."""
    logging.Logger.warning_once.cache_clear()
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    experts.logger.addHandler(handler)
    monkeypatch.setattr(experts, "_failed", {})
    yield found
    experts.logger.removeHandler(handler)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that ran."""
    kernels, found = experts.load_kernels(), []

    def counting(name):
        return lambda *args: (found.append(name), getattr(kernels, name)(*args))[1]

    counted = kernels._replace(linear=counting("linear"), swiglu=counting("swiglu"))
    monkeypatch.setattr(experts, "load_kernels", lambda: counted)
    return found


def test_the_interpreter_is_on():
    assert experts.load_kernels().interpreted


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_computes_what_is_defined(case, lines, launches):
    assert faults(case) == []
    assert lines == [] and launches == ["swiglu", "linear", "linear"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_plan_is_two_tensors_of_rows_in_any_order(dtype, lines):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    order = Plan(*(index[torch.randperm(len(index))].to(dtype) for index in plan))
    assert torch.equal(routed_feed_forward(x, order, text, visual), routed_feed_forward(x, plan, text, visual))
    order = Plan(*(index.long() for index in order))
    torch.testing.assert_close(
        routed_feed_forward(x, order, text, visual, "plain"), text_or_visual(x, plan, text, visual)
    )
    assert lines == []


def text_or_visual(x, plan, text, visual):
    mask = torch.zeros(x.shape[:-1].numel(), 1, dtype=torch.bool).index_fill(0, plan.visual.long(), True)
    return torch.where(mask.view(*x.shape[:-1], 1), visual(x), text(x))


def test_bfloat16_is_rounded_where_the_plain_path_rounds():
    """Products whose float32 sums are exact: then both ways have the same bits."""
    x, plan, text, visual, *_ = made(Case(64, 48, (1, 50), 20, BF16))
    generator = torch.Generator().manual_seed(0)
    for tensor in (x, *text.parameters(), *visual.parameters()):
        tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator) / 8)
    fused, plain = (routed_feed_forward(x, plan, text, visual, choice) for choice in ("fused", "plain"))
    assert (fused == plain).float().mean() > 0.99
    torch.testing.assert_close(fused, plain, rtol=2**-7, atol=2**-9)


def test_not_a_number_stays_in_its_row():
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, BF16))
    x[0, 7, 3] = torch.nan
    found = routed_feed_forward(x, plan, text, visual)[0]
    assert found[7].isnan().all() and found.isnan().sum() == 40


# What is taken out of the kernels' source, one thing at a time -> a case that has to notice.
BROKEN = {
    "experts swapped": (("if row_block < text_blocks:  #", "if row_block >= text_blocks:  #"), CASES[0]),
    "gate and up of the other expert": (("        up = up_text", "        up = up_visual"), CASES[0]),
    "gate for up": (("_rounded(gate_total, out)", "_rounded(up_total, out)"), CASES[0]),
    "first block of the sum": (
        ("range(0, K, BLOCK_K)", "range(BLOCK_K, K, BLOCK_K)"),
        Case(256, 192, (1, 40), 17, BF16),
    ),
    "last block of the sum": (
        ("range(0, K, BLOCK_K)", "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)"),
        Case(72, 200, (1, 40), 17, BF16),
    ),
    "columns behind the last": (("mask=inside[None, :], other=0.0", ""), Case(40, 24, (2, 25), 30, F32, "wider")),
    "rows behind the last": (("mask = live[:, None]", "mask = live[:, None] | True"), Case(40, 24, (1, 60), 20, F32)),
    "one row late": (("places = start + tl", "places = start + 1 + tl"), Case(40, 24, (1, 60), 25, F32)),
    "no activation": (("gated * tl.sigmoid(gated)", "gated"), CASES[0]),
    "no rounding to nearest": (("bits + 0x7FFF + ((bits >> 16) & 1)", "bits"), Case(256, 192, (1, 40), 17, BF16)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(name, monkeypatch, tmp_path):
    (old, new), case = BROKEN[name]
    source = (ROOT / "expert_kernels_mono_internvl.py").read_text()
    assert old in source, f"the kernels no longer have {old!r}"
    path = Path(tmp_path / "broken_kernels.py")
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken_kernels", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    assert faults(case) == []
    kernels = experts.load_kernels()._replace(linear=broken.linear, swiglu=broken.swiglu)
    monkeypatch.setattr(experts, "load_kernels", lambda: kernels)
    assert faults(case) != []


# ---------------------------------------------------------------------------------------------------------- whole model


@pytest.mark.parametrize("which", ["none", "qkv", "qkvo"])
def test_a_model_with_the_kernel_gives_the_same(which, lines, launches):
    model = tiny_model(visual_attention_experts=which).requires_grad_(False)
    inputs = {"attention_mask": MASK, "pixel_values": tiles()}
    logits, ids = {}, {}
    for choice in ("plain", "fused"):
        model.config.text_config.expert_kernel = choice
        logits[choice] = model(ROWS, **inputs).logits[MASK.bool()]
        ids[choice] = model.generate(ROWS, **inputs, max_new_tokens=8, do_sample=False)
        assert choice == "fused" or launches == []
    assert not torch.equal(logits["plain"], logits["fused"])
    torch.testing.assert_close(logits["fused"], logits["plain"], atol=1e-4, rtol=1e-4)
    assert torch.equal(ids["fused"], ids["plain"])
    # Of `generate` only the prompt has visual tokens; its last layer computes the last row alone, which is text.
    layers, linears = 3, {"none": 1, "qkv": 4, "qkvo": 5}[which]
    assert launches.count("swiglu") == layers + layers - 1
    assert launches.count("linear") >= layers * linears + (layers - 1) * linears and lines == []


def test_auto_is_plain_on_the_cpu(lines, launches):
    model = tiny_model().requires_grad_(False)
    assert model.config.text_config.expert_kernel == "auto"
    model(ROWS, attention_mask=MASK, pixel_values=tiles())
    assert launches == [] and lines == []


# ------------------------------------------------------------------------------------------------------------ fall back


def lora(x, text, visual):
    from peft import LoraConfig, get_peft_model

    text.gate_proj = get_peft_model(nn.Sequential(text.gate_proj), LoraConfig(target_modules=["0"])).base_model.model[0]
    text.requires_grad_(False)


def hooked(part):
    def change(x, text, visual):
        (getattr(visual, part) if part else visual).register_forward_hook(lambda module, args, out: out * 2)

    return change


def offloaded(x, text, visual):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(visual.down_proj, AlignDevicesHook(execution_device="cpu", offload=True, weights_map={
        "weight": visual.down_proj.weight.data.clone()}))  # fmt: skip


def quantised(x, text, visual):
    text.up_proj.weight = nn.Parameter(Halved(text.up_proj.weight.data), requires_grad=False)


class Halved(torch.Tensor):
    """A tensor of another class: quantised weights are."""


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(x, text, visual):
    visual.gate_proj.__class__ = ScaledLinear


def bias(x, text, visual):
    text.down_proj.bias = nn.Parameter(torch.ones(40), requires_grad=False)


def gelu(x, text, visual):
    text.act_fn = visual.act_fn = nn.GELU()


def sizes(x, text, visual):
    for name, shape in (("gate_proj", (40, 30)), ("up_proj", (40, 30)), ("down_proj", (30, 40))):
        setattr(visual, name, nn.Linear(*shape, bias=False).requires_grad_(False))


def gated(x, text, visual):
    visual.output_gate = nn.Linear(x.shape[-1], 1, bias=False).requires_grad_(False)


def strided(x, text, visual):
    text.gate_proj.weight = nn.Parameter(text.gate_proj.weight.T.contiguous().T, requires_grad=False)


def weights_want_gradients(x, text, visual):
    text.requires_grad_(True)


def rows_want_gradients(x, text, visual):
    x.requires_grad_(True)


REFUSED = {
    "a projection is peft": lora,
    "a feed-forward expert has forward hooks": hooked(""),
    "a feed-forward expert has an output gate": gated,
    "a projection has forward hooks": hooked("up_proj"),
    "a projection has forward hooks, by accelerate": offloaded,
    "a weight is a Halved": quantised,
    "interpreted_experts.ScaledLinear": subclass,
    "a projection has a bias": bias,
    "the activation is GELU": gelu,
    "the experts' weights have not the same shape": sizes,
    "a weight is not contiguous": strided,
    "gradients are wanted": weights_want_gradients,
    "gradients are wanted, of rows": rows_want_gradients,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_cannot_serve_takes_the_plain_path(reason, lines, launches):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    REFUSED[reason](x, text, visual)
    expected = text_or_visual(x, plan, text, visual)
    assert reason.split(",")[0] in kernel_refusal(x, plan, text, visual)
    for _ in range(2):
        torch.testing.assert_close(routed_feed_forward(x, plan, text, visual), expected)
    assert torch.equal(routed_feed_forward(x, plan, text, visual), routed_feed_forward(x, plan, text, visual, "plain"))
    assert launches == [] and len(lines) == 1 and lines[0].startswith("the fused expert kernel is not used")
    assert reason.split(",")[0] in lines[0]


def test_a_bias_of_an_attention_projection_is_added(lines, launches):
    x, plan, *_ = made(Case(40, 24, (1, 60), 25, F32))
    text, visual = (nn.Linear(40, 24).requires_grad_(False) for _ in "tv")
    torch.testing.assert_close(routed_linear(x, plan, text, visual), text_or_visual(x, plan, text, visual))
    assert launches == [] and len(lines) == 1 and "a projection has a bias" in lines[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_plain_path(dtype, lines):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, dtype))
    assert routed_feed_forward(x, plan, text, visual).dtype == dtype
    assert len(lines) == 1 and f"the rows are {dtype}" in lines[0]


def test_weights_of_another_dtype_or_device():
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    assert "weights are torch.bfloat16 on cpu" in kernel_refusal(x, plan, text, copy.deepcopy(visual).to(BF16))
    assert "on meta" in kernel_refusal(x, plan, text, copy.deepcopy(visual).to("meta"))
    assert "is for the CPU" in kernel_refusal(x.to("meta"), plan, text, visual)


def test_a_plan_that_does_not_fit():
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    assert "as many rows" in kernel_refusal(x[:, 1:], plan, text, visual)
    assert "contiguous int64" in kernel_refusal(x, plan._replace(text=plan.text.short()), text, visual)
    doubled = plan.text.repeat_interleave(2)[::2]
    assert "contiguous int64" in kernel_refusal(x, plan._replace(text=doubled), text, visual)


def test_autocast_chooses_its_dtypes(lines, launches):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    with torch.autocast("cpu", dtype=BF16):
        assert routed_feed_forward(x, plan, text, visual).dtype == BF16
    assert launches == [] and len(lines) == 1 and "autocast is on" in lines[0]


def test_forward_derivatives_are_kept(launches):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = routed_feed_forward(dual, plan, text, visual)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent.abs().sum() > 0
    assert launches == []


def test_gradients_are_those_of_the_plain_path(lines):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    text.requires_grad_(True), visual.requires_grad_(True)
    found = []
    for choice in ("fused", "auto", "plain"):
        text.zero_grad(), visual.zero_grad()
        routed_feed_forward(x, plan, text, visual, choice).sum().backward()
        found.append([p.grad.clone() for module in (text, visual) for p in module.parameters()])
    assert all(torch.equal(*pair) for grads in found[:2] for pair in zip(grads, found[2], strict=True))
    with torch.no_grad():
        assert kernel_refusal(x, plan, text, visual) is None
    assert len(lines) == 1 and "gradients are wanted" in lines[0]


def test_compiled_layers_are_plain(lines, launches):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    compiled = torch.compile(routed_feed_forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, plan, text, visual), routed_feed_forward(x, plan, text, visual, "plain"))
    assert launches == [] and lines == []


def test_a_kernel_that_fails_is_not_tried_again(monkeypatch, lines):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    calls = []

    def fail(*args):
        calls.append(args)
        raise RuntimeError("out of shared memory\nand more of it")

    kernels = experts.load_kernels()._replace(swiglu=fail)
    monkeypatch.setattr(experts, "load_kernels", lambda: kernels)
    expected = routed_feed_forward(x, plan, text, visual, "plain")
    for _ in range(3):
        assert torch.equal(routed_feed_forward(x, plan, text, visual), expected)
    assert len(calls) == 1 and len(lines) == 1 and lines[0].endswith("RuntimeError: out of shared memory")
    assert "out of shared memory" in kernel_refusal(x, plan, text, visual)


def test_a_first_run_while_capturing_is_tried_again(monkeypatch, lines):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    kernels = experts.load_kernels()

    def fail(*args):
        raise kernels.not_ready("not in a graph")

    monkeypatch.setattr(experts, "load_kernels", lambda: kernels._replace(linear=fail))
    expected = routed_feed_forward(x, plan, text, visual, "plain")
    assert torch.equal(routed_feed_forward(x, plan, text, visual), expected)
    assert len(lines) == 1 and kernel_refusal(x, plan, text, visual) is None


def test_too_little_memory_is_said_and_not_taken_for_a_failure(monkeypatch):
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))

    def fail(*args):
        raise torch.OutOfMemoryError("no more")

    kernels = experts.load_kernels()._replace(swiglu=fail)
    monkeypatch.setattr(experts, "load_kernels", lambda: kernels)
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        routed_feed_forward(x, plan, text, visual)


def test_other_threads_and_their_allocator(monkeypatch):
    """Triton's allocator is a context variable: set for a launch, whichever thread it is in, and left as it was."""
    import triton

    from mono_internvl import expert_kernels_mono_internvl as kernels

    allocators = []
    monkeypatch.setattr(
        triton, "set_allocator", lambda allocator: allocators.append((threading.get_ident(), allocator))
    )
    x, plan, text, visual, *_ = made(Case(40, 24, (1, 60), 25, F32))
    found = []
    thread = threading.Thread(target=lambda: found.append(routed_feed_forward(x, plan, text, visual)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], routed_feed_forward(x, plan, text, visual))
    assert len({ident for ident, _ in allocators}) == 2 and {a for _, a in allocators} == {kernels._scratch}
