"""Does llama.cpp answer from an exported file as `chat` does? One script, run in an environment with both.

    python -m mono_internvl.serving.check_llamacpp            # everything
    python -m mono_internvl.serving.check_llamacpp tiles      # one check; see --help for the names

llama.cpp comes as the package xllamacpp, whose server runs in a process of its own and is asked over HTTP. Files are
exported in float32 unless a check says otherwise, and answers are greedy. Every check of answers is also made with a
file whose visual experts are the text ones: those answers must differ, or the check would prove nothing.
"""

import base64
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from PIL import Image

from ..configuration_mono_internvl import MonoInternVLConfig
from ..evaluation.scoring import is_correct
from ..export import GGUF_TYPES, export_gguf
from ..image_processing_mono_internvl import MonoInternVLImageProcessor
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..plates.evaluation_pictures import evaluation_set
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tiling_mono_internvl import choose_grid
from ..vocabulary_mono_internvl import vocabulary_of
from .check_vllm import (
    COST_DECODER,
    NEW_TOKENS,
    RANDOM_DECODER,
    RANDOM_VISION,
    ROOT,
    CheckFailed,
    Request,
    make_folder,
    mixed_requests,
    picture,
    png,
    reference,
    require,
    without_visual_experts,
)


QUESTIONS = 72
# Of answers that must be equal: llama.cpp's GELU is an approximation, and its thumbnail is resized by other code.
SHARE = 0.95
# A random model's next tokens are nearly as likely as one another, and every one of 24 must be the same.
RANDOM_SHARE = 0.85
START_SECONDS = 300


# ---------------------------------------------------------------------------------------------------------- the runtime


def _serve(folder: str, settings: dict[str, Any], exact: bool, to_parent: Any) -> None:
    """In a process of its own: llama.cpp's server, until the parent closes the pipe."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = f"{folder}/model.gguf"
    if (Path(folder) / "mmproj.gguf").is_file():
        parameters.mmproj.path = f"{folder}/mmproj.gguf"
    # More threads than free cores wait for each other by spinning.
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 4096, 1, 1
    parameters.use_jinja = True
    for name, value in settings.items():
        setattr(parameters, name, value)
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    to_parent.send(server.listening_address)
    with suppress(EOFError):
        to_parent.recv()


@dataclass
class Runtime:
    """A running server."""

    address: str
    client: httpx.Client

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.client.post(self.address + path, json=body)
        require(answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:300]}")
        return answer.json()

    def chat(self, request: Request, max_tokens: int = 64) -> str:
        """As any client of OpenAI's asks; stripped, as `chat` strips."""
        body = {"messages": request.for_http(), "temperature": 0, "max_tokens": max_tokens, "cache_prompt": False}
        return str(self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]).strip()

    def prompt(self, request: Request) -> str:
        return str(self.post("/apply-template", {"messages": request.for_http()})["prompt"])

    def tokens(self, request: Request, *, n_predict: int = NEW_TOKENS, cache_prompt: bool = False) -> list[int]:
        """Ids of a greedy answer."""
        pictures = [base64.b64encode(png(image)).decode() for image in request.pictures]
        prompt: Any = self.prompt(request)
        if pictures:
            prompt = {"prompt_string": prompt, "multimodal_data": pictures}
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": cache_prompt}
        return list(self.post("/completion", {**body, "return_tokens": True})["tokens"])

    def encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.post("/tokenize", {"content": text, "add_special": False, "parse_special": special})["tokens"])


