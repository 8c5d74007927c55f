"""Speed without a clock: products against the closed formula, reads of the device, graph breaks, the harness."""

import json

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

import mono_internvl.benchmarks.suite as suite
from conftest import ROWS, tiles, tiny_config, tiny_model
from mono_internvl.benchmarks import flops, generate, kernels, measure, peers, recipe, routing
from mono_internvl.benchmarks import train as train_steps
from mono_internvl.benchmarks.preprocess import per_tile_recipe, photograph, resizes
from mono_internvl.common.compiling import compile_layers, uncompile_layers
from mono_internvl.image_processing_mono_internvl import MonoInternVLImageProcessor, unpatchify
from mono_internvl.modeling_mono_internvl import make_routing_plan
from mono_internvl.training.stages import load_stage
from mono_internvl.training.trainer import EViPTrainer


CPU = measure.Place(torch.device("cpu"), torch.float32)
VISUAL = 8
# transformers 5.17 computes a Llama's angles as a product, [head_dim / 2, 1] x [1, T].
LLAMA_ROPE = 16


def counted(function):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("keep", [None, 1, 3])
def test_prefill_makes_the_products_of_the_formula(keep):
    model = tiny_model(attn_implementation="eager")
    actual = counted(lambda: model(ROWS[:1], pixel_values=tiles(), logits_to_keep=keep or 0, use_cache=False))
    assert actual == flops.prefill_flops(model.config, ROWS.shape[1], VISUAL, keep=keep, causal=False)


def test_text_prefill_costs_what_the_dense_twin_costs():
    model = tiny_model(attn_implementation="eager")
    expected = flops.decoder_flops(model.config.text_config, 12, causal=False)
    twin = peers.dense_twin(model, CPU)
    assert counted(lambda: model(ROWS[1:, 3:], use_cache=False)) == expected
    assert counted(lambda: twin(ROWS[1:, 3:], use_cache=False)) - expected in (0, LLAMA_ROPE * 12)


@pytest.mark.parametrize("experts", ["none", "qkvo"])
def test_attention_experts_cost_nothing(experts):
    model = tiny_model(attn_implementation="eager", visual_attention_experts=experts)
    actual = counted(lambda: model(ROWS[:1], pixel_values=tiles(), use_cache=False))
    assert actual == flops.prefill_flops(model.config, ROWS.shape[1], VISUAL, causal=False)


def test_decoding_is_one_token_through_the_text_path():
    model = tiny_model(attn_implementation="eager")
    with torch.no_grad():
        cache = model(ROWS[:1], pixel_values=tiles(), use_cache=True).past_key_values
    actual = counted(lambda: model(torch.tensor([[5]]), past_key_values=cache))
    assert actual == flops.decoder_flops(model.config.text_config, 1, past=ROWS.shape[1], causal=False)


def test_both_experts_cost_a_second_feed_forward():
    model = tiny_model(attn_implementation="eager")
    twin = peers.both_experts(model, CPU)
    actual = counted(lambda: twin(ROWS[:1], pixel_values=tiles(), use_cache=False))
    assert actual == flops.prefill_flops(model.config, ROWS.shape[1], VISUAL, experts=2, causal=False)
    assert actual > counted(lambda: model(ROWS[:1], pixel_values=tiles(), use_cache=False))


def test_the_modular_twins_products():
    model = tiny_model(attn_implementation="eager")
    twin = peers.modular_twin(model, CPU)
    pixels = unpatchify(tiles())
    actual = counted(lambda: twin(ROWS[:1], pixel_values=pixels, logits_to_keep=1, use_cache=False))
    vision = twin.config.vision_config
    # The patch embedding is a convolution, which torch counts like the product it is.
    expected = flops.modular_flops(model.config, vision, ROWS.shape[1], 2, keep=1, causal=False)
    assert actual - expected in (0, LLAMA_ROPE * ROWS.shape[1])


