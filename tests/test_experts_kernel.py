"""The fused expert kernel: which calls get it, that it compiles, and on a GPU what it computes.

What it computes on the CPU stands in `interpreted_experts.py`.
"""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from interpreted_experts import BF16, F32, exact, fault, launches, lines, text_or_visual  # noqa: F401 (fixtures)
from torch import nn
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from conftest import MASK, ROOT, ROWS, tiles, tiny_config, tiny_model
from mono_internvl import MonoInternVLForCausalLM, MonoInternVLTextConfig
from mono_internvl import experts_mono_internvl as experts
from mono_internvl.benchmarks.measure import choose_place
from mono_internvl.benchmarks.peers import build, preset_config
from mono_internvl.experts_mono_internvl import kernel_refusal, routed_feed_forward, routed_linear
from mono_internvl.modeling_mono_internvl import MonoInternVLMLP, make_routing_plan


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'mono-internvl[kernel]'"
)


@needs_triton
def test_what_the_kernel_computes_on_the_cpu():
    """In a process of its own: Triton asks for TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_experts.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (counts,) = re.findall(r"^(.* passed.*) in ", done.stdout, re.M)
    assert re.fullmatch(r"\d+ passed(, \d+ warnings?)?", counts) and int(counts.split()[0]) > 90


# -------------------------------------------------------------------------------------------------------- configuration


def test_the_choice_is_checked_stored_and_read(tmp_path):
    assert MonoInternVLTextConfig().expert_kernel == "auto"
    with pytest.raises(ValueError, match="expert_kernel='triton' must be one of auto, plain, fused"):
        MonoInternVLTextConfig(expert_kernel="triton")
    tiny_config(text_config={"expert_kernel": "fused"}).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.expert_kernel == "fused"
    tiny_model(text_config={"expert_kernel": "plain"}).save_pretrained(tmp_path)
    assert MonoInternVLForCausalLM.from_pretrained(tmp_path).config.text_config.expert_kernel == "plain"


def test_triton_is_not_asked_for_before_it_is_used():
    """By transformers, which reads remote code's imports, or by an import of the package; the file travels with it."""
    files = [ROOT / "modeling_mono_internvl.py", *get_relative_import_files(ROOT / "modeling_mono_internvl.py")]
    names = {os.path.basename(file) for file in files}
    assert {"experts_mono_internvl.py", "expert_kernels_mono_internvl.py"} <= names
    assert not any("triton" in get_imports(file) for file in files)
    code = "import sys; sys.modules['triton'] = None; import mono_internvl; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mono_internvl.experts_mono_internvl" in done.stdout and "expert_kernels" not in done.stdout


def test_auto_wants_a_card_like_the_measured_one(monkeypatch):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])

    def refusal(rows=1024, dtype=BF16, device="cuda:0"):
        experts._below.cache_clear()
        device = torch.device(device)
        return experts.auto_refusal(
            SimpleNamespace(
                is_cuda=device.type == "cuda",
                dtype=dtype,
                device=device,
                shape=torch.Size([1, rows, 2048]),
                numel=lambda: rows * 2048,
            )
        )

    assert refusal() is None and refusal(rows=256) is None
    assert "fewer rows than 256" in refusal(rows=255)
    assert "auto is for torch.bfloat16" in refusal(dtype=F32)
    assert "auto is for CUDA" in refusal(device="cpu")
    capability[0] = (10, 0)
    assert refusal() is None
    capability[0] = (8, 9)
    assert "(8, 9) and should be (9, 0)" in refusal()
    experts._below.cache_clear()


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter runs on the CPU")
@pytest.mark.parametrize("which", ["none", "qkvo"])
def test_a_kernel_that_cannot_run_is_said_once(which, lines):  # noqa: F811
    model = tiny_model(visual_attention_experts=which, text_config={"expert_kernel": "fused"}).requires_grad_(False)
    found = model(ROWS, attention_mask=MASK, pixel_values=tiles()).logits
    assert len(lines) == 1 and re.search("the kernel is for CUDA|Triton cannot be imported", lines[0])
    for choice in ("auto", "plain"):
        model.config.text_config.expert_kernel = choice
        assert torch.equal(model(ROWS, attention_mask=MASK, pixel_values=tiles()).logits, found)
    assert len(lines) == 1


def test_without_triton(monkeypatch, lines):  # noqa: F811
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mono_internvl.expert_kernels_mono_internvl", raising=False)
    monkeypatch.setattr(experts, "load_kernels", experts.load_kernels.__wrapped__)
    model = tiny_model(text_config={"expert_kernel": "fused"}).requires_grad_(False)
    model(ROWS, attention_mask=MASK, pixel_values=tiles())
    assert len(lines) == 1 and "Triton cannot be imported" in lines[0]


# ---------------------------------------------------------------------------------------------------- built, not run


