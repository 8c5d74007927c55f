"""lmms-eval's view of this model, with the paper's prompts; found through the entry point `lmms_eval.models`:

    python -m lmms_eval --model mono_internvl --model_args pretrained=MODEL --tasks chartqa,mmmu_val

Prompts end as the paper's do, answers are greedy with up to 1,024 tokens, whatever a task asks for.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ..cli.common import load_model, resolve_model
from .settings import ask, paper_prompt


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
        if unknown := set(kwargs) - {"max_batch_size"}:
            raise ValueError(f"unknown model_args {', '.join(sorted(unknown))}; allowed are pretrained, device, dtype")
        self.model, self.processor = load_model(resolve_model(pretrained), device=device or "auto", dtype=dtype)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to `requests`, in their order.

        Raises:
            ValueError: a question with a video or sound; give frames as pictures.
        """
        answers = []
        for request in tqdm(requests, desc="Model Responding", disable=self.rank != 0):
            _, doc_to_messages, settings, doc_id, task, split = request.args
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            pictures, videos, sounds = messages.extract_media()
            if videos or sounds:
                raise ValueError(f"{task}, document {doc_id}: only pictures and text are understood; give frames")
            parts = [part for message in messages.messages for part in message.content]
            text = "\n".join(part.text for part in parts if part.type == "text")
            answer = ask(self.model, self.processor, pictures, paper_prompt(text, task), task)
            self.cache_hook.add_partial("generate_until", (request.args[0], settings), answer)
            answers.append(answer)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks that compare likelihoods are not supported; choose a task that generates")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported; choose a task of one round")


def manifest() -> ModelManifest:
    """What lmms-eval's registry asks the entry point for."""
    name = f"{MonoInternVLForLmmsEval.__module__}.{MonoInternVLForLmmsEval.__qualname__}"
    return ModelManifest(model_id="mono_internvl", chat_class_path=name)