def test_the_formulas_at_the_released_dimensions():
    config = peers.preset_config("2b")
    text = config.text_config
    activated, embedding = 1_889_146_880, 189_548_544
    assert flops.decode_bytes(text, 0, 2) == 2 * (activated - embedding)
    attention, expert = flops.layer_weights(text)
    assert 24 * attention == 301_989_888 and 24 * expert == 1_207_959_552
    causal = flops.decoder_flops(text, 4096)
    assert 0.9 < flops.decoder_flops(text, 4096, causal=False) / causal - 0.02 < 1.2
    assert flops.prefill_flops(config, 1024, 768, experts=2) / flops.prefill_flops(config, 1024, 768) > 1.6


# -------------------------------------------------------------------------------------------------- reads of the device


class Reads(TorchDispatchMode):
    """Operations whose result the host must wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(self.WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_only_the_check_reads_in_prefill_and_nothing_in_decoding(monkeypatch):
    """`tolist` of a CPU tensor is no dispatched operation; it is counted apart."""
    model, lists = tiny_model(), []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(tuple(self.shape)) or original(self))
    with torch.no_grad(), Reads() as reads:
        cache = model(ROWS[:1], pixel_values=tiles(), logits_to_keep=1, use_cache=True).past_key_values
        assert (reads.seen, lists) == ([], [(2,)])
        model(torch.tensor([[5]]), past_key_values=cache)
        assert (reads.seen, lists) == ([], [(2,)])
        static = StaticCache(config=model.config.text_config, max_cache_len=8)
        model(torch.tensor([[5]]), past_key_values=static)
        assert (reads.seen, lists) == ([], [(2,)])
        # A bare mask is counted by the same read.
        model(inputs_embeds=torch.zeros(1, 4, 64), visual_token_mask=torch.ones(1, 4, dtype=torch.bool))
        assert (reads.seen, lists) == ([], [(2,), (2,)])
        # The test can fail.
        bool(ROWS.sum() > 0)
        assert reads.seen == ["_local_scalar_dense"]


def test_the_last_layer_does_only_kept_rows_that_are_text():
    model = tiny_model()
    seen = []
    model.model.language_model.layers[-1].mlp.register_forward_hook(lambda m, i, o: seen.append(i[0].numel() // 64))
    with torch.no_grad():
        expected = model(ROWS[:1], pixel_values=tiles()).logits
        for keep in (1, 2, 5):
            actual = model(ROWS[:1], pixel_values=tiles(), logits_to_keep=keep).logits
            torch.testing.assert_close(actual, expected[:, -keep:], atol=1e-5, rtol=1e-5)
    assert seen == [7, 1, 2, 7]  # 5 kept rows reach into the picture
    with pytest.raises(ValueError, match="4 visual tokens but the input has 8"):
        model(ROWS[:1], pixel_values=tiles(1))


def test_compiled_prefill_has_no_breaks_and_keeps_the_causal_kernel():
    """Positions of our own must not make transformers look for packed samples: that ends in a whole mask."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    model = tiny_model(attn_implementation="sdpa")
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        compiled(ROWS[:1], pixel_values=tiles(), use_cache=False)
    calls = [node for node in graphs[0].graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(graphs) == 1 and len(calls) == 3
    assert all(call.kwargs["attn_mask"] is None and call.kwargs["is_causal"] for call in calls)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"use_cache": True}])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_packed_samples_still_do_not_see_each_other(backend, options):
    """Whatever is said of a cache: who trains with transformers' defaults asks for one without knowing."""
    model = tiny_model(attn_implementation=backend)
    one, two = ROWS[1:, 3:9], ROWS[1:, 9:]
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    with torch.no_grad():
        packed = model(torch.cat([one, two], 1), position_ids=positions, **options).logits
        alone = torch.cat([model(one, use_cache=False).logits, model(two, use_cache=False).logits], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_under_sdpa_a_pack_costs_the_squares_of_its_samples_and_no_mask(monkeypatch):
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 4, 3), (2, 9, 1))])
    ids = ROWS[1:, 3:].repeat(2, 1)
    seen = []
    original = F.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        seen.append((query.shape[2], key.shape[2], attn_mask is None and options["is_causal"]))
        return original(query, key, value, attn_mask=attn_mask, **options)

    eager, sdpa = tiny_model(attn_implementation="eager"), tiny_model(attn_implementation="sdpa")
    with torch.no_grad():
        expected = eager(ids, position_ids=positions, use_cache=False).logits
        monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
        for keep in (0, 1):
            logits = sdpa(ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
            torch.testing.assert_close(logits, expected[:, -keep:], atol=1e-5, rtol=1e-5)
            assert seen == 3 * [(n, n, True) for n in (5, 4, 3, 2, 9, 1)]
            seen.clear()
        # One sample a row, wherever it begins, is plain causal attention.
        sdpa(ids, position_ids=torch.arange(7, 19)[None], use_cache=False)
    assert [(q, k) for q, k, _ in seen] == 3 * [(12, 12)]


# ---------------------------------------------------------------------------------------------------------- the harness


def test_the_twins_compute_what_they_stand_for():
    model = tiny_model()
    with torch.no_grad():
        text = ROWS[1:, 3:]
        torch.testing.assert_close(peers.dense_twin(model, CPU)(text).logits, model(text).logits, atol=1e-4, rtol=1e-4)
        both = peers.both_experts(model, CPU)(ROWS[:1], pixel_values=tiles()).logits
        torch.testing.assert_close(both, model(ROWS[:1], pixel_values=tiles()).logits, atol=1e-4, rtol=1e-4)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {p.data_ptr() for p in peers.both_experts(model, CPU).parameters()} <= shared


def test_the_forms_for_cuda_graphs_equal_the_plain_ones():
    model = tiny_model()
    dense, both, modular = (twin(model, CPU) for twin in (peers.dense_twin, peers.both_experts, peers.modular_twin))
    prompt = peers.make_prompt(model.config, 8, 8, CPU)
    with torch.no_grad():
        functions = peers.graph_prefills(model, prompt, dense=dense, both=both, modular=modular)
        expected = {
            "ours": peers.prefill(model, prompt),
            "dense": peers.dense_prefill(dense, prompt),
            "both": peers.prefill(both, prompt),
            "modular": modular(prompt.input_ids, pixel_values=prompt.tiles).logits,
        }
        for name, logits in expected.items():
            torch.testing.assert_close(functions[name](), logits, atol=1e-4, rtol=1e-4)


def routed_case(rows: str, contiguous: bool = True):
    """A layer, its input [2, 24, H] and a plan: text only, image only, mixed, and a batch with padding."""
    config = tiny_config().text_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    from mono_internvl.modeling_mono_internvl import MonoInternVLDecoderLayer

    layer = MonoInternVLDecoderLayer(config, 0).eval().requires_grad_(False)
    x = torch.randn(2, 24, 64) if contiguous else torch.randn(2, 64, 24).transpose(1, 2)
    mask = torch.zeros(2, 24, dtype=torch.bool)
    if rows == "image":
        mask[:] = True
    elif rows == "mixed":
        mask[0, 3:11], mask[1, 12:20] = True, True
    elif rows == "padded":
        mask[1, 8:16] = True
    return layer, x, make_routing_plan(mask, int(mask.sum())), mask


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("rows", ["text", "image", "mixed", "padded"])
def test_every_way_of_routing_gives_the_same(rows, contiguous):
    layer, x, plan, mask = routed_case(rows, contiguous)
    expected = torch.where(mask[..., None], layer.visual_mlp(x), layer.mlp(x))
    with torch.no_grad():
        for name, function in routing.ways(layer, x, plan).items():
            if name == "permuting":
                assert torch.equal(function(), x)
            elif name != "dense":
                torch.testing.assert_close(function(), expected, atol=1e-5, rtol=1e-5)


def test_the_feed_forward_in_place_equals_the_one_with_gradients():
    layer, x, _, _ = routed_case("text")
    layer.requires_grad_(True)
    with torch.no_grad():
        fast = layer.mlp(x)
    assert torch.equal(fast, layer.mlp(x))


def test_medians_and_spread():
    result = measure.row("a", "b", [2.0, 4.0, 9.0], [1.0, 2.0, 3.0], at_most=2.0)
    assert (result["ratio"], result["rounds"], result["seconds"]) == (2.0, 3, 4.0)
    assert result["iqr"] == [2.0, 2.5]
    assert measure.goal_text(result) == "<= 2 yes"
    assert measure.goal_text({**result, "ratio": 2.1}) == "<= 2 no"
    assert measure.goal_text({"at_least": 0.6, "ratio": 0.5}) == ">= 0.6 no"


def test_functions_are_timed_in_turns():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.interleave(functions, CPU, rounds=3, warm_up=0)
    assert order == list("abcbcacab") and all(len(values) == 3 for values in times.values())


def test_the_per_tile_recipe_has_the_same_pixels():
    picture = photograph(300, 200)
    processor = MonoInternVLImageProcessor(tile_size=56, min_tiles=6, max_tiles=6)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy(per_tile_recipe(picture, 3, 2, 56))
    assert len(pixels) == 7 and resizes(picture, 3, 2, 56)[0].size == (168, 112)
    torch.testing.assert_close(unpatchify(pixels), expected, atol=1e-6, rtol=0)


def test_packed_and_padded_batches_hold_the_same_samples(monkeypatch):
    model, learnt = tiny_model(), {}
    forward = model.forward

    def counting(**inputs):
        name = "packed" if "position_ids" in inputs else "padded"
        learnt[name] = learnt.get(name, 0) + int((inputs["labels"] != -100).sum())
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counting)
    result = recipe.run_packing(CPU, count=12, rows=4, max_length=400, seconds=0, model=model)
    assert learnt["padded"] == 2 * learnt["packed"] > 0  # in random order and sorted
    assert [row["against"] for row in result["rows"]] == ["padded, 4 at a time", "padded, sorted by length"]
    assert result["rows"][0]["at_least"] == 1.5 and result["settings"]["packs"] < 12
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_parts_about_choices_run_small():
    """Each way of the output head, of one query's attention and of `generate` is measured, and the choice is marked."""
    result = kernels.run_head(CPU, preset="nano", rows=(1, 40), trained=(40,), seconds=0)
    ways = [(row["rows"], row["learns"], row["way"]) for row in result["rows"]]
    assert ways == [
        *((count, False, way) for count in (1, 40) for way in ("plain", "padded", "split")),
        *((40, True, way) for way in ("plain", "padded")),
    ]
    assert result["not_run"] == {} and {row["way"] for row in result["rows"] if row["chosen"]} == {"plain"}

    result = kernels.run_attention(CPU, preset="nano", caches=((2, 96),), seconds=0)
    assert [row["way"] for row in result["rows"]] == ["grouped", "repeated", "product"]
    assert [row["way"] for row in result["rows"] if "at_most" in row] == ["grouped"] and result["not_run"] == {}

    result = generate.run_generate(CPU, sizes=((8, 4), (4, 8)), new_tokens=2, rounds=1, model=tiny_model())
    assert [(row["cache"], row["new_tokens"]) for row in result["rows"]] == [
        *(("dynamic", 2), ("static", 2)),
        *(("dynamic", 3), ("static", 3)),
    ]
    assert result["not_run"] == {} and all(row["first_call_seconds"] > 0 for row in result["rows"])


