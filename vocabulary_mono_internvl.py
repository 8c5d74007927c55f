"""What a tokenizer's tokens mean here, and an encoder of the processor's own: safe beside any other use of it.

    vocabulary_of     a tokenizer -> its `Vocabulary`, made once and made anew when tokens are added to it
    Vocabulary        which tokens are control tokens, which are content; plain text -> ids
    AnswerDecoder     ids of an answer -> its text; AnswerPieces does the same as the ids come

A transformers tokenizer keeps truncation, padding and the reading of control tokens in its backend, where each call
sets them for all threads. A `Vocabulary` encodes through a copy of the backend that nobody else can reach.

Three kinds of tokens stand beside the ordinary ones. Control tokens (InternLM2's, those of the turns, a base's own, and
special ones that the chat template writes) are recognised in the template's parts of a prompt only; grounding tags, the
tokens that a user added to the tokenizer, special or not, and those that a base has for its text (`<tool_call>`), are
content and are recognised everywhere. A base's own are control if they are special, or look like it (`<|fim_prefix|>`).
"""

import codecs
import json
import re
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer


IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
# Stands for one learnable query; only the tokenizers of models that have some know it.
QUERY_TOKEN = "<QUERY_CONTEXT>"
GROUNDING_TAGS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
CONTROL_TOKENS = (
    *("<unk>", "<s>", "</s>", "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"),
    *("<|im_end|>", "<|im_start|>", IMAGE_START, IMAGE_END, IMAGE_TOKEN),
)
_NEEDED = (IMAGE_TOKEN, IMAGE_START, IMAGE_END)


class Turns(NamedTuple):
    """How prompts mark turns.

    Attributes:
        needed: tokens that a tokenizer must have for it.
        ends: those that end an answer, as far as a tokenizer has them; the first one closes a turn.
    """

    needed: tuple[str, ...]
    ends: tuple[str, ...]


TURNS = {
    "chatml": Turns(("<|im_start|>", "<|im_end|>"), ("<|im_end|>", "<|im_start|>")),
    "llama3": Turns(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>", "<|start_header_id|>", "<|eom_id|>"),
    ),
}
_TURN_TOKENS = tuple({token: None for turns in TURNS.values() for token in (*turns.needed, *turns.ends)})
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# What conversion fills the gaps between a base's ids with.
_RESERVED = re.compile(r"<\|reserved_\d+\|>")
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^<|>\s]+\|>")

_LOCK = threading.Lock()
# Templates of one tokenizer whose vocabulary is kept.
_TEMPLATES = 32
_made: "weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, Vocabulary]]]" = weakref.WeakKeyDictionary()


