"""Stores clips as tensorflow_datasets' examples in array_record files, with its metadata.

Nothing here needs TensorFlow itself, which takes seconds to import: the features have NumPy's
types.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # ty: ignore[missing-module-member]  # no stubs
from etils import epath
from tensorflow_datasets.core import dataset_info, example_serializer

from data_pipelines import outages
from data_pipelines.recipe import Recipe
from save_jax import files
from save_jax.errors import UserError
from save_jax.files import is_remote

_FILE_FORMAT = "array_record"


class SplitSize(NamedTuple):
    """The sizes of a split, as TFDS records them.

    Attributes:
        shard_lengths: records in each of its files; a file may have none.
        num_bytes: size of all its records.
    """

    shard_lengths: list[int]
    num_bytes: int


@functools.cache
def features(recipe: Recipe) -> tfds.features.FeaturesDict:
    """Describes the features of a record in TFDS's terms."""
    strings = tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_))
    vector = tfds.features.Tensor(shape=(recipe.teacher_size,), dtype=np.float32)
    return tfds.features.FeaturesDict(
        {
            "video_id": tfds.features.Text(),
            "frames": strings,
            "num_frames": np.int32,
            "fbank": tfds.features.Tensor(
                shape=(recipe.fbank_frames, recipe.mel_bins),
                dtype=np.float16,
                encoding=tfds.features.Encoding.BYTES,
            ),
            "has_audio": np.bool_,
            "transcript": tfds.features.Text(),
            "captions": strings,
            "groups": strings,
            "teacher_video": vector,
            "teacher_audio": vector,
            "has_teacher": np.bool_,
        }
    )


def serialize(record: dict[str, Any], recipe: Recipe) -> bytes:
    """Serialises a record as a tf.train.Example: the same bytes for the same features."""
    example = _serializer(recipe).get_tf_example(features(recipe).encode_example(record))
    # Otherwise the order of an Example's features differs between processes.
    return example.SerializeToString(deterministic=True)


def write_records(path: str, serialized: Iterable[bytes]) -> int:
    """Writes one array_record file, which gets its name only once it is complete.

    Args:
        path: the file; a remote one is written on this machine first and then copied.
        serialized: the records, consumed one by one.

    Returns:
        The size of the file, in bytes.
    """
    with _partial_file(path) as partial:
        with _as_system_error():
            # JPEG does not shrink, and raw frames would take longer to decompress than to read.
            writer = array_record_module.ArrayRecordWriter(partial, "group_size:1,uncompressed")
        try:
            for record in serialized:
                with _as_system_error():
                    writer.write(record)
        finally:
            with _as_system_error():
                writer.close()
        return os.path.getsize(partial)


def write_file(path: str, content: bytes) -> None:
    """Writes a small file, which gets its name only once it is complete."""
    with _partial_file(path) as partial, open(partial, "wb") as file:
        file.write(content)


def copy_file(source: str, path: str) -> None:
    """Copies a file of this machine; the copy gets its name only once it is complete."""
    with _partial_file(path) as partial:
        shutil.copyfile(source, partial)


def remove_others(directory: str, names: Iterable[str]) -> None:
    """Removes the files of a directory without one of these names: leftovers of unfinished work."""
    keep = set(names)
    try:
        found = list(epath.Path(directory).iterdir())
    except FileNotFoundError:  # a store has no folders, and so none that are empty
        return
    for path in found:
        if path.name not in keep and path.is_file():
            path.unlink(missing_ok=True)


def write_metadata(
    directory: str,
    *,
    dataset: str,
    variant: str,
    version: str,
    recipe: Recipe,
    splits: dict[str, SplitSize],
    metadata: dict[str, Any],
) -> None:
    """Writes the metadata that TFDS reads before a data set's records.

    Args:
        directory: the folder to write to, on this machine.
        dataset: the data set's name.
        variant: the name of its variant, TFDS's config.
        version: "1.0.0".
        recipe: what made the records.
        splits: the sizes of its splits.
        metadata: our own metadata, for metadata.json.
    """
    identity = dataset_info.DatasetIdentity(
        name=dataset,
        version=tfds.core.Version(version),
        data_dir=directory,
        module_name="",
        config_name=variant,
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Clips prepared for SAVE: save_jax's data_pipelines.",
        features=features(recipe),
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,  # the index names records by their position
    )
    info.set_file_format(_FILE_FORMAT)
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(directory), dataset_name=dataset, filetype_suffix=_FILE_FORMAT
    )
    info.set_splits(
        tfds.core.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=name,
                    shard_lengths=size.shard_lengths,
                    num_bytes=size.num_bytes,
                    filename_template=template.replace(split=name),
                )
                for name, size in splits.items()
            ]
        )
    )
    info.write_to_directory(directory)


def record_file(dataset: str, split: str, number: int, of: int) -> str:
    """Returns TFDS's name of file `number` (from 0) of the `of` files of a split."""
    return f"{dataset}-{split}.{_FILE_FORMAT}-{number:05d}-of-{of:05d}"


def read_json(path: str) -> Any:
    """Reads a JSON file; None when it is absent or is not JSON."""
    try:
        return json.loads(epath.Path(path).read_text())
    except (FileNotFoundError, ValueError):
        return None


def system_error(error: RuntimeError) -> OSError | None:
    """Returns the system's error that array_record quotes without its number, if it is one."""
    told = [number for number in errno.errorcode if os.strerror(number) in str(error)]
    # "No such device" is also the beginning of another message.
    number = max(told, key=lambda number: len(os.strerror(number)), default=None)
    return None if number is None else OSError(number, str(error))


@contextlib.contextmanager
def writing(directory: str) -> Generator[None]:
    """Converts errors of writing to a directory into errors that say what to do.

    Raises:
        UserError: it is full, or cannot be written to.
        OutageError: the machine or the store fails.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in outages.NO_SPACE:
            raise UserError(
                f"{directory}: expected room for the prepared data, found the disk full. Finished "
                "work is kept there: make room and run the same command again to resume; or give a "
                "folder on another disk as --out."
            ) from error
        outages.pass_on(error, directory)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"--out={directory}: expected a folder to write to, found: {error}. Give another --out."
        ) from error


@contextlib.contextmanager
def _as_system_error() -> Generator[None]:
    """Restores the error number of the system's errors that array_record quotes without it."""
    try:
        yield
    except RuntimeError as error:
        raise system_error(error) or OSError(errno.EIO, str(error)) from error


@functools.cache
def _serializer(recipe: Recipe) -> example_serializer.ExampleSerializer:
    return example_serializer.ExampleSerializer(features(recipe).get_serialized_info())


@contextlib.contextmanager
def _partial_file(path: str) -> Generator[str]:
    """Yields the name of a file on this machine to write, which becomes `path` at the end."""
    here = outages.temporary if is_remote(path) else contextlib.nullcontext
    with contextlib.ExitStack() as stack, here():
        # Which has another name in each attempt: Beam may run two workers on one shard.
        partial = stack.enter_context(files.appearing(epath.Path(path)))
        yield os.fspath(partial)