def test_a_training_step_makes_the_products_of_the_formula():
    """Forward of one sample, the head on what is learnt alone; backward counts as two forwards."""
    model = tiny_model(attn_implementation="eager")
    targets = torch.tensor([9, 10, 11])
    actual = counted(lambda: model(ROWS[:1], pixel_values=tiles(), logits_to_keep=targets, use_cache=False))
    length, text = ROWS.shape[1], model.config.text_config
    square = flops.decoder_flops(text, length, causal=False) - flops.decoder_flops(text, length)
    assert 3 * (actual - square) == flops.training_flops(model.config, [length], VISUAL, len(targets))


def test_the_trainers_own_step_is_measured(monkeypatch):
    """Packs of the benchmark go through `EViPTrainer.compute_loss`; compiled, with the reports of a GPU's modes."""
    assert all(sum(map(sum, pack)) == train_steps.LENGTH for pack in train_steps.PACKS)
    model, seen = tiny_model(), []
    compute_loss = EViPTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        layers = model.model.language_model.layers
        compiled = ["forward" in layer.__dict__ for layer in layers]
        tiles = len(inputs["pixel_values"]) * inputs["pixel_values"].shape[1]
        seen.append((tuple(inputs["input_ids"].shape), tiles, all(compiled), any(compiled)))
        return compute_loss(self, model, inputs, *args, **kwargs)

    def compiled(*models, **options):
        compile_layers(*models, **{**options, "backend": "eager"})

    monkeypatch.setattr(EViPTrainer, "compute_loss", watched)
    monkeypatch.setattr("mono_internvl.training.trainer.compile_layers", compiled)
    modes = (train_steps.Mode("eager", "sdpa"), train_steps.Mode("compiled", "sdpa"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = train_steps.run_train(CPU, rows=2, accumulation=1, seconds=0, model=model, modes=modes)
    assert result["not_run"] == {}
    assert [row["mode"] for row in result["rows"]] == ["eager, sdpa", "compiled, sdpa"]
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(8192 / row["seconds"])
        assert "TFLOP/s, measured" in row["against"] and row["ratio"] > 0
        assert row["what"] == "S2 step, 8,192 tokens in packs of 4,096: MFU"
    # Five steps of each mode, which end at once where no time is left; packs differ from step to step.
    visual = [2 * 3328, 3328 + 2816]
    steps = [((2, 4096), visual[step % 2]) for step in range(5)]
    assert seen == [(*step, False, False) for step in steps] + [(*step, True, True) for step in steps]
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all("forward" not in layer.__dict__ for layer in model.model.language_model.layers)


def test_what_the_benchmarks_modes_change_of_the_recipe():
    recipe_stage = load_stage(train_steps.RECIPE)
    for mode in train_steps.CUDA_MODES:
        stage = load_stage(train_steps.RECIPE, mode.overrides())
        if mode.as_recipe:
            assert stage == recipe_stage
        else:
            assert stage.compile == (mode.layers == "compiled") and stage.attn_implementation == mode.attention
    assert {"recipe" in mode.name for mode in train_steps.CUDA_MODES} == {True, False}


def test_memory_and_waiting_are_measured():
    (row,) = recipe.run_memory(CPU, preset="nano", layers=1, rounds=1)["rows"]
    assert 0 < row["ratio"] < 1.2
    (row,) = recipe.run_loading(steps=6, workers=1)["rows"]
    assert 0 <= row["ratio"] < 1 and row["seconds"] > 0


def test_presets_and_parts_are_checked():
    with pytest.raises(ValueError, match="preset '7b' is not one of 2b, nano"):
        peers.preset_config("7b")
    with pytest.raises(ValueError, match="layers must be 1 to 24 for the preset 2b, got 25"):
        peers.preset_config("2b", 25)
    with pytest.raises(ValueError, match="no such benchmark: speed; there are preprocess, routing"):
        suite.run_parts(CPU, ("speed",))
    with pytest.raises(ValueError, match="device 'tpu' is not one of cpu, cuda"):
        measure.choose_place("tpu")


def test_a_report_survives_errors_and_keeps_its_budget(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(suite, "run_preprocess", broken)
    monkeypatch.setattr(suite, "run_routing", lambda *a, **k: {"rows": [measure.row("a", "b", [1.0], [1.0])]})
    out, seen = tmp_path / "report.json", []
    parts = ("preprocess", "routing", "load")
    suite.run_parts(CPU, parts, out=out, budget_seconds=60, on_part=lambda name, result: seen.append(name))
    report = json.loads(out.read_text())
    assert seen == list(report["parts"]) == list(parts)
    assert report["parts"]["preprocess"]["error"] == "RuntimeError: out of luck"
    assert report["parts"]["routing"]["rows"][0]["ratio"] == 1.0
    assert "left out" in report["parts"]["load"]["error"]
    assert report["machine"]["device"] == "cpu" and report["settings"]["preset"] == "2b"


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from mono_internvl.benchmarks.picture import save

    entry = {"mode": "eager", "ratio": 1.0, "seconds": 1.0}
    rows = [
        {**entry, "what": what, "against": against, "tokens": tokens}
        for tokens in (1024, 2048)
        for what, against in (("x", "dense twin"), ("y", "ours"), ("x", "FLOP limit"), ("dense twin", "FLOP limit"))
    ]
    report = {
        "machine": {"name": "a machine", "dtype": "float32"},
        "settings": {"preset": "2b", "layers": 4},
        "parts": {"prefill": {"rows": rows}},
    }
    save(report, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must end in .png, .svg or .pdf"):
        save(report, tmp_path / "out.txt")
    with pytest.raises(ValueError, match="no prefill figures"):
        save({**report, "parts": {}}, tmp_path / "out.png")


# ---------------------------------------------------------------------------------------------------------------- CUDA


@pytest.fixture
def on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return measure.Place(torch.device("cuda"), torch.bfloat16)


@pytest.fixture
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_never_waits(on_cuda, request):
    model = tiny_model().to("cuda")
    ids, pixels, token = ROWS[:1].cuda(), tiles().cuda(), torch.tensor([[5]]).cuda()
    with torch.no_grad():
        for _ in range(2):
            cache = model(ids, pixel_values=pixels, logits_to_keep=1, use_cache=True).past_key_values
            model(token, past_key_values=cache)
        request.getfixturevalue("no_waiting")
        cache = model(ids, pixel_values=pixels, logits_to_keep=1, use_cache=True).past_key_values
        model(token, past_key_values=cache)


@pytest.mark.gpu
def test_cuda_names_both_counts(on_cuda):
    model = tiny_model().to("cuda")
    with pytest.raises(ValueError, match="give 4 visual tokens but the input has 8 image placeholders"):
        model(ROWS[:1].cuda(), pixel_values=tiles(1).cuda())


@pytest.mark.gpu
def test_cuda_graphs_and_compiled_layers_give_the_same(on_cuda):
    model = tiny_model().to("cuda")
    prompt = peers.make_prompt(model.config, 8, 8, measure.Place(on_cuda.device, torch.float32))
    with torch.no_grad():
        expected = peers.prefill(model, prompt)
        run = measure.captured(lambda: peers.prefill(model, prompt), on_cuda)
        torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)
        compile_layers(model, fullgraph=True, dynamic=False)
        torch.testing.assert_close(peers.prefill(model, prompt), expected, atol=1e-4, rtol=1e-4)
        uncompile_layers(model)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_cuda_greedy_ids(on_cuda, backend):
    if backend == "flash_attention_2":
        pytest.importorskip("flash_attn")
    config = {"text_config": {"hidden_size": 128}} if backend.startswith("fl") else {}
    model = tiny_model(seed=3, **config)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    mask = torch.ones_like(ROWS[:1])
    expected = model.generate(ROWS[:1], attention_mask=mask, pixel_values=tiles(), **options)
    model = model.to("cuda", torch.bfloat16 if backend.startswith("flash") else torch.float32)
    model.set_attn_implementation(backend)
    inputs = {"input_ids": ROWS[:1].cuda(), "attention_mask": mask.cuda(), "pixel_values": tiles().cuda()}
    actual = model.generate(**inputs, **options)
    if backend == "flash_attention_2":
        assert actual.shape == expected.shape  # bfloat16 alone: ids may part where two are nearly alike
    else:
        assert actual.tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ["text", "image", "mixed", "padded"])
def test_cuda_ways_of_routing(on_cuda, rows):
    """Each way's bfloat16 error, against float32, is at most 1.5 times the plain path's own."""
    layer, x, plan, mask = routed_case(rows)
    exact = torch.where(mask[..., None], layer.visual_mlp(x), layer.mlp(x)).cuda()
    layer, x = layer.to("cuda", torch.bfloat16), x.to("cuda", torch.bfloat16)
    plan = type(plan)(*(index.cuda() for index in plan))
    with torch.no_grad():
        errors = {
            name: F.mse_loss(function().float(), exact).sqrt().item()
            for name, function in routing.ways(layer, x, plan).items()
            if name not in ("dense", "permuting")
        }
    assert all(error <= 1.5 * errors["plain"] for error in errors.values()), errors
