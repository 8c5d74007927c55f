"""Quantised weights, several devices and offload, `torch.export`: the answers stay, or the numbers do."""

import importlib.util

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from conftest import IMAGE, ROOT, golden, tiles, tiny_model
from mono_internvl import MonoInternVLForCausalLM


PLATE, WIDE = ROOT / "examples" / "plate.png", ROOT / "examples" / "wide.png"
QUESTION = "What color is the star?"
pytestmark = pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the nano is not in the repository")


def needs(module: str):
    found = importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not found, reason=f"{module} is not installed: pip install 'mono-internvl[quant]'")


def nano(**options) -> MonoInternVLForCausalLM:
    return MonoInternVLForCausalLM.from_pretrained(ROOT, **{"dtype": torch.float32, **options}).eval()


def encode(processor, picture, question):
    return processor.apply_chat_template(
        processor.conversation([(f"<image>\n{question}", None)], [picture]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


# -------------------------------------------------------------------------------------------------------- quantisation


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def int4():
    """torchao's int4 that runs anywhere; its `Int4WeightOnlyConfig` has kernels for GPUs alone."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def int4_gpu():
    from torchao.quantization import Int4WeightOnlyConfig

    return TorchAoConfig(Int4WeightOnlyConfig(group_size=32))


def bnb8():
    return BitsAndBytesConfig(load_in_8bit=True)


def bnb4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


WAYS = [
    pytest.param(int8, marks=needs("torchao")),
    pytest.param(int4, marks=needs("torchao")),
    pytest.param(bnb8, marks=needs("bitsandbytes")),
    pytest.param(bnb4, marks=needs("bitsandbytes")),
]


def plain_linears(model) -> set[str]:
    """Names of linear layers whose weights are ordinary bfloat16 tensors."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module.weight) is torch.nn.Parameter
        and type(module.weight.data) is torch.Tensor
        and module.weight.dtype == torch.bfloat16
    }


@pytest.mark.parametrize("way", WAYS)
def test_quantised_weights_answer_and_come_back_from_disk(way, nano_processor, tmp_path):
    model = nano(dtype=torch.bfloat16, quantization_config=way())
    projector = {f"model.multi_modal_projector.linear_{i}" for i in (1, 2)}
    assert plain_linears(model) == {"lm_head", *projector}
    assert model.chat(PLATE, QUESTION) == "orange"
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.7 * (ROOT / "model.safetensors").stat().st_size
    again = MonoInternVLForCausalLM.from_pretrained(tmp_path)
    assert plain_linears(again) == {"lm_head", *projector}
    assert again.chat(PLATE, QUESTION, processor=nano_processor) == "orange"


@needs("torchao")
def test_the_callers_list_wins_and_is_not_changed():
    config = int8()
    config.modules_to_not_convert = ["model.language_model.layers.0"]
    model = nano(dtype=torch.bfloat16, quantization_config=config)
    assert config.modules_to_not_convert == ["model.language_model.layers.0"]
    names = plain_linears(model)
    assert len(names) == 10 and all(".layers.0." in name for name in names)
    config = int8()
    nano(dtype=torch.bfloat16, quantization_config=config)
    assert config.modules_to_not_convert is None


@pytest.mark.parametrize("way", WAYS)
def test_both_layouts_quantise_to_the_same(way, tmp_path):
    official = golden("variant_a", "model.safetensors").parent
    options = {"image_token_id": 393, "dtype": torch.bfloat16}
    exact = MonoInternVLForCausalLM.from_pretrained(official, **options)
    exact.save_pretrained(tmp_path)
    first, second = (
        MonoInternVLForCausalLM.from_pretrained(folder, quantization_config=way(), **options)
        for folder in (official, tmp_path)
    )
    assert len(plain_linears(first)) == len(plain_linears(second)) == 3
    ids = torch.randint(0, 390, (1, 30), generator=torch.Generator().manual_seed(0))
    logits = [model(input_ids=ids).logits for model in (first, second, exact)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("way", WAYS)
def test_gates_and_queries_stay_as_they_are(way, tmp_path):
    sizes = {"num_learnable_queries": 5, "query_grids": [2, 1], "query_token_id": 118}
    # bitsandbytes packs whole blocks of 64 on a CPU.
    exact = tiny_model(text_config={"expert_gates": True, "intermediate_size": 128}, **sizes).to(torch.bfloat16)
    exact.save_pretrained(tmp_path)
    model = MonoInternVLForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=way()).eval()
    gates = {name for name, _ in exact.named_modules() if name.endswith("output_gate")}
    projector = {f"model.multi_modal_projector.linear_{i}" for i in (1, 2)}
    assert len(gates) == 6 and plain_linears(model) == {"lm_head", *projector, *gates}
    assert torch.equal(model.model.learnable_queries.weight, exact.model.learnable_queries.weight)
    ids = torch.tensor([[1, 7, 111, *[IMAGE] * 4, 112, *[118] * 5, 9, 15, 4]])
    with torch.no_grad():
        want, found = (one(input_ids=ids, pixel_values=tiles(1).bfloat16()).logits.flatten() for one in (exact, model))
    assert not torch.equal(found, want) and torch.cosine_similarity(found.float(), want.float(), dim=0) > 0.85


@pytest.mark.gpu
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(int8, marks=needs("torchao")),
        pytest.param(int4_gpu, marks=needs("torchao")),
        pytest.param(bnb8, marks=needs("bitsandbytes")),
        pytest.param(bnb4, marks=needs("bitsandbytes")),
    ],
)
def test_quantised_weights_on_a_gpu(way):
    assert nano(dtype=torch.bfloat16, quantization_config=way(), device_map="cuda").chat(PLATE, QUESTION) == "orange"


