"""ImageBind's names (spec section 12) and ours as in `save_jax.models.imagebind.ImageBind`."""

import functools
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from save_jax.errors import UserError
from save_jax.models import imagebind
from save_jax.models.imagebind import ImageBindConfig
from save_jax.weights import table
from save_jax.weights.files import recognise
from save_jax.weights.table import (
    CONVOLUTION,
    ONE_LEADING,
    PATCHES,
    TWO_LEADING,
    Row,
    Table,
    Transform,
    attention,
    layer_norm,
    linear,
)

ADDRESS = "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth"

# The vision tower's convolution over two frames, [out, 3, 2, y, x], which sees one image twice:
# the sum of its halves, as the matrix that a convolution over patches is.
_TWO_FRAMES = Transform(
    lambda x: PATCHES.from_torch(x.sum(2)),
    lambda x: np.repeat(PATCHES.to_torch(x)[:, :, None] / 2, 2, axis=2),
)


def _tower(name: str, *, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Returns the rows of what both towers have, and those of one."""
    stem, block = f"modality_preprocessors.{name}", f"modality_trunks.{name}.blocks.*"
    ours = "trunk.blocks.layer"
    shared = (
        Row(f"{stem}.cls_token", "trunk.cls_token", TWO_LEADING),
        Row(f"{stem}.pos_embedding_helper.pos_embed", "trunk.pos_embed", ONE_LEADING),
        *attention(f"{block}.attn", f"{ours}.attn"),
        *layer_norm(f"{block}.norm_1", f"{ours}.ln_1"),
        *linear(f"{block}.mlp.fc1", f"{ours}.mlp.c_fc"),
        *linear(f"{block}.mlp.fc2", f"{ours}.mlp.c_proj"),
        *layer_norm(f"{block}.norm_2", f"{ours}.ln_2"),
        *layer_norm(f"modality_heads.{name}.0", "trunk.head_norm"),
        *linear(f"modality_heads.{name}.2", "trunk.head", bias=False),
    )
    return tuple(row.under("", f"{name}.") for row in (*shared, *rows))


_AUDIO_BLOCK = "modality_trunks.audio.blocks.*.attn"

TABLE = Table(
    rows=(
        *_tower(
            "vision",
            rows=(
                Row(
                    "modality_preprocessors.vision.rgbt_stem.proj.1.weight",
                    "patch_embed.kernel",
                    _TWO_FRAMES,
                ),
                *layer_norm("modality_trunks.vision.pre_transformer_layer.0", "trunk.ln_pre"),
            ),
        ),
        *_tower(
            "audio",
            rows=(
                Row(
                    "modality_preprocessors.audio.rgbt_stem.proj.weight",
                    "patch_embed.kernel",
                    CONVOLUTION,
                ),
                *layer_norm("modality_preprocessors.audio.rgbt_stem.norm_layer", "patch_norm"),
                Row(f"{_AUDIO_BLOCK}.bias_k", "trunk.blocks.layer.attn.bias_k", TWO_LEADING),
                Row(f"{_AUDIO_BLOCK}.bias_v", "trunk.blocks.layer.attn.bias_v", TWO_LEADING),
                Row("modality_postprocessors.audio.1.log_logit_scale", "log_logit_scale"),
            ),
        ),
    ),
    # The other four modalities.
    unused=tuple(f"modality_*.{name}.*" for name in ("text", "depth", "thermal", "imu")),
)


def load(path: pathlib.Path, config: ImageBindConfig) -> dict[str, np.ndarray]:
    """Reads both towers out of a published checkpoint (PyTorch's or safetensors, by contents).

    Raises:
        UserError: the file is damaged, or is not ImageBind of these sizes.
    """
    _, expected = imagebind.abstract(config)
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    tensors = recognise.read_file(path, trust_archive=False)
    return table.from_torch(TABLE, tensors, shapes, source=str(path))


def loader(
    path: str, config: ImageBindConfig = imagebind.VARIANTS["huge"]
) -> Callable[[], Mapping[str, np.ndarray]]:
    """Returns a function that reads a checkpoint when called, for `models.imagebind.make_embed`.

    Args:
        path: `imagebind_huge.pth`, or the same tensors as safetensors. It is not read here; errors
            as those of `load` are raised when it is.
        config: other sizes than the published ones.

    Raises:
        UserError: there is no such file.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"{path}: expected ImageBind's checkpoint, found no such file. Download {ADDRESS} "
            "and give its path"
        )
    return functools.partial(load, file, config)
