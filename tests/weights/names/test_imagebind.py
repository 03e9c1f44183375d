"""ImageBind's published checkpoint: its names and shapes, what is ignored, what is refused."""

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from save_jax.errors import UserError
from save_jax.models import imagebind as model
from save_jax.weights import table
from save_jax.weights.files import safetensors
from save_jax.weights.names import imagebind
from tests.models.test_imagebind import TINY, clips, outputs, sizes
from tests.support import imagebind_reference as reference
from tests.support import small

# Of the published file, for its vision and audio towers (one block of each).
PUBLISHED = {
    "modality_preprocessors.vision.cls_token": (1, 1, 1280),
    "modality_preprocessors.vision.rgbt_stem.proj.1.weight": (1280, 3, 2, 14, 14),
    "modality_preprocessors.vision.pos_embedding_helper.pos_embed": (1, 257, 1280),
    "modality_preprocessors.audio.cls_token": (1, 1, 768),
    "modality_preprocessors.audio.rgbt_stem.proj.weight": (768, 1, 16, 16),
    "modality_preprocessors.audio.rgbt_stem.norm_layer.weight": (768,),
    "modality_preprocessors.audio.rgbt_stem.norm_layer.bias": (768,),
    "modality_preprocessors.audio.pos_embedding_helper.pos_embed": (1, 229, 768),
    "modality_trunks.vision.pre_transformer_layer.0.weight": (1280,),
    "modality_trunks.vision.pre_transformer_layer.0.bias": (1280,),
    "modality_trunks.vision.blocks.31.attn.in_proj_weight": (3840, 1280),
    "modality_trunks.vision.blocks.31.attn.in_proj_bias": (3840,),
    "modality_trunks.vision.blocks.31.attn.out_proj.weight": (1280, 1280),
    "modality_trunks.vision.blocks.31.attn.out_proj.bias": (1280,),
    "modality_trunks.vision.blocks.31.norm_1.weight": (1280,),
    "modality_trunks.vision.blocks.31.norm_1.bias": (1280,),
    "modality_trunks.vision.blocks.31.mlp.fc1.weight": (5120, 1280),
    "modality_trunks.vision.blocks.31.mlp.fc1.bias": (5120,),
    "modality_trunks.vision.blocks.31.mlp.fc2.weight": (1280, 5120),
    "modality_trunks.vision.blocks.31.mlp.fc2.bias": (1280,),
    "modality_trunks.vision.blocks.31.norm_2.weight": (1280,),
    "modality_trunks.vision.blocks.31.norm_2.bias": (1280,),
    "modality_trunks.audio.blocks.11.attn.in_proj_weight": (2304, 768),
    "modality_trunks.audio.blocks.11.attn.in_proj_bias": (2304,),
    "modality_trunks.audio.blocks.11.attn.bias_k": (1, 1, 768),
    "modality_trunks.audio.blocks.11.attn.bias_v": (1, 1, 768),
    "modality_trunks.audio.blocks.11.attn.out_proj.weight": (768, 768),
    "modality_trunks.audio.blocks.11.attn.out_proj.bias": (768,),
    "modality_trunks.audio.blocks.11.norm_1.weight": (768,),
    "modality_trunks.audio.blocks.11.norm_1.bias": (768,),
    "modality_trunks.audio.blocks.11.mlp.fc1.weight": (3072, 768),
    "modality_trunks.audio.blocks.11.mlp.fc1.bias": (3072,),
    "modality_trunks.audio.blocks.11.mlp.fc2.weight": (768, 3072),
    "modality_trunks.audio.blocks.11.mlp.fc2.bias": (768,),
    "modality_trunks.audio.blocks.11.norm_2.weight": (768,),
    "modality_trunks.audio.blocks.11.norm_2.bias": (768,),
    "modality_heads.vision.0.weight": (1280,),
    "modality_heads.vision.0.bias": (1280,),
    "modality_heads.vision.2.weight": (1024, 1280),
    "modality_heads.audio.0.weight": (768,),
    "modality_heads.audio.0.bias": (768,),
    "modality_heads.audio.2.weight": (1024, 768),
    "modality_postprocessors.audio.1.log_logit_scale": (),
}

# Of the other four modalities, in the published file's spelling.
OTHERS = {
    "modality_preprocessors.text.pos_embed": (1, 77, 1024),
    "modality_preprocessors.text.mask": (77, 77),
    "modality_preprocessors.text.token_embedding.weight": (49, 1024),
    "modality_preprocessors.depth.rgbt_stem.proj.weight": (384, 1, 16, 16),
    "modality_preprocessors.thermal.pos_embedding_helper.pos_embed": (1, 197, 768),
    "modality_preprocessors.imu.imu_stem.proj.weight": (512, 48),
    "modality_trunks.text.blocks.0.attn.in_proj_weight": (3072, 1024),
    "modality_trunks.depth.blocks.0.attn.bias_k": (1, 1, 384),
    "modality_trunks.thermal.blocks.0.mlp.fc1.weight": (3072, 768),
    "modality_trunks.imu.blocks.0.norm_1.weight": (512,),
    "modality_heads.text.proj.1.weight": (1024, 1024),
    "modality_heads.imu.3.weight": (1024, 512),
    "modality_postprocessors.text.1.log_logit_scale": (),
    "modality_postprocessors.thermal.1.log_logit_scale": (),
}


