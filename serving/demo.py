"""The demo page: chat with streaming, the tiling and tokens of every picture, and boxes drawn on it.

`answer` and `look` know nothing of the page; `build_page` lays them out with gradio. All of it works offline.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ..common.drawing import draw_boxes
from ..common.tiling import cut, draw_tiling
from ..image_processing_mono_internvl import load_image
from ..modeling_mono_internvl import MonoInternVLForCausalLM, place_images
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tiling_mono_internvl import AUTO, AutoTiles


if TYPE_CHECKING:
    import gradio as gr


_MOST_TILES = 40
_GROUNDING_TAG = re.compile(r"</?(?:ref|box|quad)>")
_STYLE = "footer, #chat button[title='Share'], #chat button[aria-label='Share'] { display: none !important }"


class Conversation(NamedTuple):
    """What the model is given: RGB pictures in order, and (prompt, answer) turns whose prompts are content parts.

    Pictures that no turn has a place for wait for the next question.
    """

    pictures: tuple[Image.Image, ...] = ()
    turns: tuple[tuple[list[dict[str, str]], str], ...] = ()

    @property
    def waiting(self) -> int:
        """How many pictures have not been asked about."""
        return len(self.pictures) - sum(part["type"] == "image" for parts, _ in self.turns for part in parts)


class Sight(NamedTuple):
    """A drawing of each picture's tiling with its caption, and the tokens of the whole prompt."""

    drawings: list[tuple[Image.Image, str]]
    tokens: str


# ---------------------------------------------------------------------------------------------------------- the chat


def add_pictures(
    conversation: Conversation, files: Sequence[str], max_pixels: int | None
) -> tuple[Conversation, list[str]]:
    """The conversation with the pictures of uploaded files, and what is wrong with the others.

    Those are named without their temporary folder: not a picture, damaged or too large.
    """
    pictures, problems = [], []
    for file in files:
        try:
            pictures.append(load_image(file, max_pixels=max_pixels))
        except (ValueError, OSError) as error:
            problems.append(str(error).replace(str(file), Path(file).name))
    return conversation._replace(pictures=(*conversation.pictures, *pictures)), problems


def question(conversation: Conversation, text: str) -> list[dict[str, str]]:
    """The next turn's content parts: the waiting pictures, laid out as `chat` does, and the text as it was typed."""
    *places, last = place_images("", conversation.waiting).split("<image>")
    parts = []
    for before in places:
        parts += [{"type": "text", "text": before}] if before else []
        parts.append({"type": "image"})
    return [*parts, {"type": "text", "text": last + text}]


def answer(
    model: MonoInternVLForCausalLM,
    processor: MonoInternVLProcessor,
    conversation: Conversation,
    prompt: str,
    **options: Any,
) -> Iterator[tuple[str, Conversation]]:
    """Yields the answer as it grows, grounding tags included, each time with the conversation up to there.

    What is typed is text: pictures stand in front of it, and `<image>` in it is a word. Closing the iterator ends the
    generation at its next piece.

    Raises:
        ValueError: what `chat` refuses.
    """
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    closed = threading.Event()
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something")
    parts = question(conversation, prompt)

    def hand_on(piece: str) -> None:
        if closed.is_set():
            raise InterruptedError
        events.put(("piece", piece))

    def generate() -> None:
        try:
            _, turns = model.chat(  # type: ignore[str-unpack]
                list(conversation.pictures),
                parts,
                history=list(conversation.turns),
                return_history=True,
                keep_grounding_tags=True,
                streamer=hand_on,
                processor=processor,
                **options,
            )
            events.put(("turns", turns))
        except BaseException as error:  # handed to the thread that waits for it
            events.put(("error", error))

    threading.Thread(target=generate, daemon=True).start()
    text = ""
    try:
        while True:
            kind, value = events.get()
            if kind == "error":
                raise value
            text = value[-1][1] if kind == "turns" else text + value
            yield text, conversation._replace(turns=(*conversation.turns, (parts, text)))
            if kind == "turns":
                return
    finally:
        closed.set()


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """The turns as messages, every picture in its place."""
    left, messages = iter(conversation.pictures), []
    for parts, given in conversation.turns:
        filled = [{"type": "image", "image": next(left)} if part["type"] == "image" else part for part in parts]
        messages.append({"role": "user", "content": filled})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": given}]})
    return messages


def look(
    processor: MonoInternVLProcessor,
    conversation: Conversation,
    max_tiles: int | str | AutoTiles,
    limit: int | None = None,
) -> Sight:
    """How the pictures are tiled, and what the conversation costs; the pictures share `max_tiles`, as in `chat`."""
    count = len(conversation.pictures)
    share = processor.share_tiles({"max_tiles": max_tiles}, count)
    drawings, visual = [], 0
    for i, picture in enumerate(conversation.pictures, 1):
        tiling, seen = cut(picture, processor.image_processor, **share)
        visual += tiling.visual_tokens
        drawings.append((draw_tiling(f"picture {i}", tiling, seen), f"picture {i}: {tiling.visual_tokens} tokens"))
    (ids,) = processor.apply_chat_template(messages_of(conversation), tokenize=True, max_tiles=max_tiles)
    of, pictures = f" of {limit:,}" if limit else "", f"{count} picture{'s' * (count != 1)}"
    return Sight(drawings, f"**{len(ids):,}{of} tokens**, {visual:,} of them visual, in {pictures}")


def _kept(conversation: Conversation) -> list[str]:
    """What the page says of pictures that wait."""
    count = conversation.waiting
    if not count:
        return []
    return [f"🖼 {count} picture{'s' * (count != 1)} kept for your next question"]


