"""The nano model's tokenizer: InternLM2's structure with 768 ids instead of 92,553.

    0 <unk>  1 <s>  2 </s>  3-258 bytes  then the prompt's phrases, "\\n" and the ASCII characters, learned pieces,
    and at the end, in InternLM2's order, the six renamed and the nine added tokens, </box> last

Pieces are learned from words, so none reaches over a word's end, and a digit never joins anything: a number is read
digit by digit. There is no pre-tokenizer at run time; the pieces alone keep words and digits apart. The Chinese
system prompt stands in every conversation, so its phrases are user-defined pieces: 4 ids instead of 150.

    python -m mono_internvl.plates.tokenizer OUT
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from ..tokenization.internlm2 import (
    ADDED_TOKENS,
    BOS_TOKEN,
    EOS_TOKEN,
    RENAMED_PIECES,
    UNK_TOKEN,
    save_tokenizer,
    tokenizer_from_pieces,
)
from ..tokenization.sentencepiece_model import BYTE_PIECES, SPACE, Piece, PieceType
from .layout import sample_plate
from .questions import questions
from .words import COLORS, POSITIONS, SHAPES


logger = logging.getLogger(__name__)

DEFAULT_VOCAB_SIZE = 768
DEFAULT_PLATES = 2000
DEFAULT_SEED = 0
MODEL_MAX_LENGTH = 4096

# The system prompt of internlm2-chat, cut at its punctuation. No phrase holds a space: " " has a piece of its own.
PROMPT_PHRASES: tuple[str, ...] = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，",
    "英文名叫InternVL,",
    "是一个有用无害的人工智能助手。",
)
SYSTEM_PROMPT = f"{PROMPT_PHRASES[0]}{PROMPT_PHRASES[1]} {PROMPT_PHRASES[2]}"

_CHARACTERS = (SPACE, "\n", *(chr(code) for code in range(0x21, 0x7F)))
_WORD_OR_CHARACTER = f"{SPACE}?[A-Za-z]+|[^A-Za-z]"

# Ordinary English about pictures: it fills the vocabulary when the plate world's few words are learned.
_ENGLISH = """
What is in the image? What is in this picture? What can you see in the photo? What do you see here?
Describe the image. Please describe the image shortly. Describe this picture in detail. Give a short description.
Is there a person in the image? Are there any people in the picture? How many people are there? Who is this?
What is the man doing? What is the woman wearing? Where is the dog? Is the cat sitting or standing?
What color is the car? Which color is the background? What colour is it? Is it dark or light? \
Is the background white or gray?
Which object is the largest? Which one is smaller than the other? What is the size of the object? Is it big or small?
What is on the left side of the image? What is on the right? What is at the top? What is at the bottom?
What is in the middle? What is in the center? What is next to the tree? What is behind the house? \
What is in front of the door?
What is above the table? What is below it? What is between the two shapes? Where are they? In which corner is it?
What number is written in the image? Read the text in the image. Which number can you read? Which digits are shown?
What does the sign say? What word is written there? Can you read it? Please read the number and answer with digits only.
How many shapes are there in the image? Count the objects. Count all of them. How many different colors are there?
Answer the question using a single word or phrase. Answer with yes or no. Answer briefly. \
Please answer the following question.
Tell me about this image. Tell me what you see. Explain what happens in this picture. Show me where it is. \
Look at the image.
Please provide the bounding box coordinate of the region this sentence describes:
Where is it located? Find the object and give its position. Locate the shape. Point to it. What position is it in?
Does the image contain a shape? Does it have a number? Do you see any text? Can you find a word? Is there anything else?
The image shows a number on a plain background. The picture shows several shapes. There is one shape in the image.
There are two shapes, three objects and four numbers. There is no number in the image. No, there is not. Yes, there is.
Hello, how are you? I am fine, thank you. What is your name? My name is not known. Who are you? What can you do? \
Can you help me?
I can see it. I do not know. I cannot see that in the image. Sorry, I am not sure. Thanks for your help. \
Good morning. Goodbye.
One two three four five six seven eight nine ten. First, second, third, last. \
Zero, none, many, more, most, less, few, some, all.
Same, different, equal, similar. Big, small, large, little, long, short, tall, wide, narrow, round, flat, thick, \
thin, new, old.
White, gray, pink, brown, cyan, dark, light, bright, plain. Rectangle, oval, line, point, arrow, cross, heart, \
diamond, pentagon.
A photo of a street with cars and a bus, a boy and a girl, a bird in the sky, the sun over the water, a flower in \
the grass.
Food on a plate, a cup on the table, a chair in a room, a book, a phone, a clock, a map, a chart, a page, a window, \
a road.
Is this true? Why is that so? When was it made? Which way does it point? Whose is it? Would you say that it is the same?
The user asks about the picture and the assistant answers. This is the first image and that is the second one. \
Image-1: Image-2: Frame1:
Compare the two images. What is the difference between the first image and the second image? What changed?
Use the words from the picture. Write a sentence about it. Write only the answer. Let us think step by step. \
Please try again.
"""


def builtin_texts() -> Iterator[str]:
    """Sentences that every nano tokenizer is trained on: the plate world's questions and ordinary English."""
    yield from ("What shape is in the image?", "What number is written in the image?", "Describe the image.")
    for shape in SHAPES:
        yield f"What color is the {shape}?"
        yield f"How many {shape}s are there?"
        for color in COLORS:
            yield f"Where is the {color} {shape}?"
            yield f"There is a {color} {shape}."
    for place in POSITIONS:
        yield place
        yield f"in the {place}"
    # an answer begins a line, so its words are needed without a space before them, too
    yield from (word for word in (*SHAPES, *COLORS) for _ in range(2))
    # the roles of a conversation stand in every prompt
    yield from ("system", "user", "assistant") * 10
    yield from _ENGLISH.strip().splitlines()


