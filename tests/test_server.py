"""The server of the project's own, asked over HTTP with OpenAI's client: answers equal to `chat`, places, refusals."""

import asyncio
import base64
import contextlib
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from conftest import ROOT, encoded, noise, tiny_model
from helpers_cli import failure
from helpers_video import write_video


httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from mono_internvl import image_processing_mono_internvl  # noqa: E402
from mono_internvl.common.models import load_model  # noqa: E402
from mono_internvl.serving import answer_line, picture_sources  # noqa: E402
from mono_internvl.serving.answer_line import StopCut  # noqa: E402
from mono_internvl.serving.check_server import picture_requests  # noqa: E402
from mono_internvl.serving.check_vllm import mixed_requests, picture  # noqa: E402
from mono_internvl.serving.picture_sources import PictureSources, is_public  # noqa: E402
from mono_internvl.serving.server import ServerOptions, build_app, listen  # noqa: E402


MIB = 2**20
NAME = "nano"


def data_url(image: Image.Image | bytes) -> str:
    data = image if isinstance(image, bytes) else encoded(image)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image_part(url, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url if isinstance(url, str) else data_url(url), **more}}


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def wait_until_equal(value: Callable[[], Any], wanted: Any, seconds: float = 20) -> None:
    """For what a server does beside its replies: a reply may be read before the server is done with its request."""
    end = time.monotonic() + seconds
    while (found := value()) != wanted:
        assert time.monotonic() < end, f"{found} is not {wanted}"
        time.sleep(0.01)


class Served:
    """A server that runs in a thread of this process, and how to ask it."""

    def __init__(self, app, port: int):
        self.app, self.line, self.address = app, app.state.line, f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, messages, **options):
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.client.chat.completions.create(model=NAME, messages=messages, **options)

    def text(self, messages, **options) -> str:
        return self.ask(messages, **options).choices[0].message.content

    def stream(self, messages, **options) -> list:
        return list(self.ask(messages, stream=True, **options))

    def post(self, body, path="/v1/chat/completions", **options):
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        options = {"headers": {"content-type": "application/json"}, **options}
        return httpx.post(self.address + path, **content, **options, timeout=60)

    def wait_until_open(self, count: int) -> None:
        wait_until_equal(lambda: httpx.get(f"{self.address}/health", timeout=5).json()["open"], count)


@contextlib.contextmanager
def served(model, processor, sources=None, **options):
    options = ServerOptions(name=NAME, sources=sources or PictureSources(64 * MIB), **options)
    bound = listen("127.0.0.1", 0)
    app = build_app(model, processor, options)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_until_equal(lambda: server.started, True)
        yield Served(app, bound.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def nano():
    return load_model(str(ROOT), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(nano):
    with served(*nano) as running:
        yield running


class Gate:
    """Holds every step of a model while it is closed."""

    def __init__(self, model):
        self.open = threading.Event()
        self.steps = 0
        model.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.steps += 1
        assert self.open.wait(30)


@pytest.fixture
def gated(processor):
    """A tiny model's server with four places, whose answers wait for a gate and then go on to the longest."""
    model = tiny_model(seed=7, text_config={"vocab_size": len(processor.tokenizer)})
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    model.generation_config.eos_token_id = None
    gate = Gate(model)
    with served(model, processor, max_requests=4) as running:
        running.gate = gate
        try:
            yield running
        finally:
            gate.open.set()


def expected(nano, request, **options) -> str:
    """`chat`'s own answer to one of the mixed requests."""
    model, processor = nano
    *history, last = request.messages
    return model.chat(None, last["content"], history=history, processor=processor, max_new_tokens=24, **options)


# ------------------------------------------------------------------------------------------------- equal to `chat`


def test_whole_and_streamed_answers_are_those_of_chat(server, nano):
    """Text, one to three pictures, later turns, a picture in a later turn, typed control tokens."""
    requests = mixed_requests()[::2] + mixed_requests()[-6:]
    said = set()
    for request in requests:
        answer = expected(nano, request)
        said.add(answer)
        whole = server.ask(request.for_http(), max_tokens=24)
        assert whole.choices[0].message.content == answer, request.name
        chunks = server.stream(request.for_http(), max_tokens=24, stream_options={"include_usage": True})
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == answer, request.name
        assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(said) > 5  # answers that are all alike would prove nothing


def test_many_pictures_at_once(server, nano):
    requests = picture_requests(32)
    answers = [expected(nano, request) for request in requests]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda request: server.text(request.for_http(), max_tokens=24), requests))
    assert found == answers and len(set(answers)) > 20


