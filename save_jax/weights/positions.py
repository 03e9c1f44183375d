"""Tables of learned positions for another grid of patches, as the originals fit them."""

from collections.abc import Callable

import numpy as np

CUBIC = -0.75  # PyTorch's constant of bicubic interpolation; others use -0.5


def _linear(offset: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(offset), 0)


def _cubic(offset: np.ndarray) -> np.ndarray:
    x, a = np.abs(offset), CUBIC
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _weights(
    old: int, new: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int
) -> np.ndarray:
    """Returns [new, old]: the weight of each old value in a new one, along one axis.

    `torch.nn.functional.interpolate` with align_corners=False: half-pixel centres, the edge
    repeated outwards, no antialiasing.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    result = np.zeros((new, old))
    for tap in range(1 - reach, reach + 1):
        at = np.floor(centre) + tap
        index = np.clip(at, 0, old - 1).astype(int)
        np.add.at(result, (np.arange(new), index), kernel(centre - at))
    return result


def _bicubic(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    down = _weights(grid.shape[0], rows, _cubic, 2)
    across = _weights(grid.shape[1], columns, _cubic, 2)
    return np.einsum("ra,cb,abw->rcw", down, across, grid, optimize=True)


def _crop_or_stretch(grid: np.ndarray, axis: int, new: int) -> np.ndarray:
    """Crops an axis to its middle, or stretches it by linear interpolation."""
    old = grid.shape[axis]
    if new <= old:
        first = old // 2 - new // 2
        return grid.take(range(first, first + new), axis=axis)
    return np.moveaxis(np.tensordot(_weights(old, new, _linear, 1), grid, (1, axis)), 0, axis)


def fit_clip(table: np.ndarray, side: int) -> np.ndarray:
    """Resizes CLIP's vision positions to another number of patches per side: bicubic.

    Args:
        table: [1 + n·n, width], the class token first.
        side: patches per side.

    Returns:
        [1 + side·side, width], float32.

    Raises:
        ValueError: the table is not of a square grid.
    """
    old = round((len(table) - 1) ** 0.5)
    grid = np.asarray(table[1:], np.float64).reshape(old, old, -1)
    fitted = _bicubic(grid, side, side).reshape(side * side, -1)
    return np.concatenate([table[:1], fitted]).astype(np.float32)


def ast_grid(patches: int, rows: int) -> tuple[int, int]:
    """Returns the grid (frequency × time) that a table of positions was made for.

    A table does not say. The published models have 12×101 patches and the image model that AST
    starts from has 24×24; others are taken to have as many rows as the model they go into.

    Raises:
        ValueError: the number fits none of these.
    """
    if patches == 12 * 101:
        return 12, 101
    side = round(patches**0.5)
    if patches == 24 * 24 or patches % rows:
        if side * side != patches:
            raise ValueError(f"{patches} patches are no grid with {rows} rows, and no square")
        return side, side
    return rows, patches // rows


def fit_ast(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Resizes AST's positions to another grid: each axis cropped, or bilinear where longer.

    Time first, as the original does (Gong et al. 2021, section 2.2, and its code).

    Args:
        table: [2 + patches, width], class and distillation tokens first.
        grid: rows (frequency) and columns (time) of the model it goes into.

    Returns:
        [2 + rows·columns, width], float32.

    Raises:
        ValueError: see `ast_grid`.
    """
    rows, columns = grid
    old = np.asarray(table[2:], np.float64).reshape(*ast_grid(len(table) - 2, rows), -1)
    fitted = _crop_or_stretch(_crop_or_stretch(old, 1, columns), 0, rows)
    return np.concatenate([table[:2], fitted.reshape(rows * columns, -1)]).astype(np.float32)