@contextmanager
def runtime(folder: Path, *, exact: bool = False, **settings: Any) -> Iterator[Runtime]:
    """llama.cpp with the files of a folder; ends with the block, and a crash of its is a failed check.

    `exact`: the key cache in float32, where llama.cpp's own choice is float16.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(str(folder), settings, exact, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        require(ours.poll(START_SECONDS), f"llama.cpp did not load {folder} within {START_SECONDS} s")
        try:
            address = ours.recv()
        except EOFError as error:
            raise CheckFailed(f"llama.cpp ended while it loaded {folder}") from error
        with httpx.Client(timeout=600) as client:
            try:
                yield Runtime(address, client)
            except httpx.HTTPError as error:
                raise CheckFailed(f"llama.cpp answers no more: {error!r}") from error
    finally:
        ours.close()
        process.join(30)
        process.kill()


# ----------------------------------------------------------------------------------------------------------- questions


@cache
def nano() -> tuple[MonoInternVLForCausalLM, MonoInternVLProcessor]:
    return (
        MonoInternVLForCausalLM.from_pretrained(ROOT, dtype=torch.float32).eval(),
        MonoInternVLProcessor.from_pretrained(ROOT),
    )


def answer(request: Request, **options: Any) -> str:
    """`chat`'s answer of the nano to the last message of a conversation."""
    model, processor = nano()
    *history, last = [
        {**message, "content": [{k: v for k, v in part.items() if k != "image"} for part in message["content"]]}
        for message in request.messages
    ]
    asked = model.chat(request.pictures, last["content"], history=history, processor=processor, **options)
    return str(asked)


def on_grid(image: Image.Image, processor: MonoInternVLImageProcessor) -> Image.Image:
    """The picture at the size of its grid of tiles: llama.cpp cuts it into the same tiles then."""
    side = processor.tile_size
    cols, rows = choose_grid(*image.size, tile_size=side, min_tiles=processor.min_tiles, max_tiles=processor.max_tiles)
    return image.convert("RGB").resize((cols * side, rows * side), Image.Resampling.BICUBIC)


@cache
def questions() -> list[tuple[str, Request, Request, str]]:
    """(category, question about a picture as it was drawn, about it on its grid, `chat`'s answer to the latter)."""
    _, processor = nano()
    found = []
    for image, category, question, _ in evaluation_set(QUESTIONS, seed=1):
        drawn = Request(category).turn(question, image)
        resized = Request(category).turn(question, on_grid(image, processor.image_processor))
        found.append((category, drawn, resized, answer(resized)))
    return found


def truths() -> list[tuple[str, str]]:
    """(category, expected answer) of each question."""
    return [(category, truth) for _, category, _, truth in evaluation_set(QUESTIONS, seed=1)]


def equal(given: list[Any], expected: list[Any]) -> int:
    return sum(a == b for a, b in zip(given, expected, strict=True))


@contextmanager
def exported(source: Path, folders: Path, kind: str = "f32", **options: Any) -> Iterator[Path]:
    """The files of a model; removed with the block."""
    folder = folders / "gguf"
    export_gguf(source, folder, kind, **options)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def with_text_experts(source: Path, folder: Path) -> Path:
    """The model of a folder with its text experts in the place of the visual ones."""
    model = without_visual_experts(MonoInternVLForCausalLM.from_pretrained(source, dtype=torch.float32))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    MonoInternVLProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------------------- checks


def check_tiles(folders: Path) -> str:
    """Questions about pictures, one tile and several, on the same tiles and on the runtime's own."""
    _, processor = nano()
    expected = [text for *_, text in questions()]
    side = processor.image_processor.tile_size
    several = [resized.pictures[0].size != (side, side) for _, _, resized, _ in questions()]
    with exported(ROOT, folders) as folder, runtime(folder) as server:
        same = [server.chat(resized) for _, _, resized, _ in questions()]
        own = [server.chat(drawn) for _, drawn, _, _ in questions()]
    with exported(with_text_experts(ROOT, folders / "text experts"), folders) as folder, runtime(folder) as server:
        wrong = [server.chat(resized) for _, _, resized, _ in questions()]
    drawn_expected = [answer(drawn) for _, drawn, _, _ in questions()]
    for is_several in (False, True):
        pairs = [(a, b) for a, b, s in zip(same, expected, several, strict=True) if s == is_several]
        kind = "several tiles" if is_several else "one tile"
        hits = sum(a == b for a, b in pairs)
        off = [f"{a!r} for {b!r}" for a, b in pairs if a != b]
        require(hits >= SHARE * len(pairs), f"{kind}: {hits} of {len(pairs)} equal chat ({'; '.join(off)})")
    differ = len(expected) - equal(wrong, expected)
    require(2 * differ > len(expected), f"visual experts decide only {differ} of {len(expected)} answers")
    right = {way: correct(given) for way, given in (("chat", drawn_expected), ("on the grid", same), ("own", own))}
    return (
        f"{equal(same, expected)} of {len(expected)} answers equal chat on the same tiles ({sum(several)} pictures "
        f"have several), {equal(own, drawn_expected)} on llama.cpp's own, {differ} differ without visual experts; "
        f"right are {right['chat']} of chat's on the pictures as drawn, of llama.cpp's {right['on the grid']} on the "
        f"grid and {right['own']} on its own tiles"
    )


