"""How a picture is cut: grid of tiles, thumbnail, 28-px patches. Numbers and tensors alone; each rule stands here once.

    candidate_grids   the grids that a range of tiles allows, in the released order
    choose_grid       size of a picture -> (cols, rows), the grid of square tiles nearest to its aspect ratio
    auto_tiles        what `max_tiles="auto"` allows a picture: no more tiles than its own pixels fill
    tile_limit        the most tiles that any picture gets under a `max_tiles`
    count_tiles       its tiles, the thumbnail of the whole picture counted
    tokens_per_tile   visual tokens of a tile
    patchify          tiles -> patches; unpatchify: back

Legend: S tile side in pixels (448), p = S // 28 patches along a side, D = 3*28*28 values of a patch.
"""

import functools
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch


PATCH_SIZE = 28
PATCH_DIM = 3 * PATCH_SIZE * PATCH_SIZE

# Names of the options that say how a picture is tiled.
TILE_OPTIONS = ("min_tiles", "max_tiles", "use_thumbnail")
# As `max_tiles`: a picture is never enlarged.
AUTO = "auto"
DEFAULT_MAX_TILES = 12


class AutoTiles(NamedTuple):
    """`max_tiles="auto"` beside the number that it never exceeds; "auto" alone leaves that to whoever reads it."""

    limit: int


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless it is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_max_tiles(value: Any, name: str = "max_tiles") -> None:
    """Raise ValueError unless it is "auto" or a whole number of at least 1."""
    if isinstance(value, AutoTiles) or (isinstance(value, str) and value == AUTO):
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{name} must be "auto" or a whole number of at least 1, got {value!r}')


def tile_limit(max_tiles: Any, otherwise: int = DEFAULT_MAX_TILES) -> int:
    """The most tiles that any picture gets, thumbnail not counted; of "auto" it is `otherwise`, what holds without it.

    Raises:
        ValueError: it is neither "auto" nor a whole number of at least 1.
    """
    check_max_tiles(max_tiles)
    if isinstance(max_tiles, AutoTiles):
        return max_tiles.limit
    return otherwise if max_tiles == AUTO else int(max_tiles)


def auto_tiles(width: int, height: int, tile_size: int) -> int:
    """The tiles that `max_tiles="auto"` allows a picture of this size in pixels: as many as its own pixels fill.

    max(1, round(width * height / tile_size ** 2)), where Python's `round` takes a half to the even neighbour: 2.5 tiles
    are 2, 3.5 are 4.
    """
    return max(1, round(width * height / tile_size**2))


