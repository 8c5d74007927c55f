"""A request in the forms that vLLM takes -> the parts and placeholders of this model. Needs no vLLM."""

from typing import Any

from ..processing_mono_internvl import IMAGE_TOKEN


PLACEHOLDER = f"<img>{IMAGE_TOKEN}</img>"


def pictures_then_text(message: Any) -> Any:
    """What the content format "string" means: the pictures, and the texts as lines."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, (list, tuple)):
        return message
    texts: list[Any] = []
    others: list[Any] = []
    for part in content:
        is_text = isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))
        (texts if is_text else others).append(part)
    joined = "\n".join(part if isinstance(part, str) else part["text"] for part in texts)
    return {**message, "content": [*others, *([{"type": "text", "text": joined}] if texts else [])]}


def with_placeholders(prompt: Any) -> Any:
    """A raw prompt whose `<image>` marks are as many as its pictures, with the model's placeholders instead."""
    text, pictures = prompt.get("prompt"), (prompt.get("multi_modal_data") or {}).get("image")
    if not isinstance(text, str) or pictures is None or IMAGE_TOKEN in text:
        return prompt
    several = isinstance(pictures, (list, tuple)) or getattr(pictures, "ndim", 0) == 4
    if text.count("<image>") != (len(pictures) if several else 1):
        return prompt
    return {**prompt, "prompt": text.replace("<image>", PLACEHOLDER)}
