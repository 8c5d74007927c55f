"""From sources to batches: which samples, in which order, in which pack, on which rank.

The order is a function of (seed, position) alone. A *unit* is a sample, or a pack of samples; unit `n` of the run is
the same whatever the number of processes, and `batch_size` units make an optimiser step. So a run resumes by skipping
units, without reading a picture, and two processes train on what one would.
"""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from ..common.record import Record, picture_sizes
from ..processing_mono_internvl import MonoInternVLProcessor
from ..tiling_mono_internvl import PATCH_DIM
from .data import Collator, Example, PackCollator, encode_conversation
from .records import BadSample
from .sources import Source, reading


logger = logging.getLogger(__name__)

# Samples among which a pack is filled, first-fit decreasing.
BUFFER = 512


class Key(NamedTuple):
    """A sample: which source, which record, and in which pack of the batch it goes."""

    source: int
    record: int
    pack: int = 0


def mixture(sources: Sequence[Source], seed: int) -> Iterator[Key]:
    """An endless order of samples: a source by its share, then its next record; each pass over a source is shuffled.

    A source's share is its `weight`, or else its number of records times `repeat` (weights and numbers do not mix).
    """
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        raise ValueError("data: give a weight to every source or to none")
    shares = np.array([s.weight if s.weight is not None else len(s.records) * s.repeat for s in sources], dtype=float)
    cumulated = np.cumsum(shares / shares.sum())

    def walk(number: int) -> Iterator[int]:
        records = sources[number].records
        for turn in itertools.count():
            if records.ordered:
                yield from range(len(records))
            else:
                yield from np.random.default_rng((seed, number, turn)).permutation(len(records)).tolist()

    walks = [walk(number) for number in range(len(sources))]
    draw = np.random.default_rng(seed)
    while True:
        for point in draw.random(1024):
            number = min(int(np.searchsorted(cumulated, point, side="right")), len(sources) - 1)
            yield Key(number, next(walks[number]))