# ------------------------------------------------------------------------------------------------------------- devices


def test_what_does_not_fit_stays_on_disk(nano_processor, tmp_path):
    model = nano(device_map="auto", max_memory={"cpu": 9_000_000}, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    # A layer is never split between devices: no entry reaches below one.
    layers = [name for name in model.hf_device_map if ".layers" in name]
    assert layers and all(name.removeprefix("model.language_model.layers").count(".") <= 1 for name in layers)
    inputs = encode(nano_processor, WIDE, "Describe the image.")
    torch.testing.assert_close(model(**inputs).logits, nano()(**inputs).logits)


@pytest.mark.gpu
def test_cpu_offload():
    model = nano(device_map="auto", max_memory={0: 9_000_000, "cpu": "1GB"})
    assert set(model.hf_device_map.values()) == {0, "cpu"}
    assert model.chat(PLATE, QUESTION) == "orange"


@pytest.mark.gpu
def test_two_devices(nano_processor):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = nano(device_map="auto", max_memory={0: 12_000_000, 1: 20_000_000})
    assert set(model.hf_device_map.values()) == {0, 1}
    inputs = encode(nano_processor, WIDE, "Describe the image.")
    torch.testing.assert_close(model(**inputs).logits.cpu(), nano()(**inputs).logits, atol=1e-3, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------------- export


class Prefill(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, pixel_values):
        return self.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits


def prompt(tiles: int, text: int) -> dict[str, torch.Tensor]:
    """Tiles of four visual tokens each, then text, for `tiny_model`."""
    torch.manual_seed(tiles)
    ids = torch.cat([torch.full((4 * tiles,), 113), torch.randint(10, 100, (text,))])
    return {"input_ids": ids[None], "pixel_values": torch.randn(tiles, 4, 3 * 28 * 28)}


def test_prefill_exports_with_any_number_of_tiles_and_tokens():
    model, example = tiny_model(), prompt(tiles=3, text=7)
    tokens, tiles = torch.export.Dim("tokens", min=10, max=500), torch.export.Dim("tiles", min=2, max=60)
    with torch.no_grad():
        exported = torch.export.export(
            Prefill(model), tuple(example.values()), dynamic_shapes=({1: tokens}, {0: tiles})
        ).module()
        for inputs in (example, prompt(tiles=5, text=2), prompt(tiles=2, text=30)):
            torch.testing.assert_close(exported(*inputs.values()), model(**inputs).logits, atol=1e-4, rtol=1e-4)
        example["input_ids"][0, -1] = 113
        with pytest.raises(RuntimeError, match="differ in number"):
            exported(*example.values())


def test_decode_exports_with_a_static_cache():
    model = tiny_model()
    model.generation_config.update(use_cache=True, cache_implementation="static")
    ids = prompt(tiles=0, text=8)["input_ids"]
    with torch.no_grad():
        step = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=64, device=torch.device("cpu"))
        example = {"input_ids": ids[:, :1], "cache_position": torch.tensor([0])}
        exported = torch.export.export(step, (), example).module()
        found = [exported(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(8)]
        torch.testing.assert_close(torch.cat(found, dim=1), model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
