"""Pixels -> visual tokens: a linear embedding of patches and a projector, all there is in place of a vision encoder.

Shapes: s = 28 px side of a visual token, P tokens of a tile, p = 14 px side of a small patch, C its channels, H hidden.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_mono_internvl import MonoInternVLConfig, MonoInternVLVisionConfig
from .image_processing_mono_internvl import patchify


def as_patches(pixel_values: torch.Tensor) -> torch.Tensor:
    """Tiles [tiles, 3, side, side] or their patches -> patches [tiles, P, 3*s*s].

    Raises:
        ValueError: neither of them.
    """
    if pixel_values.dim() == 4:
        return patchify(pixel_values)
    if pixel_values.dim() != 3:
        raise ValueError(
            f"pixel_values must be [tiles, patches, 3*28*28] or [tiles, 3, side, side], got {tuple(pixel_values.shape)}"
        )
    return pixel_values


class MonoInternVLPatchEmbedding(nn.Conv2d):
    """A convolution that sees one small patch at a time, [n, 3, p, p] -> [n, C, 1, 1], and so is one matrix product.

    It stays a convolution to those who wrap it: adapters and offloading hooks put theirs around the module's call.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        patches = patches.to(self.weight.dtype)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class MonoInternVLVisionEmbeddings(nn.Module):
    """Pixels -> one vector per visual token: linear 14-px patches, learned positions, 2 x 2 neighbours concatenated.

    The order of the four neighbours is (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1) (upstream's pixel shuffle "v2").
    """

    class_embedding: torch.Tensor
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, config: MonoInternVLVisionConfig):
        super().__init__()
        self.config = config
        self.token_size = config.token_size
        self.side = config.image_size // config.patch_size
        self.patch_embedding = MonoInternVLPatchEmbedding(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        # Row 0 belongs to the class token, which nothing uses; both are kept for a lossless round trip.
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + self.side**2, config.hidden_size))
        self.register_buffer("class_embedding", torch.zeros(1, 1, config.hidden_size))
        # float32 also where the model is made in bfloat16.
        self.register_buffer("pixel_mean", torch.tensor(config.image_mean, dtype=torch.float32), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.image_std, dtype=torch.float32), persistent=False)

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """uint8 [tiles, P, 3*s*s] -> float32, scaled to 0..1 and normalised per channel, on the device it is on."""
        tiles, patches, width = pixel_values.shape
        x = pixel_values.float().div(255).view(tiles, patches, 3, width // 3)
        x = (x - self.pixel_mean.float().view(3, 1)) / self.pixel_std.float().view(3, 1)
        return x.view(tiles, patches, width)

    def positions(self, side: int) -> torch.Tensor:
        """Position rows [side * side, C]; bicubic in float32 when the tile has another size than the table's."""
        table = self.position_embedding[0, 1:]
        if side == self.side:
            return table
        grid = table.float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[tiles, P, 3*s*s], s = 28 -> [tiles, P, 4 * C].

        Raises:
            ValueError: the patches are not s x s pixels, or P is not a square number.
        """
        tiles, patches, width = pixel_values.shape
        side, s, p = round(patches**0.5), self.token_size, self.config.patch_size
        if width != 3 * s * s or side * side != patches or side == 0:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} do not fit: expected [tiles, patches, {3 * s * s}] "
                f"with a square number of patches (patches are {s} x {s} px)"
            )
        if not pixel_values.is_floating_point():
            pixel_values = self.normalize(pixel_values)
        # [.., 3, (2 p), (2 p)] -> four small patches of [3, p, p] in pixel-shuffle order, then one matrix product.
        x = pixel_values.view(tiles, patches, 3, 2, p, 2, p).permute(0, 1, 3, 5, 2, 4, 6)
        x = self.patch_embedding(x.reshape(tiles * patches * 4, 3, p, p)).view(
            tiles, patches, 4, self.config.hidden_size
        )
        positions = self.positions(2 * side).view(side, 2, side, 2, -1).transpose(1, 2).reshape(patches, 4, -1)
        return (x + positions).view(tiles, patches, 4 * x.shape[-1])


class MonoInternVLMultiModalProjector(nn.Module):
    """[.., 4 * C] -> [.., H]: LayerNorm, linear, exact GELU, linear."""

    def __init__(self, config: MonoInternVLConfig):
        super().__init__()
        width, hidden = 4 * config.vision_config.hidden_size, config.text_config.hidden_size
        self.layer_norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.layer_norm(x))))