def correct(given: list[str]) -> int:
    return sum(is_correct(category, truth, text) for (category, truth), text in zip(truths(), given, strict=True))


def check_conversations(folders: Path) -> str:
    """Text alone, several turns, two pictures, a picture in a later turn."""
    _, processor = nano()
    shown = [on_grid(picture(i), processor.image_processor) for i in range(6)]
    asked = [
        Request("text").turn("Hello."),
        Request("text").turn("What shape is in the image?"),
        Request("text turns").turn("a red circle").turn("yes", role="assistant").turn("And a blue star?"),
    ]
    for i, image in enumerate(shown):
        first = Request("one picture").turn("Describe the image.", image)
        asked.append(first)
        later = first.turn(answer(first), role="assistant")
        asked.append(Request("later turn", later.messages, later.pictures).turn("How many circles are there?"))
        asked.append(
            Request("later picture", later.messages, later.pictures).turn(
                "What shape is in the image?", shown[(i + 1) % 6]
            )
        )
        asked.append(Request("two pictures").turn("Describe the image.", image, shown[(i + 2) % 6]))
    # Every picture has tiles of its own there; here pictures share them.
    most = processor.image_processor.max_tiles
    expected = [answer(request, max_tiles=most * max(len(request.pictures), 1)) for request in asked]
    with exported(ROOT, folders) as folder, runtime(folder) as server:
        given = [server.chat(request) for request in asked]
    off = [f"{r.name}: {a!r} for {b!r}" for r, a, b in zip(asked, given, expected, strict=True) if a != b]
    require(len(off) <= (1 - SHARE) * len(asked), f"{len(off)} of {len(asked)} differ from chat: {'; '.join(off)}")
    return f"{len(asked) - len(off)} of {len(asked)} conversations end as chat's do" + "".join(f"; {o}" for o in off)


def random_folder(folder: Path, text: dict[str, Any], table: int | None = None) -> Path:
    """A random model with the nano's tokenizer; `table`: side of the tiles that its position table is for."""
    processor = MonoInternVLProcessor.from_pretrained(ROOT)
    config = MonoInternVLConfig(
        text_config={**RANDOM_DECODER, "vocab_size": len(processor.tokenizer), **text},
        vision_config={**RANDOM_VISION, **({} if table is None else {"image_size": table})},
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    model = MonoInternVLForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    processor.image_processor.tile_size, processor.image_processor.max_tiles = RANDOM_VISION["image_size"], 6
    processor.save_pretrained(folder)
    return folder


_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
# What differs from a decoder of the released kind, whose rope is dynamic with theta 1e6.
LAYOUTS: dict[str, dict[str, Any]] = {
    "biases, tied": {"attention_bias": True, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 64},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **_LLAMA3}},
    "yarn": {"rope_parameters": _YARN},
    "position table": {},
    "qkv experts": {"rope_parameters": _PLAIN, "visual_attention_experts": "qkv"},
    "qkvo experts": {"rope_parameters": _PLAIN, "visual_attention_experts": "qkvo"},
}


