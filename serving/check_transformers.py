"""What `transformers serve` does with this model, and so why the project has a server of its own.

    python -m mono_internvl.serving.check_transformers           # a minute or two on two CPU cores

Starts transformers' server with the nano and this package's class put where that server looks for classes, and asks it
what `check_server` asks of ours. Needs the extra `[serve]` and OpenAI's client, which transformers' server imports.
"""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import typer

from ..common.models import BUNDLED_MODEL
from .check_server import NEW_TOKENS, Reference, slowest_health, versions
from .check_vllm import mixed_requests, wait_until_healthy


PLATE = BUNDLED_MODEL / "examples" / "plate.png"
# Its server takes a class from transformers' own names. That module is replaced while this package is imported, so it
# is asked for afterwards. Without the entry in the table the model counts as one without pictures.
START = """
import sys
from mono_internvl import MonoInternVLConfig, MonoInternVLForCausalLM
from transformers.cli.serve import Serve
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names
sys.modules["transformers"].MonoInternVLForCausalLM = MonoInternVLForCausalLM
names[MonoInternVLConfig.model_type] = "MonoInternVLForCausalLM"
Serve(force_model=sys.argv[1], host="127.0.0.1", port=int(sys.argv[2]), device="cpu", dtype="float32")
"""


@contextlib.contextmanager
def transformers_server() -> Iterator[str]:
    """transformers' server in a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as output:
            words = [sys.executable, "-c", START, str(BUNDLED_MODEL), str(port)]
            process = subprocess.Popen(words, stdout=output, stderr=output)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_healthy(address, process, log)
            yield address
        finally:
            process.kill()
            process.wait()


class Peer:
    """The server, asked without a client that would hide what it says."""

    def __init__(self, address: str):
        import httpx

        self.address = address
        # A connection that is kept may be one that the server has just closed.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(timeout=300, limits=limits)

    def post(self, messages: Any, **options: Any) -> Any:
        body = {"model": str(BUNDLED_MODEL), "max_tokens": NEW_TOKENS, **options}
        timeout = body.pop("timeout", 300)
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.client.post(
            f"{self.address}/v1/chat/completions", json={**body, "messages": messages}, timeout=timeout
        )

    def choice(self, messages: Any, **options: Any) -> dict[str, Any]:
        return self.post(messages, **options).json()["choices"][0]

    def text(self, messages: Any, **options: Any) -> str:
        return self.choice(messages, **options)["message"]["content"]

    def streamed(self, messages: Any) -> str:
        pieces = []
        for line in self.post(messages, stream=True).iter_lines():
            if line.startswith("data: ") and (choices := json.loads(line[6:]).get("choices")):
                pieces.append(choices[0]["delta"].get("content") or "")
        return "".join(pieces)


def row(what: str, found: Any) -> None:
    typer.echo(f"| {what} | {found} |")


def check_answers(peer: Peer) -> None:
    requests = mixed_requests()
    expected = Reference().answers(requests)
    for what, ask in (("whole", peer.text), ("streamed", peer.streamed)):
        equal = sum(ask(request.for_http()) == answer for request, answer in zip(requests, expected, strict=True))
        row(f"mixed requests equal to `chat`, {what}", f"{equal} of {len(requests)}")


def check_options(peer: Peer) -> None:
    row("status of a request with `stop`", peer.post("Hello.", stop=["mono"]).status_code)
    found = {peer.text("Describe a red circle.", temperature=2, seed=seed) for seed in range(8)}
    row("different answers to eight seeds at `temperature` 2", len(found))
    long = peer.post("word " * 20_000)
    said = f", the answer {long.json()['choices'][0]['message']['content']!r}" if long.status_code == 200 else ""
    row("status of a prompt of five times the context", f"{long.status_code}{said}")


def check_refusals(peer: Peer) -> None:
    def picture(url: str) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the image."}]
        return [{"role": "user", "content": parts}]

    row("status of a picture that is none", peer.post(picture("data:image/png;base64,AAAA")).status_code)
    row("status of a picture by a path of the server's", peer.post(picture(str(PLATE))).status_code)
    unknown = [{"role": "user", "content": [{"type": "imag"}, {"type": "text", "text": "Hello."}]}]
    row("status of a content part of an unknown type", peer.post(unknown).status_code)
    load = peer.client.post(f"{peer.address}/load_model", json={"model": "/no/such/folder"})
    row("status of `/load_model` with a path of the server's", load.status_code)


def check_sampling_and_ends(peer: Peer) -> None:
    """What an answer depends on besides its request, and how its end is told."""
    # What makes it sample is its own way of giving a whole generation configuration.
    config = json.dumps({"do_sample": True, "temperature": 2.0, "max_new_tokens": NEW_TOKENS, "eos_token_id": [2, 757]})

    def sampled(seed: int) -> str:
        return peer.text("Describe a red circle.", seed=seed, generation_config=config)

    alone = [sampled(seed) for seed in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(sampled, range(16)))
    equal = sum(a == b for a, b in zip(alone, together, strict=True))
    row("seeded answers that are the same alone and at once", f"{equal} of 16")
    count = peer.post("Hello.").json()["usage"]["completion_tokens"]
    reason = peer.choice("Hello.", max_tokens=count)["finish_reason"]
    row("`finish_reason` of an answer that ends by itself at `max_tokens`", reason)


def check_loop(peer: Peer) -> None:
    """How long /health waits while pictures are read, and a request behind one whose client has left."""
    import httpx

    def health() -> Any:
        return peer.client.get(f"{peer.address}/health")

    slowest = slowest_health(health, lambda messages: peer.post(messages, max_tokens=1))
    row("longest wait for `/health` during eight pictures of 12 megapixels", f"{slowest:.1f} s")

    config = json.dumps({"max_new_tokens": 1000, "min_new_tokens": 1000, "eos_token_id": [2], "pad_token_id": 2})
    start = time.monotonic()
    peer.post("Hello.", generation_config=config, max_tokens=1000)
    whole = time.monotonic() - start
    with contextlib.suppress(httpx.TimeoutException):
        peer.post("Hello.", generation_config=config, max_tokens=1000, timeout=0.3)
    start = time.monotonic()
    peer.post("Hello.", max_tokens=1)
    behind = time.monotonic() - start
    row("wait behind an answer whose client left at once; that answer takes", f"{behind:.1f} s; {whole:.1f} s")


def main() -> None:
    """Ask transformers' server, and print the table that stands in docs/serving.md."""
    typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
    typer.echo("\n| `transformers serve` | |\n|---|---|")
    with transformers_server() as address:
        peer = Peer(address)
        check_answers(peer)
        check_options(peer)
        check_refusals(peer)
        check_sampling_and_ends(peer)
        check_loop(peer)


if __name__ == "__main__":
    typer.run(main)
