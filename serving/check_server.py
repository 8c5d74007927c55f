"""Does `mono-internvl serve` answer as `chat` does? Starts the command with the bundled nano and asks it over HTTP.

    python -m mono_internvl.serving.check_server           # the table, one to two minutes on two CPU cores

It needs the extra `[serve]` and OpenAI's client (`pip install openai`). A line each: what was asked, how many answers
are equal to `chat`'s, and the seconds. "Differ" is how many of the same answers a model gives otherwise whose visual
tokens go through the text experts: a check that could not tell the two apart would prove nothing.
"""

import contextlib
import http.client
import importlib.metadata
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import typer
from PIL import Image

from ..common.models import BUNDLED_MODEL, load_model
from ..plates.drawing import draw_plate
from ..plates.layout import sample_plate
from .check_vllm import Request, mixed_requests, require, without_visual_experts


AT_ONCE = 32
NEW_TOKENS = 48
VERSIONS = ("transformers", "torch", "fastapi", "uvicorn", "openai")


def plates(count: int) -> list[Image.Image]:
    """Pictures of the nano's world, each with shapes of its own."""
    draws = [random.Random(number) for number in range(count)]
    return [draw_plate(sample_plate(draw, with_number=0.0), draw, damage=False) for draw in draws]


def picture_requests(count: int) -> list[Request]:
    """One picture each."""
    ask = ("Describe the image.", "What shape is in the image?", "What color is it?")
    return [Request(f"plate {i}").turn(ask[i % 3 if i % 4 == 3 else 0], plate) for i, plate in enumerate(plates(count))]


def text(words: str) -> list[dict[str, str]]:
    """A conversation of one question without pictures."""
    return [{"role": "user", "content": words}]


@contextlib.contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`mono-internvl serve` in a process of its own; yields it and its address, up to `/v1`."""
    words = [sys.executable, "-m", "mono_internvl", "serve", "--port", "0", "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen([*words, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        require(" at http://" in said, f"the server did not start: {said}")
        yield process, said.split()[2]
    finally:
        process.kill()
        process.wait()


class Asked:
    """One server and what it was asked, through OpenAI's client."""

    def __init__(self, address: str):
        import httpx
        import openai

        self.client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
        self.name = self.client.models.list().data[0].id
        self._health = lambda: httpx.get(address.replace("/v1", "/health"), timeout=30).json()

    def create(self, messages: Any, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model=self.name, messages=messages, **{"max_tokens": NEW_TOKENS, **options}
        )

    def whole(self, request: Request) -> str:
        return self.create(request.for_http()).choices[0].message.content

    def streamed(self, request: Request) -> str:
        chunks = list(self.create(request.for_http(), stream=True))
        require(len(chunks) > 2 and chunks[-1].choices[0].finish_reason is not None, f"{request.name}: no end")
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def open_requests(self) -> int:
        return self._health()["open"]

    def wait_until_open(self, count: int, seconds: float) -> float:
        start = time.monotonic()
        while (found := self.open_requests()) != count:
            require(time.monotonic() - start < seconds, f"{found} requests are open after {seconds} s, not {count}")
            time.sleep(0.01)
        return time.monotonic() - start


class Reference:
    """What `chat` answers in this process, with and without visual experts."""

    def __init__(self) -> None:
        self.model, self.processor = load_model(str(BUNDLED_MODEL), device="cpu", dtype="float32")
        self.blind = without_visual_experts(self.model)

    def answers(self, requests: Sequence[Request], *, visual_experts: bool = True) -> list[str]:
        model = self.model if visual_experts else self.blind
        found = []
        for request in requests:
            *history, last = request.messages
            options: dict[str, Any] = {"history": history, "processor": self.processor, "max_new_tokens": NEW_TOKENS}
            found.append(model.chat(None, last["content"], **options))
        return found  # type: ignore[return-value]


def compare(what: str, requests: Sequence[Request], ask: Callable[[], list[str]], reference: Reference) -> None:
    """One line of the table.

    Raises:
        CheckFailed: answers differ from `chat`'s, or too many are the same without visual experts.
    """
    expected = reference.answers(requests)
    with_pictures = [i for i, request in enumerate(requests) if request.pictures]
    blind = reference.answers([requests[i] for i in with_pictures], visual_experts=False)
    differ = sum(expected[i] != other for i, other in zip(with_pictures, blind, strict=True))
    start = time.monotonic()
    found = ask()
    seconds = time.monotonic() - start
    off = [request.name for request, a, b in zip(requests, found, expected, strict=True) if a != b]
    require(not off, f"{what}: {len(off)} of {len(requests)} differ from chat: {', '.join(off)}")
    require(2 * differ > len(with_pictures), f"{what}: visual experts decide only {differ} of the answers")
    row(what, f"{len(requests)} of {len(requests)}", f"{differ} of {len(with_pictures)}", seconds)