@needs_triton
def test_blocks_are_the_measured_ones_and_never_larger_than_what_there_is():
    from mono_internvl.expert_kernels_mono_internvl import LINEAR_BLOCKS, SWIGLU_BLOCKS, choose_blocks

    def of(table, rows, n, k, dtype=BF16):
        return tuple(choose_blocks(table, dtype, rows, n, k))

    for rows, up, down in (
        (320, (64, 128, 64, 4, 4), (64, 128, 128, 3, 4)),
        (1024, (128, 128, 64, 4, 8), (128, 128, 64, 4, 8)),
        (2048, (128, 128, 64, 4, 8), (128, 256, 64, 4, 8)),
        (4096, (128, 128, 64, 4, 8), (128, 256, 64, 4, 8)),
    ):
        assert of(SWIGLU_BLOCKS, rows, 8192, 2048) == up and of(LINEAR_BLOCKS, rows, 2048, 8192) == down
    assert of(LINEAR_BLOCKS, 20, 40, 10) == (32, 64, 16, 3, 4)
    assert of(LINEAR_BLOCKS, 1, 1, 1, F32) == (16, 16, 16, 2, 4)


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kind", ["linear", "swiglu"])
def test_the_kernel_compiles_for_a_card_that_is_not_there(kind):
    """For compute capability 9.0 Triton compiles anywhere: every block of the table with tensor-core products of whole
    warp groups, weights through descriptors, and in the memory that a processor of an H100 or H200 has."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mono_internvl import expert_kernels_mono_internvl as kernels

    kernel = getattr(kernels, f"_{kind}_kernel")
    sizes = (2048, 8192) if kind == "linear" else (8192, 2048)
    ways = [("bf16", blocks, *sizes) for _, blocks in getattr(kernels, f"{kind.upper()}_BLOCKS")]
    ways += [("bf16", ways[0][1], 1000, 2050), ("fp32", kernels.FLOAT32_BLOCKS, *sizes)]
    for dtype, blocks, n, k in ways:
        constants = {"N": n, "K": k, "DESCRIPTORS": k % 8 == 0, "GROUP": kernels.GROUP_M}
        constants |= {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_K": blocks.k}
        types = {"text": "*i64", "visual": "*i64", "n_text": "i32", "n_visual": "i32", "x_stride": "i32"}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
        aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name] == f"*{dtype}"]
        built = compile(
            ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": blocks.warps, "num_stages": blocks.stages},
        )
        assert built.metadata.shared <= 227 * 1024
        assert ("wgmma.mma_async" in built.asm["ptx"]) == (dtype == "bf16")
        assert ("cp.async.bulk.tensor" in built.asm["ptx"]) == constants["DESCRIPTORS"]


# ------------------------------------------------------------------------------------------------------------ on a GPU


HIDDEN, INNER, KV = 2048, 8192, 1024
# (rows, visual): the paper's, one group alone, no multiple of anything.
SIZES = [(320, 256), (1024, 768), (2048, 1792), (4096, 3840), (1000, 0), (777, 777), (2049, 1), (17, 9)]


def on_gpu(rows, visual, *, hidden=HIDDEN, inner=INNER, outputs=KV, dtype=BF16):
    """x [1, rows, hidden], a plan, two experts, two linear layers [outputs, hidden]."""
    torch.manual_seed(rows)
    config = MonoInternVLTextConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=1, head_dim=2, num_key_value_heads=1
    )
    with torch.device("cuda"):
        modules = [MonoInternVLMLP(config) for _ in "tv"] + [nn.Linear(hidden, outputs, bias=False) for _ in "tv"]
        for module in modules:
            module.to(dtype).requires_grad_(False)
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[torch.randperm(rows)[:visual]] = True
        return torch.randn(1, rows, hidden, dtype=dtype), make_routing_plan(mask, visual), *modules


def in_graph(function):
    """What replaying a CUDA graph of `function` gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return out, graph


def check_on_gpu(function, x, plan, text, visual):
    assert kernel_refusal(x, plan, text, visual) is None
    expected = exact(x, plan, text, visual)
    plain, fused = (function(x, plan, text, visual, choice) for choice in ("plain", "fused"))
    assert fused.dtype == x.dtype and fault(fused, plain, expected) is None, fault(fused, plain, expected)
    captured, graph = in_graph(lambda: function(x, plan, text, visual))
    assert torch.equal(captured, fused)
    # Other rows in the same memory, of the same numbers of text and visual tokens.
    x.copy_(x.roll(1, dims=-1))
    graph.replay()
    assert torch.equal(captured, function(x, plan, text, visual)) and not torch.equal(captured, fused)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, visual", SIZES)
def test_feed_forward_on_a_gpu(rows, visual, lines, launches):  # noqa: F811
    x, plan, text, visual, *_ = on_gpu(rows, visual)
    check_on_gpu(routed_feed_forward, x, plan, text, visual)
    assert lines == [] and launches.count("swiglu") == launches.count("linear") == 4