def plate_world_texts(*, plates: int = DEFAULT_PLATES, seed: int = DEFAULT_SEED) -> Iterator[str]:
    """Questions and answers about `plates` random pictures of the plate world; the pictures are not drawn."""
    rng = random.Random(seed)
    for _ in range(plates):
        # Pillow's own font ("") alone: a number's place must not depend on the fonts of this machine
        plate = sample_plate(rng, fonts=(("",),))
        for qa in questions(plate, rng):
            yield qa.question
            yield qa.answer


def train_nano_tokenizer(texts: Iterable[str], *, vocab_size: int = DEFAULT_VOCAB_SIZE) -> Tokenizer:
    """Learns the pieces from `texts` and the built-in sentences. The same texts give the same tokenizer.

    Args:
        texts: what the model is to read and write; every text once is enough.
        vocab_size: number of ids, special tokens included.

    Raises:
        ValueError: `vocab_size` leaves no room for learned pieces, or the texts do not hold that many.
    """
    fixed = 3 + len(BYTE_PIECES) + len(PROMPT_PHRASES) + len(_CHARACTERS) + len(RENAMED_PIECES) + len(ADDED_TOKENS)
    if vocab_size <= fixed:
        raise ValueError(f"vocab_size is {vocab_size}; it must be above {fixed}, the number of fixed ids")
    # special tokens are cut out of a text before its pieces are formed, so their letters teach nothing
    specials = re.compile("|".join(map(re.escape, (*RENAMED_PIECES.values(), *ADDED_TOKENS))))
    plain = (specials.sub("\n", text) for text in itertools.chain(builtin_texts(), texts))
    learned = _learn_pieces(plain, vocab_size - fixed)
    if len(learned) < vocab_size - fixed:
        raise ValueError(
            f"the texts give {len(learned)} pieces, not the {vocab_size - fixed} that vocab_size={vocab_size} "
            f"asks for; add texts or take vocab_size={fixed + len(learned)}"
        )
    groups = [
        ((UNK_TOKEN,), PieceType.UNKNOWN),
        ((BOS_TOKEN, EOS_TOKEN), PieceType.CONTROL),
        (BYTE_PIECES, PieceType.BYTE),
        (PROMPT_PHRASES, PieceType.USER_DEFINED),
        (_CHARACTERS, PieceType.NORMAL),
        (learned, PieceType.NORMAL),
        (tuple(RENAMED_PIECES), PieceType.USER_DEFINED),
    ]
    rows = [(text, kind) for names, kind in groups for text in names]
    # as in SentencePiece's BPE, a normal piece learned later has a lower score
    pieces = [
        Piece(text, -float(index) if kind == PieceType.NORMAL else 0.0, kind) for index, (text, kind) in enumerate(rows)
    ]
    return tokenizer_from_pieces(pieces)


def _learn_pieces(texts: Iterable[str], count: int) -> tuple[str, ...]:
    """Up to `count` pieces of two characters or more, in the order in which BPE finds them."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD_OR_CHARACTER), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=len(_CHARACTERS) + count,
        min_frequency=1,
        initial_alphabet=list(_CHARACTERS),
        limit_alphabet=len(_CHARACTERS),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return tuple("".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"])


def main(arguments: list[str] | None = None) -> None:
    """Builds the nano's tokenizer from the plate world into a folder."""
    parser = argparse.ArgumentParser(prog="python -m mono_internvl.plates.tokenizer", description=main.__doc__)
    parser.add_argument("folder", metavar="OUT", help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE)
    parser.add_argument("--plates", type=int, default=DEFAULT_PLATES, help="pictures whose questions are read")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    texts = plate_world_texts(plates=options.plates, seed=options.seed)
    try:
        tokenizer = train_nano_tokenizer(texts, vocab_size=options.vocab_size)
    except ValueError as error:
        parser.error(str(error))
    for path in save_tokenizer(tokenizer, options.folder, model_max_length=MODEL_MAX_LENGTH):
        logger.info("%s: %d bytes", path, path.stat().st_size)


if __name__ == "__main__":
    main()
