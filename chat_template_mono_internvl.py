"""Messages -> a rendered prompt, cut by who wrote what.

Text from a user is text. A chat template mixes its own control tokens with what people typed, and a tokenizer cannot
tell them apart in the finished string. So typed text is rendered between marks, and the result is cut at them.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import render_jinja_template

from .prompt_mono_internvl import read_tools
from .vocabulary_mono_internvl import Vocabulary


# Candidates for the marks around typed text: characters without a meaning of their own.
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# A template says by these which of its text is an answer.
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_OPENS, _CLOSES = "mono_internvl_answer_opens", "mono_internvl_answer_closes"


class Segment(NamedTuple):
    """A stretch of a rendered prompt. `origin`: template, user (anyone's typed text) or answer (the assistant's typed
    text). `learnt`: whether the template says that an assistant writes it; None where it says nothing of the kind."""

    text: str
    origin: str
    learnt: bool | None = None


ALWAYS_VARIABLES = ("add_generation_prompt", "continue_final_message", "tools", "documents", "sanitize_control_tokens")


def render(tokenizer: Any, messages: list[dict[str, Any]], source: str, variables: dict[str, Any]) -> str:
    """Render one conversation, which may be empty; it is not changed."""
    # Older transformers write into the messages.
    copies = [dict(message) for message in messages]
    try:
        options = {**tokenizer.special_tokens_map, **variables}
        rendered: Any = render_jinja_template([copies], chat_template=source, **options)[0]
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    return rendered[0]


@functools.lru_cache(maxsize=16)
def _with_answer_marks(source: str) -> str | None:
    """The template with variables in place of `{% generation %}` and its end; None where it has none.

    transformers counts the characters inside instead, in a counter that all threads share before 5.24.
    """

    def marked(tag: re.Match[str]) -> str:
        before, is_end, after = tag.groups()
        if is_end:
            return f"{{%{before} if true %}}{{{{ {_CLOSES} }}}}{{% endif %}}{{% endwith {after}%}}"
        return f"{{%{before} with %}}{{{{ {_OPENS} }}}}{{% if true %}}{{% endif {after}%}}"

    found, count = _GENERATION.subn(marked, source)
    return found if count else None


@functools.lru_cache(maxsize=16)
def template_variables(source: str) -> frozenset[str]:
    """What a template reads of what it is given. One that cannot be parsed is refused where it is rendered."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(_with_answer_marks(source) or source)))
    except jinja2.TemplateError:
        return frozenset(re.findall(r"\w+", source))


@functools.lru_cache(maxsize=256)
def template_reads(source: str, key: str) -> bool:
    """Whether a template may read a key of a message: it is written there outside of comments."""
    return re.search(rf"\b{re.escape(key)}\b", re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)) is not None


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _unused_characters(count: int, texts: Iterable[str]) -> list[str]:
    """Private-use characters that occur in none of the texts."""
    used = set().union(*texts)
    free = (character for code in itertools.chain(*_PRIVATE_USE) if (character := chr(code)) not in used)
    found = list(itertools.islice(free, count))
    if len(found) < count:
        raise ValueError("the messages hold every private-use character there is")
    return found


def _split_at_marks(
    rendered: str, openings: dict[str, str], close: str, learnt: dict[str, bool]
) -> list[Segment] | None:
    """Cut a rendered string at its marks; None where they are not in pairs. Neighbours of one origin become one.

    `learnt`: the marks around what an assistant writes, if the template says so.
    """
    segments: list[Segment] = []
    origin, writes = "template", False if learnt else None
    for piece in re.split(f"([{''.join((*openings, close, *learnt))}])", rendered):
        if piece in openings:
            if origin != "template":
                return None
            origin = openings[piece]
        elif piece == close:
            if origin == "template":
                return None
            origin = "template"
        elif piece in learnt:
            if origin != "template":
                return None
            writes = learnt[piece]
        elif piece and segments and segments[-1][1:] == (origin, writes):
            segments[-1] = Segment(segments[-1].text + piece, origin, writes)
        elif piece:
            segments.append(Segment(piece, origin, writes))
    return segments if origin == "template" else None