def one_pass(sources: Sequence[Source], epochs: float, seed: int) -> Iterator[Key]:
    """`epochs` passes: every record `repeat * epochs` times (a fraction: that share of them), shuffled together."""
    keys = []
    for number, source in enumerate(sources):
        times = source.repeat * epochs
        total = round(times * len(source.records))
        for turn in range(-(-total // len(source.records))):
            order = np.random.default_rng((seed, number, turn)).permutation(len(source.records))
            keys += [(turn, number, int(index)) for index in order[: total - turn * len(source.records)]]
    # Passes follow each other; within one, sources are mixed.
    shuffled = np.random.default_rng(seed).permutation(len(keys))
    for place in sorted(shuffled.tolist(), key=lambda place: keys[place][0]):
        yield Key(*keys[place][1:])


def pack_first_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of samples, in packs of at most `size` tokens: the longest first, each into the first pack with room."""
    packs: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        target = next((number for number, left in enumerate(room) if left >= lengths[place]), None)
        if target is None:
            packs.append([])
            room.append(size)
            target = len(packs) - 1
        packs[target].append(place)
        room[target] -= lengths[place]
    return packs


def packed(keys: Iterator[Key], length_of: Callable[[Key], int], size: int, seed: int) -> Iterator[list[Key]]:
    """Units of packs, buffer after buffer; the packs of a buffer come in random order, as FFD sorts them by length."""
    for number in itertools.count():
        buffer = list(itertools.islice(keys, BUFFER))
        if not buffer:
            return
        packs = pack_first_fit_decreasing([min(length_of(key), size) for key in buffer], size)
        for place in np.random.default_rng((seed, number, 7)).permutation(len(packs)).tolist():
            yield [buffer[i] for i in sorted(packs[place])]


class UnitBatches(Sampler[list[Key]]):
    """One rank's micro-batches: `per_rank` units each, of which every key tells its pack.

    Args:
        units: makes the run's units, from the first.
        micro_steps: micro-batches of the run.
        per_rank: units of a micro-batch on one rank.
    """

    def __init__(
        self, units: Callable[[], Iterator[list[Key]]], micro_steps: int, per_rank: int, rank: int, world_size: int
    ):
        self.units, self.micro_steps, self.per_rank = units, micro_steps, per_rank
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.micro_steps

    def __iter__(self) -> Iterator[list[Key]]:
        units = self.units()
        for _ in range(self.micro_steps):
            group = list(itertools.islice(units, self.per_rank * self.world_size))
            mine = group[self.rank * self.per_rank : (self.rank + 1) * self.per_rank]
            yield [key._replace(pack=number) for number, unit in enumerate(mine) for key in unit]


class Conversations(Dataset):
    """Samples by key: read, check, encode. A bad one is an error that names it, or with `skip` the `BadSample` itself.

    Args:
        max_tiles, max_length: of a sample; a record may allow fewer tiles.
        skip_bad: hand bad samples on instead of raising them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: MonoInternVLProcessor,
        *,
        max_tiles: int,
        max_length: int,
        skip_bad: bool = False,
    ):
        self.sources, self.processor = list(sources), processor
        self.max_tiles, self.max_length, self.skip_bad = max_tiles, max_length, skip_bad
        self._lengths: OrderedDict[tuple[int, int], int] = OrderedDict()

    def __getitem__(self, key: Key) -> tuple[Key, Example | BadSample]:
        try:
            return key, self._encode(self._record(key))
        except BadSample as error:
            # From a worker it would come as a long traceback, so the Trainer raises it (`skip_bad` is looked at there).
            if not self.skip_bad and get_worker_info() is None:
                raise
            return key, error

    def length_of(self, key: Key) -> int:
        """Tokens of a sample, without its pixels; 1 for a bad sample, which is met again when it is read."""
        place = (key.source, key.record)
        if place not in self._lengths:
            if len(self._lengths) > 1_000_000:
                self._lengths.popitem(last=False)
            try:
                record = self._record(key)
                self._lengths[place] = self.processor.count_tokens(
                    [{key: message[key] for key in ("role", "content")} for message in record.messages],
                    picture_sizes(record.messages),
                    max_tiles=self._tiles(record),
                )
            except Exception:
                self._lengths[place] = 1
        return self._lengths[place]

    def _record(self, key: Key) -> Record:
        records = self.sources[key.source].records
        with reading(f"{records.name}, record {key.record}"):
            return records[key.record]

    def _tiles(self, record: Record) -> int:
        return self.max_tiles if record.max_tiles is None else min(record.max_tiles, self.max_tiles)

    def _encode(self, record: Record) -> Example:
        with reading(record.where):
            example = encode_conversation(self.processor, record.messages, max_tiles=self._tiles(record))
            length = len(example["input_ids"])
            if length > self.max_length:
                raise ValueError(
                    f"{length} tokens, {example['pixel_values'].shape[0]} tiles; at most {self.max_length} are "
                    "allowed: raise max_length or lower max_tiles"
                )
            if record.finish is not None:
                record.finish(example, self.processor)
        return example


class Batches:
    """Collates keyed samples, in packs, in one row (`padding_free`) or padded; bad ones are left out and counted.

    Args:
        length: packs are padded to so many tokens; None: to the longest of the batch.

    The batch also holds `samples` (int64 [], read) and, where some were bad, `bad` (their messages).
    """

    def __init__(
        self,
        pad_token_id: int,
        patches: int,
        *,
        packing: bool,
        weighting: str,
        padding_free: bool = False,
        length: int | None = None,
    ):
        self.joins, self.one_row = packing or padding_free, padding_free
        self.collate: Any = (
            PackCollator(pad_token_id, weighting, length) if self.joins else Collator(pad_token_id, weighting)
        )
        # Where all samples of a batch are bad, the rank still has to take part in the step.
        self.nothing: Example = {
            "input_ids": torch.full((2,), pad_token_id),
            "labels": torch.full((2,), -100),
            "pixel_values": torch.zeros(0, patches, PATCH_DIM, dtype=torch.uint8),
        }

    def __call__(self, samples: Sequence[tuple[Key, Example | BadSample]]) -> dict[str, Any]:
        good = [(key, example) for key, example in samples if not isinstance(example, BadSample)]
        if self.joins:
            groups = itertools.groupby(good, key=lambda pair: 0 if self.one_row else pair[0].pack)
            packs = [[example for _, example in group] for _, group in groups]
            batch = self.collate(packs or [[self.nothing]])
        else:
            batch = self.collate([example for _, example in good] or [self.nothing])
        batch["samples"] = torch.tensor(len(samples))
        bad = [str(example) for _, example in samples if isinstance(example, BadSample)]
        if bad:
            batch["bad"] = bad
        return batch
