"""Generated ids -> pieces of the answer as it grows, for a caller who does not want to wait."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def ended_on_failure(streamer: Any) -> Iterator[None]:
    """A streamer that somebody waits for is ended where the call fails, too."""
    try:
        yield
    except BaseException:
        if hasattr(streamer, "end"):
            with contextlib.suppress(Exception):
                streamer.end()
        raise


def check_streamer(streamer: Any) -> None:
    """Raise TypeError unless it is something that pieces of an answer, or ids, can be handed to."""
    if streamer is None:
        return
    known = callable(streamer) or all(callable(getattr(streamer, name, None)) for name in ("put", "end"))
    if isinstance(streamer, type) and hasattr(streamer, "end"):
        what = f"the class {streamer.__name__}; make one"
    elif not known:
        what = type(streamer).__name__
    elif inspect.iscoroutinefunction(streamer) or inspect.iscoroutinefunction(type(streamer).__call__):
        what = "a coroutine function, which nobody would await"
    else:
        return
    raise TypeError(f"streamer must be a text streamer or a callable that takes a string, not {what}")


class AnswerStreamer:
    """Turns generated ids into pieces of the answer and hands them to the caller's streamer.

    The pieces are whole characters and, joined, exactly what `chat` returns. `decoder`: a processor's `answer_decoder`.
    """

    def __init__(self, target: Any, decoder: Any):
        self.target, self.pieces = target, decoder.pieces()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self._send(self.pieces.put(value.reshape(-1).tolist()), end=False)

    def end(self) -> None:
        self._send("", end=True)

    def _send(self, piece: str, end: bool) -> None:
        if hasattr(self.target, "on_finalized_text"):
            if piece or end:
                self.target.on_finalized_text(piece, stream_end=end)
        elif piece:
            self.target(piece)