def check_bool(name: str, value: Any) -> None:
    """Raise ValueError unless it is a bool, of Python or numpy."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_tile_size(tile_size: Any, name: str = "tile_size") -> None:
    """Raise ValueError unless it is a positive multiple of 28."""
    check_positive(name, tile_size)
    if tile_size % PATCH_SIZE:
        raise ValueError(f"{name} must be a multiple of {PATCH_SIZE}, got {tile_size}")


def tokens_per_tile(tile_size: int) -> int:
    """Visual tokens of one tile, one a patch: (S // 28) ** 2."""
    return (tile_size // PATCH_SIZE) ** 2


def count_tiles(cols: int, rows: int, use_thumbnail: bool) -> int:
    """Tiles of a picture of this grid: a thumbnail of the whole comes last where there is more than one tile."""
    return cols * rows + int(use_thumbnail and cols * rows > 1)


@functools.lru_cache(maxsize=256)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (cols, rows) with min_tiles <= cols*rows <= max_tiles, ordered by their product.

    Grids of equal product keep the order in which CPython walks a set filled in this very sequence: that is how
    the released model came by its order, and the order decides ties. (Hashes of small-integer tuples are not salted.)
    """
    grids = set()
    for n in range(min_tiles, max_tiles + 1):
        for cols in range(1, n + 1):
            for rows in range(-(-min_tiles // cols), min(n, max_tiles // cols) + 1):
                grids.add((cols, rows))
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(
    width: int,
    height: int,
    *,
    tile_size: int = 448,
    min_tiles: int = 1,
    max_tiles: "int | str | AutoTiles" = DEFAULT_MAX_TILES,
) -> tuple[int, int]:
    """The grid of tiles for a picture: the one whose aspect ratio is nearest to the picture's.

    Args:
        width, height: size of the picture in pixels.
        tile_size: side of a tile in pixels; it matters on exact ties only.
        min_tiles, max_tiles: allowed range of cols * rows, thumbnail not counted. "auto": at most `auto_tiles` of the
            picture, and 12; a picture that has fewer than min_tiles lowers that.

    Returns:
        (cols, rows). On an exact tie the grid with more tiles wins if the picture covers more than half of its area.

    Raises:
        ValueError: a size is not positive, or not 1 <= min_tiles <= max_tiles.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height of a picture must be at least 1 pixel, got {width}x{height}")
    check_positive("tile_size", tile_size)
    check_tile_range(min_tiles, max_tiles)
    high = tile_limit(max_tiles)
    if not isinstance(max_tiles, Integral):
        high = min(high, auto_tiles(width, height, tile_size))
    low = min(int(min_tiles), high)
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in candidate_grids(low, high):
        distance = abs(aspect - cols / rows)
        covers_half = width * height > 0.5 * tile_size * tile_size * cols * rows
        if distance < best_distance or (distance == best_distance and covers_half):
            best, best_distance = (cols, rows), distance
    return best


def check_tile_range(min_tiles: Any, max_tiles: Any) -> None:
    """Raise ValueError unless 1 <= min_tiles <= max_tiles, of which "auto" stands for its limit."""
    check_positive("min_tiles", min_tiles)
    limit = tile_limit(max_tiles)
    if min_tiles > limit:
        raise ValueError(f"min_tiles must not exceed max_tiles, got min_tiles={min_tiles} and max_tiles={limit}")


def patchify(tiles: torch.Tensor) -> torch.Tensor:
    """Cut square tiles into 28-px patches: [N, 3, S, S] -> [N, (S//28)**2, 3*28*28], same dtype and device.

    Patches are row-major; inside a patch the order is (channel, row, column), as a flattened 28x28 convolution kernel.

    Raises:
        ValueError: not [N, 3, S, S], or S is not a positive multiple of 28. N may be 0.
    """
    if tiles.ndim != 4 or tiles.shape[1] != 3 or tiles.shape[2] != tiles.shape[3]:
        raise ValueError(f"tiles must be [N, 3, S, S], got {list(tiles.shape)}")
    n, _, side, _ = tiles.shape
    if side < PATCH_SIZE or side % PATCH_SIZE:
        raise ValueError(f"the side of a tile must be a positive multiple of {PATCH_SIZE} px, got {side}")
    p = side // PATCH_SIZE
    cut = tiles.reshape(n, 3, p, PATCH_SIZE, p, PATCH_SIZE).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(n, p * p, PATCH_DIM)


def unpatchify(patches: torch.Tensor) -> torch.Tensor:
    """Inverse of `patchify`: [N, p*p, 3*28*28] -> [N, 3, p*28, p*28].

    Raises:
        ValueError: the last dimension is not 3*28*28, or the number of patches is no square.
    """
    if patches.ndim != 3 or patches.shape[2] != PATCH_DIM:
        raise ValueError(f"patches must be [N, p*p, {PATCH_DIM}], got {list(patches.shape)}")
    n, count, _ = patches.shape
    p = round(count**0.5)
    if p < 1 or p * p != count:
        raise ValueError(f"a square tile has a square number of patches, got {count}")
    grid = patches.reshape(n, p, p, 3, PATCH_SIZE, PATCH_SIZE).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, 3, p * PATCH_SIZE, p * PATCH_SIZE)
