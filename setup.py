"""The repository is the package: root files are `mono_internvl`, folders are its subpackages."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(encoding="utf-8"), re.M)[1]  # type: ignore[index]

FOLDERS = (
    "benchmarks",
    "common",
    "conversion",
    "evaluation",
    "export",
    "plates",
    "serving",
    "tokenization",
    "training",
)
TRAIN = ["accelerate", "peft", "datasets", "tensorboard", "pyyaml"]
EVAL = ["matplotlib"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "httpx"]
# Decodes video files; without it a list of frames is read.
VIDEO = ["av>=14.1"]
GGUF = ["gguf>=0.17.1"]
# The fused expert kernel. CUDA builds of torch bring their own; on a CPU its interpreter tests the kernel.
KERNEL = ["triton>=3.6; platform_system == 'Linux'"]
FONTS = [f"font-{name}" for name in ("caladea", "lato", "manrope", "roboto", "source-sans-pro", "source-serif-pro")]

setup(
    name="mono-internvl",
    version=VERSION,
    description="Mono-InternVL, a monolithic multimodal LLM, on today's transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # The command line is a package of its own: its help does not wait until the library is imported.
    package_dir={"mono_internvl": ".", "mono_internvl_cli": "cli"},
    packages=["mono_internvl", *(f"mono_internvl.{name}" for name in FOLDERS), "mono_internvl_cli"],
    # The nano model travels with the package: `mono-internvl chat` works without a network.
    package_data={
        "mono_internvl": ["*.json", "*.jinja", "*.safetensors", "LICENSE", "NOTICE"],
        "mono_internvl.conversion": ["templates/*.jinja"],
        "mono_internvl.training": ["recipes/*/*.yaml", "configs/*.yaml"],
    },
    install_requires=[
        "torch",
        "transformers>=5.17,<6",
        "safetensors",
        "huggingface_hub",
        "pillow>=10.4",
        "numpy>=1.26",
        "protobuf",
        "filelock",
        "typer",
        "rich",
    ],
    extras_require={
        "train": TRAIN,
        "flash": ["flash-attn"],
        "kernel": KERNEL,
        "serve": SERVE,
        # In an environment of its own, with serving/constraints.txt.
        "vllm": ["vllm"],
        "demo": ["gradio>=6"],
        "video": VIDEO,
        "quant": ["torchao", "bitsandbytes"],
        "eval": EVAL,
        # Writing the files. llama.cpp, which runs them, gets an environment of its own: export/constraints.txt.
        "gguf": GGUF,
        # The fonts that the bundled model learnt its digits from.
        "nano": [*TRAIN, *EVAL, *FONTS],
        "dev": [
            *(*TRAIN, *EVAL, *GGUF, *KERNEL, *SERVE, *VIDEO),
            *("openai", "trl", "pytest", "pytest-xdist", "ruff", "mypy"),
        ],
    },
    entry_points={
        "console_scripts": ["mono-internvl = mono_internvl_cli:main"],
        "lmms_eval.models": ["mono_internvl = mono_internvl.evaluation.lmms_eval:manifest"],
        "vllm.general_plugins": ["mono_internvl = mono_internvl.serving.vllm_plugin:register"],
    },
)
