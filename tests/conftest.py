"""What several test files share: where the golden numbers lie, a tiny model of our own and its prompts, pictures.

Helpers of one subject that need further imports are in `helpers_*.py`; a test file imports no other test file.
"""

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mono_internvl import (
    MonoInternVLConfig,
    MonoInternVLForCausalLM,
    MonoInternVLImageProcessor,
    MonoInternVLProcessor,
)
from mono_internvl.tokenization import convert_tokenizer


# So that a failing assert in a helper says what it compared, as one in a test does.
pytest.register_assert_rewrite("helpers_cli", "helpers_training", "helpers_video")

ROOT = Path(__file__).resolve().parent.parent
SHARED_GOLDEN = ROOT.parent / "shared" / "golden"
INTERNLM2_FILE = ROOT.parent / "shared" / "data" / "internlm2" / "tokenizer.model"
# The part of the golden numbers that travels with the repository.
LOCAL_GOLDEN = ROOT / "tests" / "golden"


class PlainRoot:
    """The repository is a package, and to pytest a parent of the tests, which it imports by its folder's name. A clone
    of another name would be a second package, and one called `mono-internvl`, which names no module, an error of every
    test."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        is_clone = path.name != "mono_internvl" and path.samefile(ROOT)
        return pytest.Dir.from_parent(parent, path=path) if is_clone else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="where random numbers of the tests begin (default: 0)")


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin: the hooks of a conftest are not asked about folders above it.
    config.pluginmanager.register(PlainRoot())


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed}"


# A test that draws without a seed of its own would fail once in so many runs, and then not again. So every fixture and
# every test begins at one place, whichever ran before; `--seed` shows which of them pass by luck.
def seed_everything(config: pytest.Config) -> None:
    random.seed(config.option.seed)
    np.random.seed(config.option.seed)
    torch.manual_seed(config.option.seed)


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector: pytest.Collector) -> None:
    seed_everything(collector.config)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> None:
    seed_everything(request.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_everything(item.config)


def golden(*parts: str) -> Path:
    """A golden file: the copy in tests/golden, else the shared one; skips where neither is there."""
    for base in (LOCAL_GOLDEN, SHARED_GOLDEN):
        if (path := base.joinpath(*parts)).exists():
            return path
    pytest.skip(f"needs golden/{'/'.join(parts)}, which is not part of this repository")


def load_golden(*parts: str) -> dict[str, torch.Tensor]:
    return load_file(golden(*parts))


@pytest.fixture(scope="session")
def variant_a() -> MonoInternVLForCausalLM:
    """The golden model in the official layout, on eager attention and float32."""
    folder = golden("variant_a", "model.safetensors").parent
    model = MonoInternVLForCausalLM.from_pretrained(folder, image_token_id=393, attn_implementation="eager")
    return model.eval()


def tiny_config(**overrides) -> MonoInternVLConfig:
    text = {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **overrides.pop("text_config", {}),
    }
    vision = {"hidden_size": 16, "image_size": 56, **overrides.pop("vision_config", {})}
    return MonoInternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, **overrides)


def tiny_model(seed: int = 0, **overrides) -> MonoInternVLForCausalLM:
    """A random model whose experts differ and whose logits are spread, so that tests can fail."""
    torch.manual_seed(seed)
    model = MonoInternVLForCausalLM(tiny_config(**overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def tiny():
    return tiny_model()


IMAGE = 113  # the placeholder of `tiny_config`
# Row 0: text, two tiles of 4 tokens, text; row 1: text only, padded on the left.
ROWS = torch.tensor(
    [
        [1, 7, 111, *[IMAGE] * 8, 112, 9, 15, 4],
        [2, 2, 2, 1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17],
    ]
)
MASK = torch.tensor([[1] * 15, [0] * 3 + [1] * 12])


def tiles(count: int = 2, seed: int = 1) -> torch.Tensor:
    """Patches of tiles for `ROWS`, float32 [count, 4, 2352]."""
    return torch.randn(count, 4, 3 * 28 * 28, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny random model with the nano's tokenizer and 56-px tiles."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    config = tiny_config(text_config={"vocab_size": len(tokenizer)})
    config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    MonoInternVLForCausalLM(config).save_pretrained(folder)
    MonoInternVLProcessor(MonoInternVLImageProcessor(tile_size=56, max_tiles=4), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def nano_processor() -> MonoInternVLProcessor:
    """The bundled nano's own."""
    return MonoInternVLProcessor.from_pretrained(ROOT)


@pytest.fixture(scope="session")
def internlm2_folder(tmp_path_factory) -> Path:
    """A folder with the released tokenizer, converted; skips where its file is not."""
    if not INTERNLM2_FILE.exists():
        pytest.skip("needs InternLM2's tokenizer.model, which is not part of this repository")
    folder = tmp_path_factory.mktemp("internlm2")
    convert_tokenizer(INTERNLM2_FILE, folder)
    return folder


@pytest.fixture(scope="module")
def processor():
    """The nano's tokenizer and 56-px tiles."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=False)
    return MonoInternVLProcessor(MonoInternVLImageProcessor(tile_size=56, max_tiles=4), tokenizer)


@pytest.fixture(scope="module")
def model(processor):
    """A tiny random model for `processor`."""
    model = tiny_model(seed=7, text_config={"vocab_size": len(processor.tokenizer)})
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    return model


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exchanged_profile() -> bytes:
    """An ICC profile: sRGB with red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.find(b"rXYZ", 128), profile.find(b"gXYZ", 128)
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


class Bomb:
    """Makes the folder `path` where its pickle is loaded with code."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
