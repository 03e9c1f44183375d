"""The recipe that made a prepared directory: recorded when writing, checked when reading.

A model trained on 224-pixel frames must not silently read 112-pixel ones, nor may two versions of
the filterbank be mixed in one experiment. Whatever changes the stored arrays is a field here.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from save_jax import batch
from save_jax.errors import UserError

# The config keys from which a model's wanted settings come.
CONFIG_KEYS = {
    "image_size": "config.model.clip.image_size",
    "max_frames": "config.data.max_frames",
    "fbank_frames": "config.model.ast.fbank_frames",
    "mel_bins": "config.model.ast.mel_bins",
}
JPEG_QUALITY = 95
# Fields of a recipe that data_pipelines.prepare has no flag for.
NO_FLAGS = ("mel_bins", "teacher_size", "version")


def flags(settings: Mapping[str, int | str]) -> str:
    """Returns the flags of data_pipelines.prepare for settings, in the order of `Recipe`."""
    return " ".join(
        f"--{field.name}={settings[field.name]}"
        for field in dataclasses.fields(Recipe)
        if field.name in settings and field.name not in NO_FLAGS
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that decide the stored arrays of a clip (spec section 1).

    Attributes:
        image_size: height and width of a stored frame, in pixels.
        max_frames: F, the most frames kept per clip.
        frames_per_second: candidate frames per second of video; at most `max_frames` are kept.
        encoding: "jpeg" (JPEG_QUALITY) or "raw" (a frame's bytes), how a frame is stored.
        fbank_frames: T, filterbank frames per clip; the frame shift is duration / T.
        mel_bins: M, mel bins.
        teacher_size: length of a teacher vector.
        version: raised whenever the code that makes the arrays changes what it makes.
    """

    image_size: int = batch.IMAGE_SIZE
    max_frames: int = batch.MAX_FRAMES
    frames_per_second: int = 1
    encoding: str = "jpeg"
    fbank_frames: int = batch.FBANK_FRAMES
    mel_bins: int = batch.MEL_BINS
    teacher_size: int = batch.TEACHER_SIZE
    version: int = 1

    def to_json(self) -> str:
        """Writes the recipe as JSON; equal recipes give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Reads what `to_json` wrote."""
        return cls(**json.loads(text))

    def describe(self) -> dict[str, Any]:
        """Describes how a clip's arrays are made, for the record of a run or an evaluation.

        What `version` stands for is described in words; spec section 1 has its constants.
        """
        return {
            "version": self.version,
            "frames": {
                "rule": "index s·max(1, int(fps / per_second)); of more than most, evenly spaced",
                "per_second": self.frames_per_second,
                "most": self.max_frames,
                "fit": "short side resized, bicubic; centre crop",
                "size": self.image_size,
                "encoding": self.encoding,
                "quality": JPEG_QUALITY if self.encoding == "jpeg" else None,
            },
            "filterbank": {
                "kind": "Kaldi's log-Mel, as AST's; shift of duration / frames",
                "frames": self.fbank_frames,
                "mel_bins": self.mel_bins,
            },
            "teacher_size": self.teacher_size,
        }

    def check(self, expected: dict[str, int | str], where: str, *, of_config: bool = False) -> None:
        """Raises UserError naming every field in which `expected` differs from this recipe.

        Args:
            expected: the wanted fields.
            where: names what this recipe made.
            of_config: whether they are wanted by a config, whose keys the message then names.
        """
        found = dataclasses.asdict(self)
        differing = {k: (v, found[k]) for k, v in expected.items() if found[k] != v}
        if differing:
            lines = [
                f"  {k}: wanted {w}, prepared with {f}" for k, (w, f) in sorted(differing.items())
            ]
            raise UserError(
                f"{where} was prepared with other settings than are wanted now:\n"
                + "\n".join(lines)
                + (
                    f"\nPrepare again into another --out with {flags(expected)}, or set in the "
                    f"config what is prepared: {_keys(found, differing)} (in a config file where "
                    "model.clip or model.ast is a variant's name: configs/README.md)."
                    if of_config
                    else "\nPrepare again into another --out with the wanted settings (flags: "
                    "python -m data_pipelines.prepare --help), or change the wanted ones."
                )
            )


def _keys(found: Mapping[str, int | str], differing: Collection[str]) -> str:
    """Returns the config keys of the differing settings, with the values that they have here."""
    return ", ".join(f"{CONFIG_KEYS[name]} = {found[name]}" for name in sorted(differing))


def version_directory(out: str, dataset: str, variant: str, version: int) -> epath.Path:
    """Returns the directory of a data set prepared by a recipe of `version`, in TFDS's layout."""
    return epath.Path(out) / dataset / variant / f"{version}.0.0"
