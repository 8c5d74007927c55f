"""Distillation of a vision tower into learnable queries (BREEN, arXiv 2503.12446): a loss of training alone.

For each block of queries and the picture that it stands for

    t_g = W LayerNorm(average-pool_g(patch features of the teacher))      a grid g of the queries, [g * g, H]
    L   = sum over the grids of 1 - mean cosine(h_g, t_g)

h are the last hidden states one position before each query, as those that predict a token stand one before it. The
teacher sees the whole picture squeezed into a square: the thumbnail, or the only tile. It is any vision tower that
transformers loads, in float32 (CLIP overflows in less), and never a part of the model or of its checkpoints.
"""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from ..common.files import read_json
from ..common.models import HUB_ID
from ..configuration_mono_internvl import MonoInternVLConfig
from ..image_processing_mono_internvl import unpatchify


PROJECTIONS = ("random", "trained")
# Of a checkpoint, beside the model's own files: a trained projection, and what the queries learnt from.
FILE, RECORD = "distillation.safetensors", "distillation.json"


@dataclass(frozen=True)
class Distillation:
    """A recipe's `distillation`.

    Args:
        teacher: folder or Hub id of a model with a vision tower (CLIP, SigLIP, DINOv2 and the like).
        weight: of the loss, beside 1 for the cross-entropy.
        projection: W stays as it was drawn (`random`, as in the released code, which freezes it) or is trained.
        seed: W is drawn from it.
    """

    teacher: str
    weight: float = 1.0
    projection: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, str) or not self.teacher:
            raise ValueError(f"distillation: teacher={self.teacher!r} must be a folder or a Hub id")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 < self.weight < 1e6:
            raise ValueError(f"distillation: weight={self.weight!r} must be a positive number")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"distillation: seed={self.seed!r} must be an integer that is not negative")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"distillation: projection={self.projection!r} must be one of {', '.join(PROJECTIONS)}")


class Block(NamedTuple):
    """A block of queries: its row and first position, and the tile that shows its picture whole."""

    row: int
    first: int
    tile: int


def find_blocks(input_ids: torch.Tensor, config: MonoInternVLConfig) -> Iterator[Block]:
    """The blocks of a batch, int64 [B, T], that stand for one picture; those behind several have no target.

    A picture is an unbroken run of placeholders, whose last tile is its thumbnail or its only one. A block stands for
    the pictures between it and the block before it in its row.
    """
    per_tile, tiles = config.vision_config.tokens_per_tile, 0
    for row, ids in enumerate(input_ids.tolist()):
        place, pictures = 0, []
        for token, run in itertools.groupby(ids):
            length = len(list(run))
            if token == config.image_token_id:
                tiles += length // per_tile
                pictures.append(tiles - 1)
            elif token == config.query_token_id:
                # Neighbouring blocks make one run; those behind the first have no picture of their own.
                if len(pictures) == 1:
                    yield Block(row, place, pictures[0])
                pictures = []
            place += length