def test_several_turns_with_a_system_prompt(server, nano):
    model, processor = nano
    plate, wide = (Image.open(ROOT / "examples" / name).convert("RGB") for name in ("plate.png", "wide.png"))
    for role in ("system", "developer"):
        messages = [
            {"role": role, "content": "Answer with one word."},
            user(image_part(plate), "What is in the picture?"),
            {"role": "assistant", "content": "a circle"},
            user("And in these?", image_part(wide), image_part(plate)),
        ]
        history = [("<image>\nWhat is in the picture?", "a circle")]
        parts = [{"type": "text", "text": "And in these?"}, {"type": "image"}, {"type": "image"}]
        answer = model.chat(
            [plate, wide, plate], parts, system="Answer with one word.", history=history, processor=processor
        )
        assert server.text(messages) == answer


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_python_of_the_pages_runs(server, page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = (block for block in blocks if "openai" in block)
    assert "http://localhost:8000/v1" in code
    exec(compile(code.replace("http://localhost:8000", server.address), page, "exec"), {})
    assert capsys.readouterr().out == "2\n"


def test_usage_counts_the_tokens_of_prompt_and_answer(server, nano):
    model, processor = nano
    messages = [user(image_part(picture(1)), "Describe the image.")]
    usage = server.ask(messages).usage
    plain = [user({"type": "image", "image": picture(1)}, "Describe the image.")]
    inputs = processor.apply_chat_template(
        plain, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = model.generate(**inputs, max_new_tokens=1024, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, ids.shape[1] - prompt)
    assert usage.total_tokens == ids.shape[1]


def test_an_answer_is_cut_off_or_has_ended(server):
    whole = server.ask("Hello.")
    count = whole.usage.completion_tokens
    # Its last token is the end of the turn: with as many allowed it has ended, with one less it is cut off.
    for name in ("max_tokens", "max_completion_tokens"):
        assert server.ask("Hello.", **{name: count}).choices[0].finish_reason == "stop"
        assert server.ask("Hello.", **{name: count - 1}).choices[0].finish_reason == "length"
    chunks = server.stream("Hello.", max_tokens=3)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_context_ends_an_answer(processor):
    model = tiny_model(
        seed=7,
        text_config={"vocab_size": len(processor.tokenizer), "max_position_embeddings": 40, "eos_token_id": None},
    )
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    with served(model, processor) as running:
        found = running.ask("Hello.", max_tokens=100_000)
        assert found.choices[0].finish_reason == "length" and found.usage.total_tokens == 40


def test_stops_end_the_answer_and_are_not_part_of_it(server, nano):
    model, processor = nano
    answer = server.text("Hello.")
    assert answer == "i am the mono-internvl nano."
    for stop in ("mono", ["nope", "the mono-int", "am the m"], ".", "i", "x"):
        stops = [stop] if isinstance(stop, str) else stop
        cut = min((answer.index(s) for s in stops if s in answer), default=len(answer))
        found = server.ask("Hello.", stop=stop)
        assert found.choices[0].message.content == answer[:cut]
        assert found.choices[0].finish_reason == "stop"
        pieces = [chunk.choices[0].delta.content or "" for chunk in server.stream("Hello.", stop=stop)]
        assert "".join(pieces) == answer[:cut]
    # It ends there and then, not when the model does.
    assert server.ask("Hello.", stop="am").usage.completion_tokens < server.ask("Hello.").usage.completion_tokens // 2


def test_a_text_is_cut_at_the_first_stop_however_it_comes_in_pieces():
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices("ab\n", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        cut, said, at = StopCut(stops), [], 0
        while at < len(text):
            size = draw.randint(1, 4)
            said.append(cut.put(text[at : at + size]))
            at += size
        said.append(cut.rest())
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert "".join(said) == text[: min(found)[1] if found else None], (text, stops)
        assert cut.found is bool(found)


def test_sampling_is_asked_for_and_a_seed_repeats_it(server, monkeypatch):
    greedy = server.text("Describe a red circle.", max_tokens=24)
    for options in ({"temperature": 0}, {"temperature": 0, "top_p": 0.5}, {"top_p": 1}, {"seed": 5}):
        assert server.text("Describe a red circle.", max_tokens=24, **options) == greedy

    def sampled(**seed):
        return server.text("Describe a red circle.", max_tokens=24, temperature=2, **seed)

    alone = [sampled(seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda seed: sampled(seed=seed), range(8))) == alone
    assert len(set(alone)) > 4
    # A top_p below 1 asks for sampling too.
    question = "What colour is the circle?"
    assert len({server.text(question, max_tokens=24, top_p=0.9999, seed=seed) for seed in range(32)}) > 1
    # A seed of one request does not decide what the next one without any gets: that draws one of its own.
    drawn = []

    def draw(bits):
        assert bits == 63
        return drawn.pop()

    monkeypatch.setattr(answer_line.secrets, "randbits", draw)
    for seed, answer in enumerate(alone):
        sampled(seed=1)
        drawn.append(seed)
        assert sampled() == answer and not drawn


def test_grounding_tags_stay_where_they_are_asked_for(processor):
    """By vLLM's name for it."""
    model = tiny_model(seed=7, text_config={"vocab_size": len(processor.tokenizer)})
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<ref>", "</ref>")]
    # Every second token is one of the tags, whatever the model says.
    steps = itertools.cycle([ids[0], 400, ids[1], 401])

    def force(module, inputs, output):
        output.logits[:] = -100.0
        output.logits[..., next(steps)] = 100.0
        return output

    model.register_forward_hook(force)
    with served(model, processor) as running:
        kept = running.text("Hello.", max_tokens=4, extra_body={"skip_special_tokens": False})
        assert kept.startswith("<ref>") and "</ref>" in kept
        assert running.text("Hello.", max_tokens=4) == kept.replace("<ref>", "").replace("</ref>", "")


def test_detail_low_is_one_tile_each(server, nano):
    model, processor = nano
    images = [picture(4), picture(2)]  # tall and wide: several tiles
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Describe the image."}]
    for details, tiles in (("low", 1), ("auto", None), ("high", None)):
        messages = [user(*(image_part(image, detail=details) for image in images), "Describe the image.")]
        found = server.ask(messages, max_tokens=24)
        assert found.choices[0].message.content == model.chat(
            images, parts, max_tiles=tiles, max_new_tokens=24, processor=processor
        )
        assert (found.usage.prompt_tokens < 200) is (details == "low")


def test_tiles_and_pixels_are_options_of_the_server(nano):
    model, processor = nano
    with served(model, processor, max_tiles=2, max_pixels=100_000) as running:
        image = picture(4)  # 676 x 224
        found = running.ask([user(image_part(image.resize((600, 100))), "Describe the image.")])
        assert found.choices[0].message.content == model.chat(
            [image.resize((600, 100))], "Describe the image.", max_tiles=2, processor=processor
        )
        assert found.usage.prompt_tokens < server_tokens(model, processor, image.resize((600, 100)))
        for pictures in ([image], [image.resize((300, 200)), image.resize((300, 200))]):
            with pytest.raises(openai.BadRequestError, match="100,000"):
                running.ask([user(*map(image_part, pictures), "What?")])


def test_a_request_may_ask_for_fewer_tiles(server, nano):
    """As vLLM's plugin lets it."""
    model, processor = nano
    image = picture(4).resize((300, 100))
    messages = [user(image_part(image), "Describe the image.")]
    counts = []
    for tiles in (1, 3, "auto", None):
        found = server.ask(messages, max_tokens=24, extra_body={"chat_template_kwargs": {"max_tiles": tiles}})
        answer = model.chat([image], "Describe the image.", max_tiles=tiles, max_new_tokens=24, processor=processor)
        assert found.choices[0].message.content == answer
        counts.append(found.usage.prompt_tokens)
    assert counts[0] == counts[2] < counts[1] == counts[3]
    low = [user(image_part(image, detail="low"), "Describe the image.")]
    for asked, message, given in (
        ({"max_tiles": 99}, "max_tiles=99 is more than the 4", messages),
        ({"max_tiles": "many"}, "max_tiles must be a whole number", messages),
        ({"min_tiles": 2}, "only max_tiles, not min_tiles", messages),
        ({"chat_template": "x"}, "'chat_template' is not known; allowed is max_tiles", messages),
        ({"max_tiles": 2}, "give one of them", low),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            server.ask(given, extra_body={"chat_template_kwargs": asked})
        assert message in str(refused.value)


def test_tiles_of_auto_enlarge_nothing(nano):
    model, processor = nano
    image = picture(4).resize((300, 100))
    with served(model, processor, max_tiles="auto") as running:
        found = running.ask([user(image_part(image), "Describe the image.")])
        answer = model.chat([image], "Describe the image.", max_tiles="auto", processor=processor)
        assert found.choices[0].message.content == answer
        assert found.usage.prompt_tokens < server_tokens(model, processor, image)


def test_a_video_is_taken_as_chat_takes_it(server, nano, tmp_path):
    """Its bytes, and what its part says of its frames; never a path that `chat` would read."""
    model, processor = nano
    file = write_video(tmp_path / "bars.mp4", 20)
    url = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
    counts = []
    for more in ({}, {"num_frames": 3}, {"fps": 2.5}):
        part = {"type": "video_url", "video_url": {"url": url}, **more}
        found = server.ask([user(part, "Describe the image.")], max_tokens=24)
        plain = [{"type": "video", "video": str(file), **more}, {"type": "text", "text": "Describe the image."}]
        assert found.choices[0].message.content == model.chat(None, plain, max_new_tokens=24, processor=processor)
        counts.append(found.usage.prompt_tokens)
    assert counts[1] < counts[2] < counts[0]
    for part, message in (
        ({"type": "video", "video": str(file)}, "are off (--allow-local-files"),
        ({"type": "video", "path": str(file)}, "are off (--allow-local-files"),
        ({"type": "video", "video": {"path": str(file)}}, "a video must be a data: or http(s) URL, not dict"),
        ({"type": "video", "video": [str(file)]}, "a video must be a data: or http(s) URL, not list"),
        ({"type": "video_url", "video_url": {"url": "http://127.0.0.1/x.mp4"}}, "is not on the public network"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "is no video that can be read"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            server.ask([user(part, "What?")])
        assert message in str(refused.value)


def server_tokens(model, processor, image) -> int:
    plain = [user({"type": "image", "image": image}, "Describe the image.")]
    (ids,) = processor.apply_chat_template(plain, tokenize=True, add_generation_prompt=True)
    return len(ids)


# ------------------------------------------------------------------------------------------------------------ places


def test_health_and_models(server):
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok", "running": 0, "open": 0}
    (card,) = server.client.models.list().data
    assert (card.id, card.max_model_len) == (NAME, 4096)
    assert server.client.models.retrieve(NAME) == card
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here; this server has 'nano'"):
        server.client.models.retrieve("gpt-4")


def test_a_model_may_be_left_unnamed(server):
    body = {"messages": [{"role": "user", "content": "Hello."}]}
    assert server.post(body).json()["choices"][0]["message"]["content"] == "i am the mono-internvl nano."


def leave_early(address: str, stream: bool) -> socket.socket:
    """A connection that has asked and not yet been answered."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"messages": [{"role": "user", "content": "Hello."}], "stream": stream, "max_tokens": 400})
    connection = socket.create_connection((host, int(port)))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_requests_whose_clients_leave_free_their_places(gated, stream):
    """The one that is answered, at its next token, and those that wait."""
    connections = [leave_early(gated.address, stream) for _ in range(4)]
    gated.wait_until_open(4)
    refused = gated.post({"messages": [{"role": "user", "content": "Hello."}]})
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert "4 requests are open" in refused.json()["error"]["message"]
    for connection in connections:
        connection.close()
    gated.wait_until_open(0)
    gated.gate.open.set()
    assert gated.ask("Hello.", max_tokens=5).usage.completion_tokens == 5
    # Of those four one had begun: it went on for a token or two, not for four hundred.
    assert gated.gate.steps < 12


def test_a_stream_that_is_closed_frees_its_place(gated):
    gated.gate.open.set()
    stream = gated.ask("Hello.", stream=True, max_tokens=450)
    next(iter(stream))
    gated.wait_until_open(1)
    stream.close()
    gated.wait_until_open(0)
    steps = gated.gate.steps
    time.sleep(0.3)
    assert gated.gate.steps <= steps + 1 < 450


def test_the_server_answers_while_a_picture_is_read(server, monkeypatch):
    """Pictures are decoded and tiled where answers are written, not where connections are served."""
    read, module = threading.Event(), image_processing_mono_internvl
    load = module.load_image
    monkeypatch.setattr(module, "load_image", lambda *a, **options: load(*a, **options) if read.wait(30) else None)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.ask, [user(image_part(picture(i)), "What?")], max_tokens=2) for i in range(4)]
        server.wait_until_open(4)
        assert server.client.models.retrieve(NAME).id == NAME
        read.set()
        assert all(one.result().choices[0].finish_reason for one in waiting)


# ---------------------------------------------------------------------------------------------------------- refusals


HELLO = {"role": "user", "content": "Hello."}
BROKEN = [
    ({}, "messages: Field required"),
    ({"messages": []}, "at least 1 item"),
    ({"messages": "Hello."}, "messages: Input should be a valid list"),
    ({"messages": [{"role": "user"}]}, "message 1 (user) has no content"),
    ({"messages": [{"content": "Hello."}]}, "a message is a dict with 'role' and 'content'"),
    ({"messages": [{"role": "queen", "content": "Hello."}, HELLO]}, "role 'queen' is not known"),
    ({"messages": [{"role": "user", "content": " "}]}, "the prompt is empty"),
    ({"messages": [HELLO, {"role": "assistant", "content": "Hi"}]}, "the last message is the assistant's"),
    ({"messages": [{**HELLO, "colour": "red"}]}, "message 1 (user) holds 'colour'"),
    ({"messages": [{**HELLO, "colour": "red"}, HELLO]}, "holds 'colour', which the chat template has no place for"),
    ({"messages": [user({"type": "imag", "image": "x"})]}, "type 'imag' is not known"),
    ({"messages": [user({"type": "audio_url", "audio_url": {"url": "x"}})]}, "type 'audio_url' is not known"),
    ({"messages": [user({"type": "image"})]}, "part 1: a picture must be a data: or http(s) URL, none is given"),
    ({"messages": [user({"type": "image", "image": {"path": str(ROOT / "examples/plate.png")}})]}, "not dict"),
    ({"messages": [user({"type": "image", "image": [str(ROOT / "examples/plate.png")]})]}, "not list"),
    ({"messages": [user({"type": "image", "path": str(ROOT / "examples/plate.png")})]}, "are off (--allow-local-files"),
    ({"messages": [user(image_part(str(ROOT / "examples/plate.png")))]}, "are off (--allow-local-files"),
    ({"messages": [user(image_part((ROOT / "examples/plate.png").as_uri()))]}, "are off (--allow-local-files"),
    ({"messages": [user(image_part("~/plate.png"))]}, "are off (--allow-local-files"),
    ({"messages": [user(image_part("ftp://example.com/plate.png"))]}, "only http, https and data: URLs are read"),
    ({"messages": [user(image_part("http://127.0.0.1:9/x.png"))]}, "is not on the public network"),
    ({"messages": [user(image_part("http://2130706433/x.png"))]}, "is not on the public network"),
    ({"messages": [user(image_part("http://0x7f.1/x.png"))]}, "is not on the public network"),
    ({"messages": [user(image_part("http://[::ffff:127.0.0.1]/x.png"))]}, "is not on the public network"),
    ({"messages": [user(image_part("http://localhost:9/x.png"))]}, "is not on the public network"),
    ({"messages": [user(image_part("http://"))]}, "cannot fetch"),
    ({"messages": [user(image_part("data:image/png;base64,AAAA"))]}, "part 1: the picture is not a picture"),
    ({"messages": [user(image_part("data:image/png;base64,%%"))]}, "no valid base64"),
    ({"messages": [user(image_part("data:image/png"))]}, "no comma"),
    ({"messages": [user(image_part(encoded(noise(80, 80))[:4000]), "What?")]}, "damaged or truncated"),
    ({"messages": [user(image_part(noise(8, 8), detail="medium"), "What?")]}, "detail 'medium' is not known"),
    (
        {"messages": [user(image_part(noise(8, 8), detail="low"), image_part(noise(8, 8)), "What?")]},
        "share their tiles",
    ),
    ({"messages": [user(*[image_part(noise(8, 8))] * 80, "What?")]}, "80 pictures or videos are at least"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, "more than this model's limit of 4096"),
    ({"messages": [HELLO], "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ({"messages": [HELLO], "max_tokens": "many"}, "max_tokens: Input should be a valid integer"),
    ({"messages": [HELLO], "max_tokens": 1, "max_completion_tokens": 2}, "say the same and differ"),
    ({"messages": [HELLO], "temperature": -1}, "temperature: Input should be greater than or equal to 0"),
    ({"messages": [HELLO], "temperature": "hot"}, "temperature: Input should be a valid number"),
    ({"messages": [HELLO], "top_p": 1.5}, "top_p: Input should be less than or equal to 1"),
    ({"messages": [HELLO], "seed": 2**70}, "seed"),
    ({"messages": [HELLO], "stop": ""}, "stop"),
    ({"messages": [HELLO], "stop": ["a", 3]}, "stop"),
    ({"messages": [HELLO], "stream": "yes"}, "stream: Input should be a valid boolean"),
    ({"messages": [HELLO], "stream_options": {"include_usage": True}}, "stream_options are of streamed answers"),
    ({"messages": [HELLO], "stream": True, "stream_options": {"usage": True}}, "unknown option 'usage'"),
    ({"messages": [HELLO], "n": 2}, "n is not supported by this server"),
    ({"messages": [HELLO], "logprobs": True}, "logprobs is not supported"),
    ({"messages": [HELLO], "presence_penalty": 0.5}, "presence_penalty is not supported"),
    ({"messages": [HELLO], "response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"messages": [HELLO], "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
    ({"messages": [HELLO], "temprature": 1}, "unknown option 'temprature' (did you mean 'temperature'?)"),
    ({"messages": [HELLO], "max_tiles": 3}, "unknown option 'max_tiles'"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": [HELLO], "\ud800": 1}, "unknown option"),
    (b"{", "the body is no JSON"),
    (b"\xff", "error parsing the body"),
    (b"[1]", "Input should be a valid dictionary"),
    (b'{"messages": ' + b"[" * 100_000, "error parsing the body"),
    (b'{"messages": [{"role": "user", "content": "Hello."}], "temperature": NaN}', "temperature"),
    (b'{"messages": [{"role": "user", "content": ' + b"[" * 400 + b"]" * 400 + b"}]}", "message 1 (user), part 1"),
    (b"", "Field required"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_request_is_a_400_that_says_why(server, stream):
    for body, message in BROKEN:
        if stream and isinstance(body, dict) and "stream" not in body:
            body = {**body, "stream": True} if "stream_options" not in body else body
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        found = server.post(content)
        assert found.status_code == 400, (body, found.text)
        error = found.json()["error"]
        assert message in error["message"] and error["type"] == "invalid_request_error", (body, error)
        assert "\n" not in error["message"] and len(error["message"]) < 700
    server.wait_until_open(0)
    assert server.text("Hello.") == "i am the mono-internvl nano."


def test_what_asks_for_nothing_is_taken(server):
    nothing = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "stop": None,
        "max_tokens": None,
        "stream_options": None,
    }
    body = {"messages": [HELLO], **nothing}
    assert server.post(body).json()["choices"][0]["message"]["content"] == "i am the mono-internvl nano."
    extra = [{"type": "text", "text": "Hello.", "cache_control": {"type": "ephemeral"}}]
    assert server.text([{"role": "user", "content": extra}]) == "i am the mono-internvl nano."


def test_other_refusals(server):
    where = "/v1/chat/completions"
    for method, path, options, status, message in [
        ("GET", "/v1/chat", {}, 404, "there is no /v1/chat here"),
        ("GET", where, {}, 405, "Method Not Allowed"),
        ("POST", "/load_model", {"json": {}}, 404, "there is no /load_model here"),
        ("POST", where, {"json": {"model": "gpt-4", "messages": [HELLO]}}, 404, "there is no model 'gpt-4' here"),
        ("POST", where, {"content": "{}", "headers": {"content-type": "text/plain"}}, 415, "not text/plain"),
        ("POST", where, {"content": "{}"}, 415, "not of no type"),
        ("GET", "/health", {"headers": {"host": "evil.example:8000"}}, 403, "to localhost only"),
    ]:
        found = httpx.request(method, server.address + path, **options)
        assert (found.status_code, found.json()["error"]["type"]) == (status, "invalid_request_error")
        assert message in found.json()["error"]["message"]
    for host in ("localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000"):
        assert httpx.get(f"{server.address}/health", headers={"host": host}).status_code == 200


def test_a_body_that_is_too_long_is_refused_whether_or_not_it_says_so(nano):
    with served(*nano, sources=PictureSources(MIB)) as running:
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 2 * MIB}]}).encode()
        slices = [body[at : at + 60_000] for at in range(0, len(body), 60_000)]
        for content in (body, iter(slices)):
            found = httpx.post(
                f"{running.address}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
            )
            assert found.status_code == 413
            assert "the body has more than the 1,048,576 bytes" in found.json()["error"]["message"]
        # As much as a body and no more, in pieces that JSON does not know of.
        content = json.dumps({"messages": [HELLO], "user": "x" * (MIB // 2)}).encode()
        found = httpx.post(
            f"{running.address}/v1/chat/completions",
            content=iter([content[at : at + 999] for at in range(0, len(content), 999)]),
            headers={"content-type": "application/json"},
        )
        assert found.status_code == 200, found.text


def test_a_body_that_would_fill_the_memory_is_refused_at_once(server):
    """Small in bytes, large as objects, or long to read."""
    start = time.monotonic()
    for body, status, message in (
        (b'{"messages": [' + b"[]," * 5_000_000 + b"[]]}", 413, "more than 1,000,000 brackets and commas"),
        (b'{"messages": [' + b"1," * 900_000 + b"1]}", 400, "at most 10000 items"),
        (b'{"messages": [' + b"1," * 9_000 + b"1]}", 400, "messages.0: Input should be a valid dictionary"),
        (json.dumps({str(number): 1 for number in range(300_000)}).encode(), 400, "unknown option '0', '1', '2'"),
        (json.dumps({"messages": [HELLO], "x" * 9_000_000: 1}).encode(), 400, "unknown option 'xxx"),
        (json.dumps({"messages": [user("word " * 2_000_000)]}).encode(), 400, "10,000,000 characters, more than"),
        (json.dumps({"messages": [user(image_part("data:," + "%41" * 2_000_000))]}).encode(), 400, "escapes more than"),
    ):
        found = server.post(body)
        said = found.json()["error"]["message"]
        assert found.status_code == status and message in said and len(said) <= 1000, (said, message)
    assert time.monotonic() - start < 60
    assert server.text("Hello.") == "i am the mono-internvl nano."


def test_the_bytes_of_all_open_requests_have_a_limit(gated):
    guard = gated.app.middleware_stack
    while not hasattr(guard, "max_bytes"):
        guard = guard.app
    guard.max_bytes = 10_000
    body = {"messages": [HELLO], "user": "x" * 9_900, "max_tokens": 2}
    guard._held += 155_000  # as many others would
    found = gated.post(body)
    assert (found.status_code, found.headers["retry-after"]) == (503, "1")
    assert "as many bytes as this server takes" in found.json()["error"]["message"]
    guard._held -= 155_000
    gated.gate.open.set()
    assert gated.post(body).status_code == 200
    wait_until_equal(lambda: guard._held, 0)


def test_what_fails_in_the_server_is_said_and_it_lives_on(processor, monkeypatch, caplog):
    model = tiny_model(seed=7, text_config={"vocab_size": len(processor.tokenizer)})
    model.config.image_token_id = model.model.config.image_token_id = processor.image_token_id
    failing = {"with": None, "after": 0}

    def step(module, inputs):
        failing["after"] -= 1
        if failing["with"] is not None and failing["after"] < 0:
            raise failing["with"]

    model.register_forward_pre_hook(step)
    with served(model, processor) as running:
        for error, status, message in (
            (KeyError("secret"), 500, "the server failed at this request (KeyError)"),
            (RuntimeError("secret"), 500, "the server failed at this request (RuntimeError)"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503, "memory of this machine is too small"),
            (MemoryError(), 503, "memory of this machine is too small"),
            (SystemExit(3), 500, "the server failed"),
        ):
            for after in (0, 3):
                failing.update({"with": error, "after": after})
                found = running.post({"messages": [HELLO], "max_tokens": 10})
                assert found.status_code == status, found.text
                assert message in found.json()["error"]["message"] and "secret" not in found.text
        # Once an answer has begun its status is sent: the error is an event.
        failing.update({"with": RuntimeError('a "quoted" reason'), "after": 4})
        with pytest.raises(openai.APIError, match="broke off"):
            running.stream("Hello.", max_tokens=10)
        failing.update({"with": None})
        running.wait_until_open(0)
        assert running.ask("Hello.", max_tokens=10).usage.completion_tokens > 0


# ---------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")),
        *((address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255")),
        *((address, False) for address in ("::", "::1", "fe80::1", "fe80::1%eth0", "fd00::1", "fec0::1", "ff02::1")),
        *((address, False) for address in ("::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::")),
        ("2001:0:0:0:0:0:80ff:fffe", False),  # Teredo of 127.0.0.1
    ],
)
def test_what_is_on_the_public_network(address, public):
    assert is_public(address) is public


class Pictures(http.server.BaseHTTPRequestHandler):
    """/plate.png is one, /to?URL redirects there, /long never ends, /gone is none, /slow says nothing."""

    asked: list = []

    def do_GET(self):
        type(self).asked.append((self.path, self.headers["Host"]))
        path, _, query = self.path.partition("?")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", query)
            self.end_headers()
        elif path == "/plate.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write((ROOT / "examples" / "plate.png").read_bytes())
        elif path == "/noise":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(noise(420, 420, seed=1)))
        elif path == "/long":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(100_000))
        elif path == "/slow":
            time.sleep(3)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving_pictures(context=None):
    """Its port."""
    Pictures.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def pictures():
    with serving_pictures() as port:
        yield f"http://127.0.0.1:{port}"


def read(source, **options) -> bytes:
    return asyncio.run(PictureSources(**{"max_bytes": MIB, **options}).read(source, "message 1 (user), part 1"))


def test_a_private_address_is_asked_only_where_that_is_allowed(pictures):
    with pytest.raises(ValueError, match="message 1 .*part 1: .* is not on the public network"):
        read(f"{pictures}/plate.png")
    assert Pictures.asked == []
    plate = (ROOT / "examples" / "plate.png").read_bytes()
    assert read(f"{pictures}/plate.png", private_network=True) == plate
    assert read(f" {pictures}/to?/plate.png\n", private_network=True) == plate


@pytest.fixture
def this_machine_is_public(monkeypatch):
    """127.0.0.1 stands for the public network, 127.0.0.2 for the private one."""
    monkeypatch.setattr(picture_sources, "is_public", lambda address: address == "127.0.0.1")


def test_a_redirect_leads_nowhere_else(pictures, this_machine_is_public):
    port = pictures.rpartition(":")[2]
    plate = (ROOT / "examples" / "plate.png").read_bytes()
    assert read(f"{pictures}/plate.png") == read(f"{pictures}/to?/plate.png") == plate
    for target, message in (
        (f"http://127.0.0.2:{port}/plate.png", "is not on the public network"),
        (f"http://2130706434:{port}/plate.png", "is not on the public network"),
        ("file:///etc/passwd", "cannot fetch"),
        ("/to?/to?/to?/to?/to?/to?/plate.png", "cannot fetch"),
        ("/gone", "404"),
    ):
        Pictures.asked = []
        with pytest.raises((ValueError, ConnectionError), match=message):
            read(f"{pictures}/to?{target}")
        assert not any(host.startswith("127.0.0.2") for _, host in Pictures.asked)


def test_a_name_is_looked_up_once_and_every_address_counts(pictures, this_machine_is_public, monkeypatch):
    port, real = int(pictures.rpartition(":")[2]), socket.getaddrinfo
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1", "127.0.0.2"], ["127.0.0.1", "::1"], OSError("no")])

    def look_up(host, *arguments, **options):
        if host != "pictures.example":
            return real(host, *arguments, **options)
        found = next(answers)
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    url = f"http://pictures.example:{port}/plate.png"
    assert read(url) == (ROOT / "examples" / "plate.png").read_bytes()
    assert Pictures.asked == [("/plate.png", f"pictures.example:{port}")]
    for _ in range(3):
        with pytest.raises(ValueError, match="is not on the public network"):
            read(url)
    with pytest.raises(ConnectionError, match="no such host"):
        read(url)
    assert len(Pictures.asked) == 1


def test_a_certificate_is_checked_against_the_name(this_machine_is_public, monkeypatch, tmp_path):
    """Though the connection goes to the address that was looked up."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.example"]
    words += ["-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(words, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    real = socket.getaddrinfo

    def look_up(host, *arguments, **options):
        return real("127.0.0.1" if str(host).endswith(".example") else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving_pictures(context) as port:
        found = read(f"https://pictures.example:{port}/plate.png")
        assert found == (ROOT / "examples" / "plate.png").read_bytes()
        for name in ("others.example", "127.0.0.1"):
            with pytest.raises(ConnectionError, match="cannot fetch"):
                read(f"https://{name}:{port}/plate.png")
    assert len(Pictures.asked) == 1


def test_a_picture_that_is_too_long_or_too_slow(pictures, monkeypatch, nano):
    with pytest.raises(ValueError, match="more than the 1,048,576 bytes"):
        read(f"{pictures}/long", private_network=True)
    monkeypatch.setattr("mono_internvl.serving.chat_request._FETCH_SECONDS", 0.5)
    sources = PictureSources(MIB, private_network=True)
    with served(*nano, sources=sources) as running:
        with pytest.raises(openai.BadRequestError, match="did not arrive within"):
            running.ask([user(image_part(f"{pictures}/slow"), "What?")])
        plate = f"{pictures}/plate.png"
        answer = running.text([user(image_part(plate), "How many circles are there?")])
        assert answer == "2"
        big = encoded(noise(420, 420))  # 530 kB each
        with pytest.raises(
            openai.BadRequestError, match="part 3: up to here the pictures have more than the 1,048,576"
        ):
            running.ask([user(image_part(big), image_part(plate), image_part(f"{pictures}/noise"), "What?")])


def test_files_are_read_below_the_folder_that_is_named(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a b.png").write_bytes(b"one")
    (tmp_path / "secret.png").write_bytes(b"two")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inner.png").symlink_to(folder / "a b.png")
    os.mkfifo(folder / "pipe")
    for name in (folder / "a b.png", "a b.png", "./a b.png", (folder / "a b.png").as_uri(), "inner.png"):
        assert read(str(name), folder=folder) == b"one"
    for name in (
        tmp_path / "secret.png",
        "../secret.png",
        "link.png",
        (tmp_path / "secret.png").as_uri(),
        f"{folder.as_uri()}/%2e%2e/secret.png",
        "/etc/passwd",
        "/etc/no-such-file",
    ):
        with pytest.raises(ValueError, match="lies outside of the folder"):
            read(str(name), folder=folder)
    for name in ("none.png", "pipe", ".", ""):
        with pytest.raises(FileNotFoundError, match="no such picture"):
            read(name, folder=folder)
    for name in ("a\0b.png", "x" * 5000):
        with pytest.raises(ValueError, match="is not a usable path"):
            read(name, folder=folder)
    with pytest.raises(ValueError, match="names the host 'elsewhere'"):
        read("file://elsewhere/a.png", folder=folder)
    (folder / "big.png").write_bytes(bytes(MIB + 1))
    with pytest.raises(ValueError, match="more than the 1,048,576 bytes"):
        read("big.png", folder=folder)


# ------------------------------------------------------------------------------------------------------- the command


@contextlib.contextmanager
def command(*arguments):
    """`mono-internvl serve` in a process of its own; yields it and its address."""
    code = "from mono_internvl_cli import main; main()"
    words = [sys.executable, "-c", code, "serve", "--port", "0", "--device", "cpu", "--dtype", "float32", *arguments]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert " at http://" in said, said + process.stderr.read()
        address = said.split()[2]
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(address.replace("/v1", "/health"))
                break
            time.sleep(0.05)
        yield process, address
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to wait for")
def test_the_command_serves_the_nano_and_sigterm_lets_running_answers_finish():
    with command("--max-tiles", "2", "--allow-local-files", str(ROOT / "examples")) as (process, address):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        (card,) = client.models.list().data
        assert card.id == "mono-internvl-nano"
        question = [user(image_part("plate.png"), "How many circles are there?")]
        found = client.chat.completions.create(model=card.id, messages=question)
        assert found.choices[0].message.content == "2"
        long = [{"role": "user", "content": "Describe the image. " * 700}]
        streams = [client.chat.completions.create(model=card.id, messages=long, stream=True) for _ in range(1)]
        with ThreadPoolExecutor(4) as pool:
            waiting = [
                pool.submit(client.chat.completions.create, model=card.id, messages=long, max_tokens=50)
                for _ in range(3)
            ]
            health = address.replace("/v1", "/health")
            wait_until_equal(lambda: httpx.get(health).json()["open"] >= 3, True)
            process.send_signal(signal.SIGTERM)
            answers = [one.result().choices[0] for one in waiting]
        pieces = [chunk.choices[0] for chunk in streams[0]]
        assert pieces[-1].finish_reason in ("stop", "length") and all(one.finish_reason for one in answers)
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(health)
        assert process.stdout.read() == ""


def test_wrong_usage_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in failure("serve", "--port", port)
    assert "no such model folder" in failure("serve", tmp_path / "none")
    assert "is not a folder" in failure("serve", "--allow-local-files", tmp_path / "none")
    assert "cannot listen on" in failure("serve", "--host", "no-such-host.invalid")
    assert "float16" in failure("serve", "--dtype", "float16")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'mono-internvl[serve]'" in failure("serve")
