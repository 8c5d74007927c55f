"""lmms-eval's view of this model, with the paper's prompts; found through the entry point `lmms_eval.models`:

    python -m lmms_eval --model mono_internvl --model_args pretrained=MODEL --tasks chartqa,mmmu_val

Prompts end as the paper's do, answers are greedy with up to 1,024 tokens, whatever a task asks for.
"""

from __future__ import annotations

import difflib
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ..common.models import load_model, resolve_model
from .settings import Parts, ask, paper_parts


class MonoInternVLForLmmsEval(lmms):
    """Answers a task's questions one by one.

    Args:
        pretrained: folder or Hub id; the bundled nano without it.
        device, dtype: as on this package's command line.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        **kwargs: Any,
    ):
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(f"batch_size={batch_size}: questions are answered one by one; use 1")
        # lmms-eval itself adds this one.
        if unknown := sorted(set(kwargs) - {"max_batch_size"}):
            allowed = ("pretrained", "device", "dtype")
            near = difflib.get_close_matches(unknown[0], allowed, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"unknown model_args {', '.join(unknown)}{hint}; allowed are {', '.join(allowed)}")
        self.model, self.processor = load_model(resolve_model(pretrained), device=device or "auto", dtype=dtype)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to `requests`, in their order.

        Raises:
            ValueError: a question with a video or sound (give frames as pictures), or one that cannot be asked; names
                task and document.
        """
        answers = []
        for request in tqdm(requests, desc="Model Responding", disable=self.rank != 0):
            _, doc_to_messages, settings, doc_id, task, split = request.args
            try:
                messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
                answer = self._answer(messages, task)
            except (ValueError, OSError, TypeError) as error:
                raise ValueError(f"{task}, document {doc_id}: {error}") from error
            self.cache_hook.add_partial("generate_until", (request.args[0], settings), answer)
            answers.append(answer)
        return answers

    def _answer(self, messages: ChatMessages, task: str) -> str:
        """Turns before the last are the conversation's history, with their roles; pictures stay where they are."""
        pictures, videos, sounds = messages.extract_media()
        if videos or sounds:
            raise ValueError("only pictures and text are understood; give frames")
        turns = [(message.role, _parts(message.content)) for message in messages.messages]
        system = None
        if turns and turns[0][0] == "system":
            if any(part["type"] != "text" for part in turns[0][1]):
                raise ValueError("a system message with a picture is not supported")
            system = "\n".join(part["text"] for part in turns.pop(0)[1])
        if not turns or turns[-1][0] != "user":
            raise ValueError("the last message must be the user's question; an answer that is begun is not supported")
        *before, (_, last) = turns
        return ask(
            self.model,
            self.processor,
            pictures,
            paper_parts(last, task),
            task,
            system=system,
            history=[{"role": role, "content": parts} for role, parts in before],
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks that compare likelihoods are not supported; choose a task that generates")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported; choose a task of one round")


def _parts(content: Any) -> Parts:
    return [{"type": "text", "text": part.text} if part.type == "text" else {"type": "image"} for part in content]


def manifest() -> ModelManifest:
    """What lmms-eval's registry asks the entry point for."""
    name = f"{MonoInternVLForLmmsEval.__module__}.{MonoInternVLForLmmsEval.__qualname__}"
    return ModelManifest(model_id="mono_internvl", chat_class_path=name)
