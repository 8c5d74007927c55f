"""One model, one answer at a time: requests stand in a line for the thread that runs `chat`. Knows nothing of HTTP."""

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria

from ..configuration_checks_mono_internvl import context_length
from ..modeling_mono_internvl import MonoInternVLForCausalLM
from ..processing_mono_internvl import MonoInternVLProcessor


class LineFull(Exception):
    """As many requests are open as may be."""


@dataclass(frozen=True)
class Question:
    """What `chat` is asked.

    Attributes:
        parts: content parts of the last turn, pictures as bytes in their places.
        history: the messages before it.
        options: further arguments of `chat`.
        stop: texts before which the answer ends; they are not part of it.
        seed: of the sampling; None draws one.
    """

    parts: list[dict[str, Any]]
    history: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Finished:
    """How an answer ended: tokens of the prompt and of the answer, and whether it was cut off ("length") or not."""

    prompt_tokens: int
    answer_tokens: int
    reason: str


class Answer:
    """A place in the line, and the answer that is written there."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Finished | Exception] = asyncio.Queue()
        self.given_up = threading.Event()
        self.finished: Finished | None = None

    def hand_on(self, event: "str | Finished | Exception") -> None:
        """From the thread that answers."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as it grows, then `finished` is set.

        Raises:
            What `chat` raises.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finished):
                self.finished = event
                return
            yield event


class AnswerLine:
    """Answers questions one after the other, in the order in which they are put.

    Args:
        places: most requests that are open at once; others are refused.
    """

    def __init__(self, model: MonoInternVLForCausalLM, processor: MonoInternVLProcessor, *, places: int):
        self.model, self.processor, self.places = model, processor, places
        self._open: set[Answer] = set()
        self._answering: Answer | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")

    @property
    def running(self) -> int:
        """How many answers are being written: 0 or 1."""
        return int(self._answering is not None)

    @property
    def open(self) -> int:
        """How many requests have a place."""
        return len(self._open)

    @contextlib.contextmanager
    def place(self) -> Iterator[Answer]:
        """A place for one request; leaving the block gives the answer up, finished or not.

        Raises:
            LineFull: there is none.
        """
        if len(self._open) >= self.places:
            raise LineFull(f"{len(self._open)} requests are open, as many as this server takes at once; try again")
        answer = Answer()
        self._open.add(answer)
        try:
            yield answer
        finally:
            answer.given_up.set()
            self._open.discard(answer)

    def ask(self, answer: Answer, question: Question) -> None:
        """Put a question into the line."""
        self._thread.submit(self._run, answer, question)

    def close(self) -> None:
        """Give all answers up and wait for the thread."""
        for answer in list(self._open):
            answer.given_up.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, answer: Answer, question: Question) -> None:
        if answer.given_up.is_set():
            return
        self._answering = answer
        try:
            answer.hand_on(self._answer(answer, question))
        except Exception as error:  # handed to the request that waits for it; the thread goes on
            answer.hand_on(error)
        except BaseException as error:  # raised there it would end the server
            answer.hand_on(RuntimeError(f"the answer ended by {type(error).__name__}"))
        finally:
            self._answering = None

    def _answer(self, answer: Answer, question: Question) -> Finished:
        cut = StopCut(question.stop)
        watch = _Watch(answer, cut, context_length(self.model.config.text_config))

        def hand_on(piece: str) -> None:
            if text := cut.put(piece):
                answer.hand_on(text)

        # A seed of one request must not decide the samples of the next.
        torch.manual_seed(secrets.randbits(63) if question.seed is None else question.seed)
        self.model.chat(
            None,
            question.parts,
            history=question.history,
            streamer=hand_on,
            stopping_criteria=[watch],
            processor=self.processor,
            **question.options,
        )
        if rest := cut.rest():
            answer.hand_on(rest)
        ended = cut.found or watch.last_token in self.model.answer_ends(self.processor)
        return Finished(watch.prompt_tokens, watch.answer_tokens, "stop" if ended else "length")


class StopCut:
    """Cuts a text that comes in pieces before the stop that is complete first; of several that end together, before the
    longest. What may be a stop's beginning is held back.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.found = tuple(stops), "", False

    def put(self, piece: str) -> str:
        """What can be said already."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        self.found = bool(ends)
        if ends:
            _, at = min(ends)
        else:
            at = len(text) - max((_begun(text, stop) for stop in self._stops), default=0)
        text, self._held = text[:at], "" if self.found else text[at:]
        return text

    def rest(self) -> str:
        """What was held back and turned out to be no stop."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)


class _Watch(StoppingCriteria):
    """Counts tokens, and ends an answer that nobody waits for, that met a stop, or that fills the context."""

    def __init__(self, answer: Answer, cut: StopCut, limit: int):
        self._answer, self._cut, self._limit = answer, cut, limit
        self.prompt_tokens = self.answer_tokens = 0
        self._last = torch.tensor(-1)

    @property
    def last_token(self) -> int:
        return int(self._last)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        length = input_ids.shape[1]
        self.prompt_tokens = self.prompt_tokens or length - 1
        self.answer_tokens, self._last = length - self.prompt_tokens, input_ids[0, -1]
        ended = self._answer.given_up.is_set() or self._cut.found or length >= self._limit
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)