def row(what: str, equal: str, differ: str, seconds: float) -> None:
    typer.echo(f"| {what} | {equal} | {differ} | {seconds:.1f} |")


def check_answers(asked: Asked, reference: Reference) -> None:
    mixed, pictures = mixed_requests(), picture_requests(AT_ONCE)
    compare("mixed requests, whole", mixed, lambda: [asked.whole(request) for request in mixed], reference)
    compare("mixed requests, streamed", mixed, lambda: [asked.streamed(request) for request in mixed], reference)
    for what, ask in (("whole", asked.whole), ("streamed", asked.streamed)):

        def at_once(ask: Callable[[Request], str] = ask) -> list[str]:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return list(pool.map(ask, pictures))

        compare(f"{AT_ONCE} picture requests at once, {what}", pictures, at_once, reference)


def check_seeds(asked: Asked) -> None:
    """Sampled answers with a seed are the same alone and in a crowd."""

    def sampled(seed: int) -> str:
        return asked.create(text("Describe a red circle."), temperature=2, seed=seed).choices[0].message.content

    seeds = range(16)
    start = time.monotonic()
    alone = [sampled(seed) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(sampled, seeds))
    equal = sum(a == b for a, b in zip(alone, together, strict=True))
    require(equal == len(seeds), f"{equal} of {len(seeds)} seeded answers are the same alone and at once")
    require(len(set(alone)) > 8, "seeds decide nothing")
    row("seeded answers, alone and at once", f"{equal} of {len(seeds)}", "", time.monotonic() - start)


def check_leaving(asked: Asked) -> None:
    """Clients that leave before their answers, streamed or whole, free their places, also the one that is answered."""
    address = asked.client.base_url
    connections = [http.client.HTTPConnection(address.host, address.port) for _ in range(AT_ONCE)]
    for number, connection in enumerate(connections):
        body = {"messages": text("Describe the image. " * 700), "max_tokens": 1000, "stream": number % 2 == 0}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    asked.wait_until_open(AT_ONCE, 60)
    for connection in connections:
        connection.close()
    seconds = asked.wait_until_open(0, 60)
    row(f"places free after {AT_ONCE} clients left", f"{AT_ONCE} of {AT_ONCE}", "", seconds)


def slowest_health(health: Callable[[], Any], ask: Callable[[list[dict[str, Any]]], Any]) -> float:
    """The longest wait for `/health`, in seconds, while eight pictures of twelve megapixels are asked about at once."""
    (plate,) = plates(1)
    request = Request("large").turn("What?", plate.resize((4000, 3000))).for_http()
    slowest = 0.0
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, request) for _ in range(8)]
        while not all(one.done() for one in asked):
            start = time.monotonic()
            health()
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.01)
    for one in asked:
        one.result()
    return slowest


def check_health(asked: Asked) -> None:
    """Connections are served while pictures are read and answers written."""
    slowest = slowest_health(asked.open_requests, lambda request: asked.create(request, max_tokens=1))
    require(slowest < 2, f"/health took {slowest:.1f} s")
    row("longest wait for `/health` during eight pictures of 12 megapixels", "", "", slowest)


def check_end(process: subprocess.Popen, asked: Asked) -> None:
    """SIGTERM lets what is open be answered, and takes nothing more."""
    story = text("Describe the image. " * 500)
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(asked.create, story) for _ in range(4)]
        asked.wait_until_open(4, 30)
        process.send_signal(signal.SIGTERM)
        ended = sum(one.result().choices[0].finish_reason in ("stop", "length") for one in waiting)
    require(ended == 4, f"{ended} of 4 open requests were answered after SIGTERM")
    require(process.wait(60) == 0, f"the exit status is {process.returncode}")
    row("open requests answered after SIGTERM", f"{ended} of 4", "", time.monotonic() - start)


def versions() -> dict[str, str]:
    """Of what the server is made of."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def main() -> None:
    """Check the server against `chat`, and print the table that stands in docs/serving.md."""
    typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
    typer.echo("\n| check | equal to `chat` | differ without V-experts | s |\n|---|---|---|---|")
    reference = Reference()
    with command() as (process, address):
        asked = Asked(address)
        check_answers(asked, reference)
        check_seeds(asked)
        check_leaving(asked)
        check_health(asked)
        check_end(process, asked)


if __name__ == "__main__":
    typer.run(main)