def find_teacher(name: str) -> str:
    """A teacher's folder, or its Hub id.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if HUB_ID.fullmatch(name) is None:
        raise ValueError(f"the teacher {name} cannot be loaded: no such folder (a Hub id looks like owner/name)")
    return name


class Teacher:
    """A frozen vision tower: tiles of ours -> its patch features as a grid.

    Raises:
        ValueError: it cannot be loaded, is no vision tower of patches, or its folder lacks weights that its features
            depend on; named.
    """

    def __init__(self, name: str, device: torch.device):
        name = find_teacher(name)
        try:
            AutoConfig.from_pretrained(name)
            settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
            model, info = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # on damaged files json, safetensors and transformers raise nearly anything
            raise ValueError(f"the teacher {name} cannot be loaded: {' '.join(str(error).split())}") from error
        self.tower: Any = getattr(model, "vision_model", model).to(device).eval().requires_grad_(False)
        config = getattr(self.tower.config, "vision_config", self.tower.config)
        absent = [
            key
            for key in ("image_size", "patch_size", "hidden_size")
            if not isinstance(getattr(config, key, None), int)
        ]
        absent += [key for key in ("image_mean", "image_std") if not _is_color(settings.get(key))]
        if absent:
            raise ValueError(f"the teacher {name} is no vision tower of patches: it does not say {', '.join(absent)}")
        self.size, self.width = config.image_size, config.hidden_size
        self.side = config.image_size // config.patch_size
        self.mean = torch.tensor(settings["image_mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(settings["image_std"], device=device).view(3, 1, 1)
        drawn = {key: parameter for key, parameter in model.named_parameters() if key in info["missing_keys"]}
        self._try(name, drawn)
        left_out = {id(parameter) for parameter in drawn.values()}
        self._given = [parameter for parameter in self.tower.parameters() if id(parameter) not in left_out]

    @cached_property
    def digest(self) -> str:
        """sha256 of the tower's weights, less those that its folder lacked: every process draws them otherwise."""
        found = hashlib.sha256()
        for parameter in self._given:
            values: Any = parameter.detach().cpu().reshape(-1).numpy()
            found.update(values)
        return found.hexdigest()

    def _try(self, name: str, drawn: Mapping[str, nn.Parameter]) -> None:
        """Look at one picture, before a run finds out; `drawn`: weights that the folder lacks, as it may those of a
        pooler, which the features do not depend on."""
        for parameter in drawn.values():
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                features = self._features(torch.zeros(1, 3, self.size, self.size, device=self.mean.device))
        except Exception as error:  # whatever another's forward raises of pictures
            raise ValueError(
                f"the teacher {name} gives no {self.side} x {self.side} patch features of a picture of {self.size} px: "
                f"{' '.join(str(error).split())}"
            ) from error
        if features.shape[1] != self.width:
            raise ValueError(f"the teacher {name} says hidden_size {self.width} and gives {features.shape[1]} channels")
        if features.requires_grad:
            gradients = torch.autograd.grad(features.sum(), list(drawn.values()), allow_unused=True)
            lacking = [key for key, gradient in zip(drawn, gradients, strict=True) if gradient is not None]
            raise ValueError(f"the teacher {name} lacks {len(lacking)} of its weights: {', '.join(lacking)}")
        for parameter in drawn.values():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [n, 3, S, S] in 0..1 -> [n, C, side, side]; class and register tokens are left out."""
        return self._features(pictures)

    def _features(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(pictures, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast(pictures.device.type, enabled=False):
            features = self.tower(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        patches = features[:, -(self.side**2) :]
        return patches.transpose(1, 2).unflatten(2, (self.side, self.side)).float()


class Projection(nn.Module):
    """Pooled features [n, C, side, side] -> targets [n, g * g, H] of a grid."""

    def __init__(self, width: int, hidden_size: int, seed: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, hidden_size, bias=False)
        weight = torch.empty(hidden_size, width).normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        self.linear.weight = nn.Parameter(weight)

    def forward(self, features: torch.Tensor, side: int) -> torch.Tensor:
        pooled = F.adaptive_avg_pool2d(features, side).flatten(2).transpose(1, 2)
        return self.linear(self.norm(pooled))


class Distiller:
    """The loss of a stage that distils; `loss` is asked once a micro-batch, after the model's forward."""

    def __init__(self, options: Distillation, config: MonoInternVLConfig, device: torch.device):
        if not config.num_learnable_queries:
            raise ValueError("distillation: the model has no learnable queries to learn from the teacher")
        self.options, self.config = options, config
        self.teacher = Teacher(options.teacher, device)
        smallest = max(config.query_grids)
        if self.teacher.side < smallest:
            raise ValueError(
                f"distillation: the teacher's {self.teacher.side} x {self.teacher.side} patches are fewer than the "
                f"{smallest} x {smallest} queries of the finest grid"
            )
        self.projection = Projection(self.teacher.width, config.text_config.hidden_size, options.seed).to(device)
        self.projection.requires_grad_(options.projection == "trained")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains beside the model."""
        return [parameter for parameter in self.projection.parameters() if parameter.requires_grad]

    def count(self, input_ids: torch.Tensor) -> int:
        return sum(1 for _ in find_blocks(input_ids, self.config))

    def loss(self, hidden: torch.Tensor, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Sum over the blocks of their L, float32 [].

        Args:
            hidden: [B, T, H], of the last layer. input_ids: int64 [B, T].
            pixel_values: [tiles, P, 3*s*s], uint8, or float and normalised as the model's configuration says.
        """
        blocks = list(find_blocks(input_ids, self.config))
        if not blocks:
            return hidden.sum() * 0.0
        features = self.teacher(self._pictures(pixel_values[[block.tile for block in blocks]]))
        total, first = hidden.new_zeros((), dtype=torch.float32), 0
        for side in self.config.query_grids:
            places = torch.arange(first - 1, first - 1 + side * side, device=hidden.device)
            states = torch.stack([hidden[block.row, block.first + places] for block in blocks]).float()
            targets = self.projection(features, side)
            total = total + (1 - F.cosine_similarity(states, targets, dim=-1).mean(-1)).sum()
            first += side * side
        return total

    def _pictures(self, patches: torch.Tensor) -> torch.Tensor:
        """[n, P, 3*s*s] -> float32 [n, 3, S, S] in 0..1."""
        vision = self.config.vision_config
        tiles = unpatchify(patches)
        if not patches.is_floating_point():
            return tiles.float() / 255
        mean, std = (torch.tensor(x, device=tiles.device).view(3, 1, 1) for x in (vision.image_mean, vision.image_std))
        return tiles.float() * std + mean

    # ---- checkpoints

    @property
    def record(self) -> dict[str, Any]:
        """What a run that goes on has to find as it was, or its queries would turn to other targets half-way."""
        options = self.options
        return {
            "teacher": options.teacher,
            "teacher_sha256": self.teacher.digest,
            "projection": options.projection,
            "seed": options.seed,
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Write what trains beside the model into a checkpoint's folder."""
        if self.parameters:
            tensors = {
                name: tensor.detach().cpu().contiguous() for name, tensor in self.projection.state_dict().items()
            }
            save_file(tensors, Path(folder) / FILE)

    def load(self, folder: str | os.PathLike) -> None:
        """Read back what trains beside the model."""
        if self.parameters:
            self.projection.load_state_dict(load_file(Path(folder) / FILE))


def check_same_targets(distiller: Distiller | None, checkpoint: Path) -> None:
    """A run goes on with the targets that it had: the same teacher, wherever it lies, and the same projection.

    Raises:
        ValueError: it would not; what is another.
    """
    path = checkpoint / RECORD
    was = read_json(path) if path.is_file() else {}
    now = {} if distiller is None else distiller.record
    other = None
    if not was and now:
        other = "no distillation"
    elif was and not now:
        other = f"distillation from {was['teacher']}, and the recipe has none"
    elif was and was["teacher_sha256"] != now["teacher_sha256"]:
        other = f"another teacher: {was['teacher']} had other weights than {now['teacher']}"
    elif was:
        changed = [f"{key} {was[key]}, not {now[key]}" for key in ("projection", "seed") if was[key] != now[key]]
        other = " and ".join(changed)
    if other:
        raise ValueError(
            f"distillation: {checkpoint} is of a run with {other}: go on with the recipe as it was, or remove the "
            "folder"
        )


def read_distillation(values: Mapping[str, Any]) -> Distillation:
    """A recipe's mapping.

    Raises:
        ValueError: an unknown key, or a value that is not allowed.
    """
    known = list(Distillation.__dataclass_fields__)
    unknown = [key for key in values if key not in known]
    if unknown or "teacher" not in values:
        what = f"unknown {', '.join(unknown)}" if unknown else "teacher is missing"
        raise ValueError(f"distillation: {what}; it knows {', '.join(known)}")
    values = dict(values)
    if isinstance(values.get("weight"), str):
        # YAML reads 1e-1 as a string.
        with contextlib.suppress(ValueError):
            values["weight"] = float(values["weight"])
    return Distillation(**values)


def _is_color(value: Any) -> bool:
    """Whether it is three numbers, one a channel."""
    return isinstance(value, (list, tuple)) and [isinstance(one, (int, float)) for one in value] == [True] * 3