def layout_requests(processor: MonoInternVLImageProcessor) -> list[Request]:
    """Mixed requests with pictures at the size of their grid, without control tokens as typed text."""
    found = []
    for request in mixed_requests():
        if len(request.pictures) > 1 or "typed" in str(request.messages) or "Ignore" in str(request.messages):
            continue  # several pictures share tiles in `generate`
        made = Request(request.name)
        for message in request.messages:
            images = [on_grid(part["image"], processor) for part in message["content"] if part["type"] == "image"]
            text = next(part["text"] for part in message["content"] if part["type"] == "text")
            made = made.turn(text, *images, role=message["role"])
        found.append(made)
    return found


def check_layouts(folders: Path) -> str:
    """Random models of every kind that can be held, token by token against `generate`."""
    counts = []
    for name in ("official", *LAYOUTS):
        source = folders / name
        if name == "official":
            make_folder("official", source)
        else:
            random_folder(source, LAYOUTS[name], table=168 if name == "position table" else None)
        requests = layout_requests(MonoInternVLProcessor.from_pretrained(source).image_processor)
        expected = reference(source, requests)
        wrong = reference(source, requests, visual_experts=False)
        # The graph for attention experts takes a prompt's first token from a wrong row unless rows come one by one.
        settings = {"n_ubatch": 1} if "experts" in name else {}
        with exported(source, folders) as folder, runtime(folder, exact=True, **settings) as server:
            given = [server.tokens(request) for request in requests]
        shown = [i for i, request in enumerate(requests) if request.pictures]
        differ = sum(given[i] != wrong[i] for i in shown)
        off = [i for i, (a, b) in enumerate(zip(given, expected, strict=True)) if a != b]
        names = ", ".join(requests[i].name for i in off)
        require(set(off) <= set(shown), f"{name}: of the texts some differ: {names}")
        require(len(off) <= (1 - RANDOM_SHARE) * len(shown), f"{name}: {len(off)} of {len(shown)} differ: {names}")
        require(2 * differ > len(shown), f"{name}: visual experts decide only {differ} of {len(shown)}")
        counts.append(
            f"{name} {len(requests) - len(off)} of {len(requests)} ({differ} of {len(shown)} without visual experts)"
        )
    return "; ".join(counts)


def check_types(folders: Path) -> str:
    """The nano in every type, on the same tiles."""
    expected = [text for *_, text in questions()]
    counts = []
    for kind in GGUF_TYPES[1:]:
        with exported(ROOT, folders, kind) as folder, runtime(folder) as server:
            given = [server.chat(resized) for _, _, resized, _ in questions()]
            size = (folder / "model.gguf").stat().st_size
        if kind in ("f32", "bf16", "q8_0"):
            require(equal(given, expected) >= SHARE * len(given), f"{kind}: {equal(given, expected)} of {len(given)}")
        counts.append(f"{kind} {equal(given, expected)} of {len(given)} ({size / 1e6:.1f} MB)")
    return ", ".join(counts)


def check_tokens(folders: Path, tokenizer: Path | None = None) -> str:
    """Ids of texts and of whole prompts; with a `tokenizer.model`, of a random model with InternLM2's vocabulary."""
    source = ROOT
    if tokenizer is not None:
        source = folders / "internlm2"
        random_folder(source, {"vocab_size": 92553, "num_hidden_layers": 1})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).unlink()
        shutil.copyfile(tokenizer, source / "tokenizer.model")
        config = MonoInternVLConfig.from_pretrained(source, image_token_id=92546)
        config.save_pretrained(source)
    processor = MonoInternVLProcessor.from_pretrained(source)
    vocabulary = vocabulary_of(processor.tokenizer, str(processor.chat_template))
    texts = random_texts(2000) + [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))]
    texts = [text for text in texts if not vocabulary.control_pattern.search(text)]
    prompts = [request for request in layout_requests(processor.image_processor) if not request.pictures]
    with exported(source, folders) as folder, runtime(folder) as server:
        off = [text for text in texts if server.encode(text, special=False) != vocabulary.encode(text).ids]
        for request in prompts:
            ours = processor.apply_chat_template(request.messages, tokenize=True, add_generation_prompt=True)[0][1:]
            require(
                list(ours) == server.encode(server.prompt(request), special=True), f"another prompt: {request.name}"
            )
    require(not off, f"{len(off)} of {len(texts)} texts have other ids, such as {off[0][:60]!r}" if off else "")
    size = sum(len(text.encode()) for text in texts)
    return f"ids of {len(texts)} texts ({size:,} bytes) and {len(prompts)} prompts are equal"


