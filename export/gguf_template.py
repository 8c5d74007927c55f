"""The chat template as llama.cpp needs it: pictures are marks in a message's text when the template sees them.

llama.cpp puts a mark, `<__media__>` or one with letters of its own, where a picture of a message was, joins the parts
without a line between them, renders the template, and puts `<img>`, the visual tokens and `</img>` where the marks are.
So the template must not write `<img>` itself, and must end the lines of the marks in front, as in training.
"""

from __future__ import annotations

import logging


logger = logging.getLogger(__name__)

# mtmd's default mark. A server's has letters behind the second underscores, and ends alike.
MEDIA_MARK = "<__media__>"
_PLACEHOLDER = "<img><IMG_CONTEXT></img>"
_PLAIN_TEXT = "{%- set turn.text = message['content'] -%}"
# A mark is what lies between `<__media` and `__>`.
_LINES_OF_MARKS = """{%- set turn.text = '' -%}
        {%- set pieces = message['content'].split('__>') -%}
        {%- for piece in pieces -%}
            {%- set turn.text = turn.text ~ piece ~ ('' if loop.last else '__>') -%}
            {%- set turn.leading = turn.leading and piece.startswith('<__media') -%}
            {%- set next = '\\n' if loop.last else pieces[loop.index] -%}
            {%- if turn.leading and next and not next.startswith('\\n') -%}
                {%- set turn.text = turn.text ~ '\\n' -%}
            {%- endif -%}
        {%- endfor -%}"""


def gguf_template(template: str) -> str:
    """Our template with marks for pictures; another one keeps its own rules for lines, which a warning says.

    Raises:
        ValueError: it writes `<IMG_CONTEXT>` in a way that is not known here, and so would write pictures twice.
    """
    # Of transformers' alone: which tokens are learnt.
    template = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    template = template.replace(_PLACEHOLDER, MEDIA_MARK)
    if "<IMG_CONTEXT>" in template:
        raise ValueError(
            f"the chat template writes <IMG_CONTEXT> other than as {_PLACEHOLDER}: llama.cpp puts pictures there itself"
        )
    if _PLAIN_TEXT not in template:
        logger.warning("the chat template is not the bundled one: pictures in front of a message get no line by it")
        return template
    return template.replace(_PLAIN_TEXT, _LINES_OF_MARKS)