@pytest.fixture(scope="module")
def theirs() -> reference.ImageBind:
    return reference.ImageBind(sizes(TINY)).eval()


@pytest.fixture
def state(theirs) -> dict[str, torch.Tensor]:
    """A state dictionary with all six modalities."""
    return theirs.state_dict() | {name: torch.ones(shape) for name, shape in OTHERS.items()}


def save(state: dict[str, torch.Tensor], path: pathlib.Path) -> pathlib.Path:
    torch.save(state, path)
    return path


def our_shapes(config: model.ImageBindConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that our model of this size asks for, by the file's names."""
    result = {}
    for ours, value in model.abstract(config)[1].items():
        row = imagebind.TABLE.row(ours)
        for (name,) in table.torch_names(imagebind.TABLE, ours, value.shape):
            result[name] = table._torch_shape(row, value.shape)
    return result


def test_huge_has_the_published_names_and_shapes():
    found = our_shapes(model.VARIANTS["huge"])
    assert {name: found.get(name) for name in PUBLISHED} == PUBLISHED
    # Every other tensor is one of the other blocks'.
    blocks = {"vision": range(31), "audio": range(11)}
    others = {
        name.replace(f".{last}.", f".{n}."): shape
        for tower, last in (("vision", 31), ("audio", 11))
        for n in blocks[tower]
        for name, shape in PUBLISHED.items()
        if f"modality_trunks.{tower}.blocks" in name
    }
    assert found == PUBLISHED | others
    with reference.torch.device("meta"):
        state = reference.ImageBind(reference.Sizes()).state_dict()
    assert found == {name: tuple(value.shape) for name, value in state.items()}


def test_the_table_is_one_to_one():
    rows = imagebind.TABLE.rows
    assert len({row.torch for row in rows}) == len({row.ours for row in rows}) == len(rows)
    assert {row.ours for row in rows} == model.abstract(TINY)[1].keys()


@pytest.mark.parametrize("kind", ["pth", "safetensors", "float16"])
def test_a_file_gives_the_teacher(kind, state, theirs, tmp_path):
    if kind == "safetensors":
        path = tmp_path / "imagebind.safetensors"
        safetensors.write(path, {k: v.numpy().copy() for k, v in state.items()})
    elif kind == "float16":
        path = save({k: v.half() for k, v in state.items()}, tmp_path / "imagebind.pth")
    else:
        path = save(state, tmp_path / "imagebind.pth")
    embed = model.make_embed(TINY, imagebind.loader(str(path), TINY))
    images, fbanks = clips(TINY, 2, frames=3, pieces=3)
    video, audio = outputs(theirs, images, fbanks)
    tolerance = 0.02 if kind == "float16" else 1e-5
    np.testing.assert_allclose(embed.video(images), video, atol=tolerance)
    np.testing.assert_allclose(embed.audio(fbanks), audio, atol=20 * tolerance)


def test_two_frames_of_one_image_are_the_sum(theirs):
    """The patch convolution's halves differ, and both count."""
    parameters = table.from_torch(
        imagebind.TABLE, small.numpy_state(theirs), small.shapes(model.abstract(TINY)[1])
    )
    weight = theirs.state_dict()["modality_preprocessors.vision.rgbt_stem.proj.1.weight"].numpy()
    assert not np.allclose(weight[:, :, 0], weight[:, :, 1])
    kernel = np.asarray(parameters["vision.patch_embed.kernel"]).reshape(7, 7, 3, -1)
    expected = weight.sum(2).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(kernel, expected, atol=1e-7)


def test_everything_that_does_not_fit_is_named_at_once(state, tmp_path):
    del state["modality_heads.audio.2.weight"]
    state["modality_trunks.vision.blocks.9.norm_1.weight"] = torch.ones(32)
    state["modality_trunks.audio.blocks.1.attn.bias_v"] = torch.ones(1, 1, 7)
    path = save(state, tmp_path / "imagebind.pth")
    with pytest.raises(UserError) as error:
        imagebind.load(path, TINY)
    message = str(error.value)
    assert str(path) in message
    assert "1 missing: modality_heads.audio.2.weight" in message
    assert "1 not expected: modality_trunks.vision.blocks.9.norm_1.weight" in message
    assert "modality_trunks.audio.blocks.1.attn.bias_v is [1, 1, 7] and should be [1, 1, 24]" in (
        message
    )


def test_other_files_are_refused(state, tmp_path):
    with pytest.raises(UserError, match=r"expected ImageBind's checkpoint.*Download https://"):
        imagebind.loader(str(tmp_path / "absent.pth"))
    other = save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    embed = model.make_embed(
        TINY, imagebind.loader(str(other), TINY)
    )  # it is read when it is needed
    with pytest.raises(UserError, match=r"other\.pth does not hold this model's parameters"):
        embed.video(clips(TINY, 1, frames=1, pieces=1)[0])
    larger = dataclasses.replace(TINY, vision_width=64)
    with pytest.raises(UserError, match="of the wrong shape"):
        imagebind.load(save(state, tmp_path / "imagebind.pth"), larger)
    (tmp_path / "short.pth").write_bytes((tmp_path / "imagebind.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"short\.pth is cut short"):
        imagebind.load(tmp_path / "short.pth", TINY)
