"""Loading an official-layout checkpoint, against reading its bytes; each measurement is a process of its own.

    python -m mono_internvl.benchmarks.load MODE FOLDER [DEVICE]      one measurement, as JSON: read, ours

On the CPU transformers maps the file into memory, so `from_pretrained` returns before most bytes are read; `ours`
therefore also touches every page of every weight. On CUDA the weights end on the device.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .measure import Place, quartiles, ratio, readable_seconds, run_child


_MODULE = "mono_internvl.benchmarks.load"
_BUFFER = 64 * 2**20
_PAGE = 4096


def run_load(
    place: Place,
    *,
    preset: str = "2b",
    layers: int | None = None,
    folder: Path | None = None,
    rounds: int = 3,
    model: Any = None,
) -> dict[str, Any]:
    """Seconds and peak host memory of `from_pretrained` (bfloat16), caches warm and dropped.

    Args:
        folder: an official checkpoint; default: one with random weights is written to a temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="mono-internvl-benchmark-") as temporary:
        if folder is None:
            folder = Path(temporary)
            _write_checkpoint(folder, preset, layers)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        rows = []
        for cache in ("warm", "dropped"):
            results: dict[str, list[dict]] = {"read": [], "ours": []}
            for mode in ("read", "ours") if cache == "warm" else ():
                _child(mode, folder, place.device.type)
            for i in range(rounds):
                for mode in ("read", "ours") if i % 2 == 0 else ("ours", "read"):
                    if cache == "dropped":
                        _drop(files)
                    results[mode].append(_child(mode, folder, place.device.type))
            rows.append(_time_row(results, cache, size))
            rows.append(_memory_row(results["ours"], cache, size))
    return {"rows": rows, "settings": {"preset": preset, "layers": layers, "bytes": size, "rounds": rounds}}


def _time_row(results: dict[str, list[dict]], cache: str, size: int) -> dict[str, Any]:
    ours, read = ([result["seconds"] for result in results[mode]] for mode in ("ours", "read"))
    return {
        "what": f"load {size / 1e9:.2f} GB, cache {cache}",
        "against": "reading the bytes",
        **ratio(ours, read),
        "seconds": sorted(ours)[len(ours) // 2],
        "at_most": 1.6,
        "returned_seconds": sorted(result["returned"] for result in results["ours"])[len(ours) // 2],
        "note": f"reading takes {readable_seconds(sorted(read)[len(read) // 2])}",
    }


def _memory_row(results: list[dict], cache: str, size: int) -> dict[str, Any]:
    shares = [result["peak_bytes"] / size for result in results]
    return {
        "what": f"peak memory (VmHWM), cache {cache}",
        "against": "weights",
        "ratio": sorted(shares)[len(shares) // 2],
        "iqr": list(quartiles(shares)),
        "at_most": 1.15,
        "note": f"{sorted(shares)[len(shares) // 2] * size / 1e9:.2f} GB",
    }


def _write_checkpoint(folder: Path, preset: str, layers: int | None) -> None:
    """Official layout, bfloat16, one shard as released; in a process of its own, whose memory it gives back."""
    _child("write", folder, preset, "" if layers is None else str(layers))


def _child(mode: str, folder: Path, *more: str) -> dict[str, Any]:
    return run_child(_MODULE, mode, str(folder), *more)


def _drop(files: list[Path]) -> None:
    """Ask the kernel to forget the files' pages."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------- the child


def _write(folder: Path, preset: str, layers: str) -> None:
    import torch

    from ..conversion.convert import official_config
    from ..image_processing_mono_internvl import MonoInternVLImageProcessor
    from .peers import build, preset_config

    config = preset_config(preset, int(layers) if layers else None)
    model = build(config, Place(torch.device("cpu"), torch.bfloat16))
    model.save_pretrained(folder, save_original_format=True)
    config.dtype = torch.bfloat16
    (folder / "config.json").write_text(
        json.dumps(official_config(config, MonoInternVLImageProcessor())), encoding="utf-8"
    )


def _read(folder: Path) -> float:
    """Read all bytes through one small buffer: nothing that loads them can be faster."""
    buffer = bytearray(_BUFFER)
    begin = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begin


def _load(folder: Path, device: str) -> tuple[float, float]:
    """Seconds until `from_pretrained` returns, and until every weight has been read."""
    import torch
    import transformers

    from ..modeling_mono_internvl import MonoInternVLForCausalLM

    transformers.logging.disable_progress_bar()
    if device == "cuda":
        torch.zeros(1, device=device)  # starting CUDA is not loading
    begin = time.perf_counter()
    model = MonoInternVLForCausalLM.from_pretrained(folder, device_map=None if device == "cpu" else device)
    returned = time.perf_counter() - begin
    for parameter in model.parameters():
        parameter.data.view(-1).view(torch.uint8)[::_PAGE].max()
    if device == "cuda":
        torch.cuda.synchronize()
    return returned, time.perf_counter() - begin


def peak_memory() -> int:
    """Most bytes of host memory that this process has held (VmHWM)."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _main(mode: str, folder: str, *more: str) -> None:
    result: dict[str, float] = {}
    if mode == "write":
        _write(Path(folder), *more)
    elif mode == "read":
        result["seconds"] = _read(Path(folder))
    else:
        result["returned"], result["seconds"] = _load(Path(folder), *more)
    sys.stdout.write(json.dumps({**result, "peak_bytes": peak_memory()}) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