def draw_answer(processor: MonoInternVLProcessor, conversation: Conversation) -> Image.Image | None:
    """The newest picture with the boxes of the last answer, or None where there are none."""
    if not conversation.pictures or not conversation.turns:
        return None
    picture = conversation.pictures[-1]
    boxes = processor.parse_boxes(conversation.turns[-1][1], *picture.size)
    return draw_boxes(picture, boxes) if boxes else None


# ---------------------------------------------------------------------------------------------------------- the page


def build_page(model: MonoInternVLForCausalLM, processor: MonoInternVLProcessor, title: str) -> gr.Blocks:
    """The page for one model; `title` names the model.

    Raises:
        ImportError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the demo page needs gradio: pip install 'mono-internvl[demo]'") from error

    defaults = processor.image_processor
    limit = model.config.text_config.max_position_embeddings

    def respond(
        message: dict[str, Any],
        shown: list[dict[str, Any]],
        conversation: Conversation,
        most_tiles: float,
        auto: bool,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
    ) -> Iterator[dict[Any, Any]]:
        text, files = message.get("text") or "", list(message.get("files") or [])
        sent = [{"role": "user", "content": {"path": file}} for file in files]
        sent += [{"role": "user", "content": text}] if text.strip() else []
        shown = [*shown, *sent]
        max_tiles = AutoTiles(int(most_tiles)) if auto else int(most_tiles)
        options: dict[str, Any] = {"max_tiles": max_tiles, "max_new_tokens": int(max_new_tokens)}
        if temperature > 0:
            options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
        conversation, problems = add_pictures(conversation, files, defaults.max_pixels)
        # Kept from here on, whatever becomes of the question: the page goes on showing them.
        yield {chat: shown, state: conversation, box: gr.MultimodalTextbox(value=None, interactive=False)}
        if problems or not text.strip():
            said = [*(f"⚠️ {problem}" for problem in problems), *_kept(conversation)] or ["⚠️ ask something"]
            reply = {"role": "assistant", "content": "\n\n".join(said)}
            yield {chat: [*shown, reply], box: gr.MultimodalTextbox(value={"text": text}, interactive=True)}
            return
        asked = conversation
        try:
            for written, longer in answer(model, processor, conversation, text, **options):
                reply = {"role": "assistant", "content": _GROUNDING_TAG.sub("", written) or "(no answer)"}
                yield {chat: [*shown, reply], state: longer}
                asked = longer
            seen = look(processor, asked, max_tiles, limit)
            drawn = draw_answer(processor, asked)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch says RuntimeError of full memory
            # The question goes back into its field; for the model it was never asked.
            # Full memory may come without a word.
            reason = str(error) or type(error).__name__
            problem = {"role": "assistant", "content": "\n\n".join([f"⚠️ {reason}", *_kept(conversation)])}
            box_again = gr.MultimodalTextbox(value={"text": text}, interactive=True)
            yield {chat: [*shown, problem], state: conversation, box: box_again}
            return
        yield {
            tokens: seen.tokens,
            tiling: gr.Gallery(value=seen.drawings, visible=bool(seen.drawings), selected_index=len(seen.drawings) - 1),
            boxed: gr.Image(value=drawn, visible=drawn is not None),
            box: gr.MultimodalTextbox(value=None, interactive=True),
        }

    def start_anew() -> dict[Any, Any]:
        return {
            state: Conversation(),
            chat: [],
            tokens: "",
            tiling: gr.Gallery(value=None, visible=False),
            boxed: gr.Image(value=None, visible=False),
            box: gr.MultimodalTextbox(value=None, interactive=True),
        }

    with gr.Blocks(title="Mono-InternVL", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        state = gr.State(Conversation())
        gr.Markdown(f"## Mono-InternVL\n{title}")
        with gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(label="Conversation", height=520, buttons=["copy"], elem_id="chat")
                box = gr.MultimodalTextbox(
                    file_count="multiple",
                    placeholder="Ask something; add or drop pictures, in any turn",
                    show_label=False,
                    elem_id="question",
                )
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop")
                    anew = gr.Button("New conversation", elem_id="anew")
            with gr.Column(scale=2):
                tokens = gr.Markdown(elem_id="tokens")
                tiling = gr.Gallery(
                    label="What the model sees",
                    preview=True,
                    height=440,
                    visible=False,
                    object_fit="contain",
                    buttons=["fullscreen"],
                    elem_id="tiling",
                )
                boxed = gr.Image(label="Boxes of the last answer", visible=False, buttons=[], elem_id="boxes")
                with gr.Accordion("Settings", open=True):
                    most_tiles = gr.Slider(
                        *(1, _MOST_TILES),
                        value=defaults.tile_limit(),
                        step=1,
                        label="Most tiles (shared by all pictures)",
                    )
                    auto = gr.Checkbox(
                        defaults.max_tiles == AUTO, label="auto: no picture is enlarged", elem_id="auto-tiles"
                    )
                    with gr.Row():
                        temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)")
                        top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p")
                    max_new_tokens = gr.Slider(1, 2048, value=1024, step=1, label="Longest answer (tokens)")
        settings = [most_tiles, auto, temperature, top_p, max_new_tokens]
        outputs = [state, chat, tokens, tiling, boxed, box]
        running = box.submit(respond, [box, chat, state, *settings], outputs)
        stop.click(lambda: gr.MultimodalTextbox(value=None, interactive=True), None, box, cancels=running)
        for emptied in (anew.click, chat.clear):
            emptied(start_anew, None, outputs, cancels=running)
    return page


def launch_page(page: gr.Blocks, host: str, port: int) -> str:
    """Serve the page from a thread of its own and return its address; one answer at a time.

    Raises:
        OSError: the port is taken.
    """
    _, address, _ = page.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        css=_STYLE,
    )
    return address