def render_by_origin(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    source: str,
    variables: dict[str, Any],
    vocabulary: Vocabulary,
    answer_mask: bool = False,
) -> list[Segment]:
    """Render one conversation and tell what of it was typed, and by whom; with `answer_mask` also what the template
    says that an assistant writes.

    Typed text is rendered between marks. They must not change what the template does, so the result is compared
    with the plain one. White space at the ends, which templates look at and trim, stays outside of the marks; an
    answer's is first tried inside, because it belongs to the answer.
    """
    control = vocabulary.control_pattern
    for message in messages:
        if control.search(message["role"]):
            raise ValueError(f"a message's role holds a control token: {message['role']!r}")
    plain = render(tokenizer, messages, source, variables)
    with_answers = _with_answer_marks(source) if answer_mask else None
    user, assistant, close, opens, closes = _unused_characters(5, [plain, *_strings(messages), *_strings(variables)])
    learnt = {opens: True, closes: False} if with_answers else {}

    mark = functools.partial(_marked, user=user, close=close, control=control)
    content: dict[str, Any] = {
        name: mark(variables[name], user, True) for name in ("tools", "documents") if name in variables
    }
    others = {name: mark(value, user, True, True) for name, value in variables.items() if name not in content}
    if with_answers:
        others.update({_OPENS: opens, _CLOSES: closes})
    for trimmed in (False, True):
        rendered = render(
            tokenizer,
            [mark(message, assistant if message["role"] == "assistant" else user, trimmed) for message in messages],
            with_answers or source,
            {**others, **content},
        )
        segments = _split_at_marks(rendered, {user: "user", assistant: "answer"}, close, learnt)
        if segments is not None and "".join(segment.text for segment in segments) == plain:
            return segments
    raise ValueError(
        "the chat template changes typed text so that its origin cannot be followed; if you trust all of the "
        "messages, render them with tokenize=False and encode the result with processor(text=...)"
    )


def _marked(
    value: Any, opening: str, trimmed: bool, sparing: bool = False, *, user: str, close: str, control: re.Pattern[str]
) -> Any:
    """A value whose strings stand between marks.

    `sparing`: mark only what holds a control token, because the template may compare the others.
    """
    mark = functools.partial(_marked, user=user, close=close, control=control)
    if isinstance(value, str):
        if sparing and not control.search(value):
            return value
        body = value.strip() if trimmed or opening == user else value
        before, _, after = value.partition(body) if body else (value, "", "")
        return f"{before}{opening}{body}{close}{after}" if body else value
    if isinstance(value, (list, tuple)):
        return [mark(item, opening, trimmed, sparing) for item in value]
    if isinstance(value, Mapping):
        return {
            mark(key, user, True, True): mark(
                item, opening, trimmed, sparing or (isinstance(item, str) and key in ("role", "type"))
            )
            for key, item in value.items()
        }
    return value


def template_source(own: str | dict[str, str] | None, chosen: str | None) -> str:
    """The text of the template that is meant: one of the processor's by its name, or `chosen` itself."""
    if isinstance(own, dict):
        if chosen is not None and chosen not in own:
            return chosen
        if (chosen or "default") not in own:
            raise ValueError(f"there are several chat templates; name one of {', '.join(own)} by chat_template")
        return own[chosen or "default"]
    if chosen is None and own is None:
        raise ValueError("this processor has no chat template; give one by chat_template")
    return (own or "") if chosen is None else chosen


def template_extras(source: str, tools: Any, documents: Any) -> dict[str, Any]:
    """Tools and documents as a template gets them.

    Raises:
        ValueError: it would leave them out.
    """
    extras = {"tools": read_tools(tools), "documents": None if documents is None else list(documents) or None}
    for name, value in extras.items():
        if value is not None and name not in template_variables(source):
            raise ValueError(
                f"the chat template has no place for {name}; leave them out, or give a template that has one"
            )
    return {name: value for name, value in extras.items() if value is not None}