def checked_backend(tokenizer: Any, template: str = "") -> Tokenizer:
    """The backend of a transformers tokenizer, if it may be one of Mono-InternVL's beside this chat template.

    Raises:
        ValueError: it is not, or the template marks turns with tokens that it lacks; names them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: use AutoTokenizer or TokenizersBackend")
    absent = [token for token in _NEEDED if backend.token_to_id(token) is None]
    lacks = [absent_tokens(backend, turns) for turns in TURNS.values()]
    if all(lacks):
        absent += lacks[0]
    if absent:
        raise ValueError(f"the tokenizer lacks {', '.join(absent)}: it is not one of Mono-InternVL's")
    for token in _TURN_TOKENS:
        if token in template and backend.token_to_id(token) is None:
            raise ValueError(f"the chat template writes {token}, which the tokenizer lacks: give another template")
    return backend


def absent_tokens(backend: Tokenizer, turns: Turns) -> list[str]:
    """What a tokenizer lacks to mark turns in this way."""
    return [token for token in turns.needed if backend.token_to_id(token) is None]


def turns_of(backend: Tokenizer, template: Collection[str]) -> Turns:
    """How a chat template (its text, or its special tokens) marks turns; else, as the tokenizer can."""
    able = [turns for turns in TURNS.values() if not absent_tokens(backend, turns)]
    return next((turns for turns in able if all(token in template for token in turns.needed)), able[0])


def vocabulary_of(tokenizer: Any, template: str = "") -> "Vocabulary":
    """The vocabulary of a transformers tokenizer as it is now; from any thread, whatever others do with it.

    Args:
        tokenizer: a fast tokenizer.
        template: the source of the chat template; a special token that stands in it is a control token.

    Raises:
        ValueError: as `checked_backend`.
    """
    backend = checked_backend(tokenizer, template)
    added = backend.get_added_tokens_decoder()
    roles = tuple(getattr(tokenizer, role) for role in _ROLES)
    state = (id(backend), roles, frozenset((i, token.content, token.special) for i, token in added.items()))
    with _LOCK:
        known_state, known = _made.get(tokenizer, (None, {}))
        if known_state != state or len(known) > _TEMPLATES:
            known = {}
            _made[tokenizer] = (state, known)
        if template not in known:
            named = frozenset(token.content for token in added.values() if token.special and token.content in template)
            alike = (vocabulary for vocabulary in known.values() if vocabulary.named == named)
            known[template] = next(alike, None) or Vocabulary(backend, added, {role for role in roles if role}, named)
        return known[template]


class Vocabulary:
    """The tokens of one state of a tokenizer, and an encoder for plain text.

    Attributes:
        control, content, fixed: token -> id of the control tokens, of the grounding tags and of both.
        control_pattern, content_pattern, template_pattern: split a text at control tokens, at grounding tags and at
            both, and keep them (the odd places of `split`).
        image_token_id, image_token_ids: of `<IMG_CONTEXT>`; of it, `<img>` and `</img>`.
        query_token_id: of `<QUERY_CONTEXT>`, None where the tokenizer has none.
        visual_ids: all of these, which are never learnt and never cut off.
        end_ids: of the tokens that end an answer; the first one closes a turn.
        size: ids from here on have no token.
    """

    def __init__(self, backend: Tokenizer, added: dict[int, AddedToken], roles: set[str], named: frozenset[str]):
        self.named = named
        known = (*CONTROL_TOKENS, *_TURN_TOKENS, QUERY_TOKEN, *GROUNDING_TAGS)
        ids = {token: i for token in known if (i := backend.token_to_id(token)) is not None}
        # Ours come behind a base's tokens, and a user's behind ours.
        last = max(i for token, i in ids.items() if token in (IMAGE_START, IMAGE_END, IMAGE_TOKEN, *GROUNDING_TAGS))
        self.content = {tag: ids[tag] for tag in GROUNDING_TAGS if tag in ids}
        self.control = {token: i for token, i in ids.items() if token not in self.content}
        for i, token in added.items():
            text = token.content
            fixed = token.special and (i < last or text in named or _RESERVED.fullmatch(text))
            fixed = fixed or (i < last and _LOOKS_LIKE_CONTROL.fullmatch(text))
            if text not in self.content and (fixed or text in roles):
                self.control[text] = i
        self.control_pattern, self.content_pattern = _alternatives(self.control), _alternatives(self.content)
        self.fixed = {**self.control, **self.content}
        self.template_pattern = _alternatives(self.fixed)
        self.image_token_ids = [ids[token] for token in (IMAGE_TOKEN, IMAGE_START, IMAGE_END)]
        self.image_token_id = ids[IMAGE_TOKEN]
        self.query_token_id = ids.get(QUERY_TOKEN)
        self.visual_ids = {*self.image_token_ids, *([] if self.query_token_id is None else [self.query_token_id])}
        self.end_ids = [ids[token] for token in turns_of(backend, named).ends if token in ids]
        self.size = backend.get_vocab_size(with_added_tokens=True)
        self._encoder = self._copy(backend, added)
        self._forged = frozenset(self.control.values()) - {self._encoder.token_to_id("<unk>")}
        self._prepare_decoding(added)

    def _copy(self, backend: Tokenizer, added: dict[int, AddedToken]) -> Tokenizer:
        """The backend with settings of its own. It reads added tokens in a text unless they are marked as special: so
        all that this class takes out of the text itself is marked, and nothing else."""
        fixed = self.fixed
        serialised = backend.to_str()
        if any(token.special != (token.content in fixed) for token in added.values()):
            content = json.loads(serialised)
            for entry in content["added_tokens"]:
                entry["special"] = entry["content"] in fixed
            serialised = json.dumps(content)
        encoder = Tokenizer.from_str(serialised)
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = True
        return encoder

    def encode(self, text: str) -> Encoding:
        """Plain text -> `ids` and `offsets` in characters; nothing in it is a control token.

        Raises:
            ValueError: the text holds half of a character, or its letters alone make a control token.
        """
        try:
            encoding = self._encoder.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            found = re.search("[\ud800-\udfff]", text)
            if found is None:
                raise
            raise ValueError(
                f"the text holds U+{ord(found[0]):04X}, half of a character (a lone surrogate), near "
                f"{text[max(found.start() - 20, 0) : found.start()]!r}"
            ) from error
        if not self._forged.isdisjoint(encoding.ids):
            tokens = [token for token, i in self.control.items() if i in encoding.ids]
            raise ValueError(f"the tokenizer makes the control token {tokens[0]} of plain text; it cannot be used")
        return encoding

    # ---- decoding

    def _prepare_decoding(self, added: dict[int, AddedToken]) -> None:
        names = {i: token.content for i, token in added.items()}
        decoder = self._encoder.decoder
        kind = json.loads(decoder.__getstate__()) if decoder is not None else {}
        kinds = {kind.get("type"), *(part.get("type") for part in kind.get("decoders", ()))}
        self._byte_level = _byte_characters() if "ByteLevel" in kinds else {}
        self._bytes = {i: name.encode() for i, name in names.items()} if self._byte_level else {}
        for value in range(256):
            if (i := self._encoder.token_to_id(f"<0x{value:02X}>")) is not None:
                self._bytes[i] = bytes([value])
        # A decoder may strip the first token of a text; behind another one a token shows all of its own.
        self._before = self._encoder.encode("a", add_special_tokens=False).ids
        self._before_length = len(self._decode(self._before))

    def _decode(self, ids: list[int]) -> str:
        return self._encoder.decode(ids, skip_special_tokens=False)

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for inside of a text, perhaps not whole characters."""
        found = self._bytes.get(token)
        if found is None:
            if self._byte_level:
                piece = self._encoder.id_to_token(token) or ""
                found = b"".join(self._byte_level.get(character, character.encode()) for character in piece)
            else:
                found = self._decode([*self._before, token])[self._before_length :].encode()
            self._bytes[token] = found
        return found