@pytest.mark.gpu
@pytest.mark.parametrize("outputs", [HIDDEN, KV])
@pytest.mark.parametrize("rows, visual", SIZES)
def test_attention_projections_on_a_gpu(rows, visual, outputs, lines):  # noqa: F811
    x, plan, _, _, text, visual = on_gpu(rows, visual, inner=16, outputs=outputs)
    check_on_gpu(routed_linear, x, plan, text, visual)
    assert lines == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("hidden, inner", [(2050, 1003), (72, 200), (1000, 264), (37, 51)])
def test_sizes_that_fill_no_block_on_a_gpu(hidden, inner, dtype, lines):  # noqa: F811
    x, plan, text, visual, *_ = on_gpu(300, 129, hidden=hidden, inner=inner, outputs=8, dtype=dtype)
    check_on_gpu(routed_feed_forward, x, plan, text, visual)
    wide = torch.full((1, 300, hidden + 8), torch.nan, dtype=dtype, device="cuda")
    wide[..., :hidden] = x
    fused = routed_feed_forward(x, plan, text, visual)
    # Read with other strides, summed in the same order.
    torch.testing.assert_close(routed_feed_forward(wide[..., :hidden], plan, text, visual), fused)
    assert lines == []


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    x, plan, text, visual, *_ = on_gpu(1024, 768)
    fused = routed_feed_forward(x, plan, text, visual)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = routed_feed_forward(x, plan, text, visual)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, fused)


@pytest.mark.gpu
def test_a_thread_of_its_own_and_an_allocator_of_another_on_a_gpu(lines):  # noqa: F811
    import triton

    x, plan, text, visual, *_ = on_gpu(1024, 768)
    fused = routed_feed_forward(x, plan, text, visual)
    found, asked = [], []

    def run():
        triton.set_allocator(lambda *args: asked.append(args))
        found.append(routed_feed_forward(x, plan, text, visual))

    for target in (run, lambda: found.append(routed_feed_forward(x, plan, text, visual))):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 2 and all(torch.equal(one, fused) for one in found) and asked == [] and lines == []


@pytest.mark.gpu
def test_a_first_run_inside_a_graph_is_plain(lines, launches):  # noqa: F811
    x, plan, text, visual, *_ = on_gpu(640, 512, inner=8200)
    plain = routed_feed_forward(x, plan, text, visual, "plain")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = routed_feed_forward(x, plan, text, visual)
    graph.replay()
    torch.testing.assert_close(out, plain, atol=2e-3, rtol=1.6e-2)
    assert len(lines) == 1 and "its first run cannot be captured" in lines[0]
    assert kernel_refusal(x, plan, text, visual) is None


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["none", "qkv", "qkvo"])
def test_a_model_of_the_real_dimensions_on_a_gpu(which, lines, launches):  # noqa: F811
    """Two layers of the 2B: auto takes the kernel for the prompt alone, and the logits are as far from float32's as the
    plain path's are."""
    config = preset_config("2b", 2)
    config.visual_attention_experts = config.text_config.visual_attention_experts = which
    config.text_config.vocab_size = 4096
    config.image_token_id = 4000
    model = build(config, choose_place("cuda")).requires_grad_(False)
    ids = torch.randint(10, 3900, (1, 640), device="cuda")
    ids[:, 20:532] = config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 256, 3 * 28 * 28, device="cuda", dtype=BF16)}
    logits = {}
    for choice in ("plain", "auto"):
        model.config.text_config.expert_kernel = choice
        logits[choice] = model(**inputs).logits.double()[0]
        assert choice == "auto" or launches == []
    assert launches.count("swiglu") == 2 and launches.count("linear") == 2 * {"none": 1, "qkv": 4, "qkvo": 5}[which]
    launches.clear()
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert launches.count("swiglu") == 1 and lines == []
    model.config.text_config.expert_kernel = "plain"
    expected = model.float()(ids, pixel_values=inputs["pixel_values"].float()).logits.double()[0]
    error = {name: ((found - expected).norm() / expected.norm()).item() for name, found in logits.items()}
    assert error["auto"] <= 1.2 * error["plain"], error


@pytest.mark.gpu
@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the nano is not in the repository")
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_bundled_model_answers_the_same_on_a_gpu(dtype, lines, launches):  # noqa: F811
    model = MonoInternVLForCausalLM.from_pretrained(ROOT, dtype=dtype).to("cuda").eval()
    answers = {}
    for choice in ("plain", "fused"):
        model.config.text_config.expert_kernel = choice
        answers[choice] = model.chat(ROOT / "examples" / "plate.png", "What color is the star?")
    assert answers["fused"] == answers["plain"] == "orange" and launches != [] and lines == []
