"""Expanding a model of the released size: memory, time against a plain copy of the same bytes, logits afterwards.

    python -m mono_internvl.benchmarks.conversion FOLDER [--rounds 2] [--tokenizer tokenizer.model]

Makes a random dense InternLM2-1.8B in FOLDER (3.8 GB, `.bin` shards), expands it (6.2 GB) and copies the result, in
turns; both end with fsync. Needs 17 GB of disk and, for the logits, 8 GB of memory; cleans up. Prints JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer


DENSE_2B = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "vocab_size": 92544,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}
# A process between us and the measured one: on Linux a child starts with the resident peak of its parent.
_PEAK = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=sys.stderr); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def make_dense(folder: Path, config: dict[str, Any] = DENSE_2B, shards: int = 4, seed: int = 0) -> int:
    """A random dense InternLM2 in bfloat16, as `.bin` shards with an index; returns bytes."""
    import torch

    width, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (config["vocab_size"], width)}
    for i in range(layers):
        for name, shape in (
            ("attention.wqkv", (width + 2 * kv_width, width)),
            ("attention.wo", (width, width)),
            ("feed_forward.w1", (ffn, width)),
            ("feed_forward.w3", (ffn, width)),
            ("feed_forward.w2", (width, ffn)),
            ("attention_norm", (width,)),
            ("ffn_norm", (width,)),
        ):
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (width,), "output.weight": (config["vocab_size"], width)}

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    names, weight_map, total = list(shapes), {}, 0
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        state = {}
        for name in names[i * len(names) // shards : (i + 1) * len(names) // shards]:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            state[name] = tensor + 1 if len(shapes[name]) == 1 else tensor
            weight_map[name] = file
            total += tensor.nbytes
        torch.save(state, folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def run_command(*arguments: str) -> dict[str, float]:
    """`mono-internvl ARGUMENTS` in a process of its own: seconds, and peak resident bytes (what `time -v` prints)."""
    command = [sys.executable, "-m", "mono_internvl", *arguments]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _PEAK, *command], check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": time.perf_counter() - start, "peak_bytes": 1024 * int(done.stdout)}


def copy_folder(source: Path, destination: Path) -> float:
    """Seconds to copy all files and bring them to the disk."""
    start = time.perf_counter()
    destination.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, destination / path.name)
        with (destination / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def compare_logits(dense: Path, expanded: Path) -> dict[str, Any]:
    """The finished folder, loaded as a user does, against the dense weights run by the same code without experts."""
    import torch

    from ..configuration_mono_internvl import MonoInternVLConfig
    from ..conversion.source import Checkpoint
    from ..conversion.verify import NativeView, embed, last_hidden_states
    from ..modeling_mono_internvl import MonoInternVLForCausalLM

    config = MonoInternVLConfig.from_pretrained(expanded)
    rows = DENSE_2B["vocab_size"]
    ids = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(1))  # type: ignore[call-overload]
    with torch.no_grad():
        with Checkpoint(dense) as checkpoint:
            view = NativeView(checkpoint, "internlm2", config)
            hidden = last_hidden_states(view, embed(view, ids), None)
            logits = hidden @ view.read(view.head).T
        model = MonoInternVLForCausalLM.from_pretrained(expanded, attn_implementation="eager").eval()
        found = model.model(input_ids=ids, use_cache=False).last_hidden_state
        difference = (model.lm_head(found)[..., :rows].float() - logits.float()).abs().max()
    return {
        "parameters": sum(tensor.numel() for tensor in model.state_dict().values()),
        "hidden_states_identical": torch.equal(found, hidden),
        "largest_logit_difference": float(difference),
    }


def main(
    folder: Annotated[Path, typer.Argument(help="where to work; made, and removed at the end")],
    rounds: Annotated[int, typer.Option(min=1, help="expansions without verification, each with a copy")] = 2,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model to lie beside the dense weights")] = None,
) -> None:
    """Measure `expand` at the released size."""
    if folder.exists():
        raise typer.BadParameter(f"{folder} exists", param_hint="FOLDER")
    dense, expanded, copied = folder / "dense", folder / "expanded", folder / "copy"
    try:
        results: dict[str, Any] = {"input_bytes": make_dense(dense), "rounds": []}
        if tokenizer is not None:
            shutil.copyfile(tokenizer, dense / "tokenizer.model")
        for _ in range(rounds):
            measured = run_command("expand", str(dense), str(expanded), "--no-verify")
            size = sum(path.stat().st_size for path in expanded.iterdir())
            largest = max(path.stat().st_size for path in expanded.glob("*.safetensors"))
            seconds = copy_folder(expanded, copied)
            results["rounds"].append(
                {
                    "expand_seconds_per_gb": measured["seconds"] / size * 1e9,
                    "copy_seconds_per_gb": seconds / size * 1e9,
                    "ratio": measured["seconds"] / seconds,
                    "peak_gb": measured["peak_bytes"] / 1e9,
                }
            )
            results |= {"output_bytes": size, "largest_shard_bytes": largest}
            shutil.rmtree(copied)
            shutil.rmtree(expanded)
        verified = run_command("expand", str(dense), str(expanded))
        results["with_verification"] = {
            "seconds": verified["seconds"],
            "peak_gb": verified["peak_bytes"] / 1e9,
        }
        results["logits"] = compare_logits(dense, expanded)
        typer.echo(json.dumps(results, indent=2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