class AnswerDecoder:
    """Ids of an answer -> its text up to a stop token, stripped, without control tokens.

    A character whose bytes have not all come is left out: the text of the first ids is always a beginning of the text
    of all of them.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Iterable[int], *, keep_grounding_tags: bool):
        self.vocabulary, self.stops = vocabulary, frozenset(stops)
        self.dropped = set(vocabulary.control.values())
        if not keep_grounding_tags:
            self.dropped |= set(vocabulary.content.values())

    def __call__(self, ids: Sequence[int]) -> str:
        return self.pieces().put(ids)

    def pieces(self) -> "AnswerPieces":
        """A decoder of one answer for ids that come one after the other."""
        return AnswerPieces(self)


class AnswerPieces:
    """`put(ids)` gives what these ids add to the answer; joined it is what `AnswerDecoder` makes of all of them.

    Each id is looked at once. White space is held back until something follows it.
    """

    def __init__(self, decoder: AnswerDecoder):
        self._decoder = decoder
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[str] | None = None  # None until the answer has begun
        self._stopped = False

    def put(self, ids: Iterable[int]) -> str:
        """The next piece of the answer; may be empty."""
        vocabulary, data = self._decoder.vocabulary, []
        for token in ids:
            self._stopped = self._stopped or token in self._decoder.stops
            if self._stopped:
                break
            # A model may have more rows than the tokenizer has tokens.
            if 0 <= token < vocabulary.size and token not in self._decoder.dropped:
                data.append(vocabulary.bytes_of(token))
        text = self._characters.decode(b"".join(data))
        if self._held is None:
            text = text.lstrip()
            if not text:
                return ""
            self._held = []
        said = text.rstrip()
        if not said:
            self._held.append(text)
            return ""
        piece = "".join((*self._held, said))
        self._held = [text[len(said) :]]
        return piece


def _alternatives(table: dict[str, int]) -> re.Pattern[str]:
    """A pattern that splits text at the table's keys and keeps them (odd places of `split`)."""
    if not table:
        return re.compile(r"((?!))")
    return re.compile("(" + "|".join(re.escape(key) for key in sorted(table, key=len, reverse=True)) + ")")


def _byte_characters() -> dict[str, bytes]:
    """The characters that byte-level vocabularies write bytes with: printable ones as themselves, the others from
    U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    table = {chr(value): bytes([value]) for value in printable}
    return table | {chr(0x100 + place): bytes([value]) for place, value in enumerate(others)}
