"""Fitted tables of positions, against PyTorch's interpolation and the originals' rules."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from save_jax.weights import positions


def table(tokens: int, patches: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(tokens + patches, 5)).astype(np.float32)


def image(table: np.ndarray, tokens: int, grid: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(table[tokens:]).double().T.reshape(1, -1, *grid)


def flat(image: torch.Tensor) -> np.ndarray:
    return image[0].flatten(1).T.numpy()


@pytest.mark.parametrize(("old", "new"), [(7, 14), (7, 10), (16, 24), (14, 7), (3, 2), (1, 4)])
def test_clip_is_bicubic(old, new):
    there = table(1, old * old)
    fitted = positions.fit_clip(there, new)
    expected = functional.interpolate(
        image(there, 1, (old, old)), size=(new, new), mode="bicubic", align_corners=False
    )
    np.testing.assert_array_equal(fitted[0], there[0])
    np.testing.assert_allclose(fitted[1:], flat(expected), atol=2e-6)


def original(there: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """What AST's code does: time, then frequency; the middle, or bilinear where longer."""
    x = image(there, 2, old)
    if new[1] <= old[1]:
        first = int(old[1] / 2) - int(new[1] / 2)
        x = x[:, :, :, first : first + new[1]]
    else:
        x = functional.interpolate(x, size=(old[0], new[1]), mode="bilinear")
    if new[0] <= old[0]:
        first = int(old[0] / 2) - int(new[0] / 2)
        x = x[:, :, first : first + new[0]]
    else:
        x = functional.interpolate(x, size=(new[0], new[1]), mode="bilinear")
    return flat(x)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((12, 101), (12, 50)),  # AudioSet's model, for 5 s
        ((12, 101), (12, 128)),
        ((12, 101), (5, 201)),
        ((24, 24), (12, 101)),  # the image model, for 10 s
        ((24, 24), (30, 9)),
        ((3, 5), (3, 8)),
        ((12, 101), (12, 101)),
    ],
)
def test_ast_is_cropped_or_bilinear(old, new):
    there = table(2, old[0] * old[1])
    fitted = positions.fit_ast(there, new)
    np.testing.assert_array_equal(fitted[:2], there[:2])
    np.testing.assert_allclose(fitted[2:], original(there, old, new), atol=2e-6)


def test_a_table_of_no_grid_is_refused():
    with pytest.raises(ValueError, match="no grid with 3 rows"):
        positions.fit_ast(table(2, 7), (3, 4))
    with pytest.raises(ValueError, match="reshape"):
        positions.fit_clip(table(1, 7), 4)