def random_texts(count: int) -> list[str]:
    """Words, symbols of many scripts and any characters at all, but for NUL."""
    draw = random.Random(0)
    common = [*map(chr, range(32, 127)), *"\n\t\r  \u3000\u2581中文字符，。！éüñ😀👩‍👩‍👧αβγ"]
    texts = []
    for i in range(count):
        length = draw.randint(1, 40)
        if i % 3:
            texts.append("".join(draw.choice(common) for _ in range(length)))
        else:
            texts.append(
                "".join(
                    chr(draw.choice([draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)]))
                    for _ in range(length)
                )
            )
    return texts


def check_cost(folders: Path) -> str:
    """How visual attention experts get a right first token, and what it costs: rows one by one, or a prompt that is
    read before it is asked. Prompts of pictures, 512 channels wide."""
    found = []
    for name, changed in (("v1", {}), ("qkvo", LAYOUTS["qkvo experts"])):
        source = random_folder(folders / name, {**COST_DECODER, **changed})
        requests = [
            request
            for request in layout_requests(MonoInternVLProcessor.from_pretrained(source).image_processor)
            if request.pictures
        ]
        expected = [tokens[0] for tokens in reference(source, requests)]
        ways = {"n_ubatch 512": (512, False), "n_ubatch 1": (1, False), "n_ubatch 512, read before": (512, True)}
        with exported(source, folders) as folder:
            for way, (rows, read_before) in ways.items():
                with runtime(folder, exact=True, n_ubatch=rows) as server:
                    start, given = time.perf_counter(), []
                    for request in requests:
                        if read_before:
                            server.tokens(request, n_predict=0, cache_prompt=True)
                        given.append(server.tokens(request, n_predict=1, cache_prompt=read_before)[0])
                    seconds = time.perf_counter() - start
                right = equal(given, expected)
                require(
                    (right >= RANDOM_SHARE * len(given)) == (name == "v1" or way != "n_ubatch 512"),
                    f"{name}, {way}: {right} of {len(given)} first tokens are right",
                )
                found.append(f"{name}, {way}: {right} of {len(given)} first tokens right, {seconds:.1f} s")
    return "; ".join(found)


# ---------------------------------------------------------------------------------------------------------------- main


CHECKS: dict[str, Callable[[Path], str]] = {
    "tiles": check_tiles,
    "conversations": check_conversations,
    "tokens": check_tokens,
    "layouts": check_layouts,
    "types": check_types,
    "cost": check_cost,
}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    checks: Annotated[list[str] | None, typer.Argument(help=", ".join(CHECKS))] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="InternLM2's tokenizer.model, for `tokens`")] = None,
) -> None:
    """Check that llama.cpp answers from exported files as `chat` does."""
    unknown = [name for name in checks or [] if name not in CHECKS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} not known; allowed are {', '.join(CHECKS)}")
    failed = False
    for name in checks or CHECKS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folders:
            try:
                if name == "tokens":
                    verdict = f"ok      {name}: {check_tokens(Path(folders), tokenizer)}"
                else:
                    verdict = f"ok      {name}: {CHECKS[name](Path(folders))}"
            except CheckFailed as error:
                failed, verdict = True, f"FAILED  {name}: {error}"
        typer.echo(f"{verdict} [{time.monotonic() - start:.0f} s]")
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    app()
