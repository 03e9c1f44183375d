"""The storage of a cache, on a disk and in a bucket, of arrays that no model has made."""

import errno
import pathlib
import re
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from save_jax import files
from save_jax.batch import Batch
from save_jax.cache import reading, shards, writing
from save_jax.errors import OutageError, UserError
from tests.support import object_store
from tests.support.object_store import HttpError

CLIPS, CAPTIONS, EACH = 11, 23, 4
THREADS = shards.threads()


@pytest.fixture(params=["disk", "bucket"])
def where(request, tmp_path):
    """DIR/SPLIT of a cache that is to be written."""
    store = object_store.register()
    yield files.path("gs://bucket/cache" if request.param == "bucket" else tmp_path) / "train"
    store.store.clear()


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(CLIPS, 5, 6)).astype(np.float32)
    return {
        "frame_embeddings": states[:, :3].astype(jnp.bfloat16),
        "frame_mask": states[:, :, 0] > 0,
        "ast_states": states.astype(np.float16),
        "caption_embeddings": rng.normal(size=(CAPTIONS, 8)).astype(np.float32),
    }


def layouts(where) -> dict[str, shards.Layout]:
    return {
        name: shards.Layout(where, name, array.shape, array.dtype, EACH)
        for name, array in arrays().items()
    }


def missing(where) -> dict[str, list[int]]:
    sizes = files.sizes(where)
    return {name: layout.missing(sizes) for name, layout in layouts(where).items()}


def write(where, rows_of=lambda count: np.arange(count), *, step: int = 3) -> None:
    """Writes what is missing of the rows that `rows_of` chooses, a few at a time."""
    with writing.ShardWriter(layouts(where), missing(where)) as writer:
        for name, array in arrays().items():
            rows = rows_of(len(array))
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                writer.put(name, some, array[some])


def opened(where) -> reading.Cache:
    """The cache as meta.json would describe it; what is checked at opening is not."""
    entries = {}
    for name, layout in layouts(where).items():
        sums = shards.read_sums([(layout, n) for n in range(layout.count)], THREADS)
        entries[name] = {
            "shape": list(layout.shape),
            "dtype": layout.dtype.name,
            "rows_per_shard": EACH,
            "checksums": [shards.sum_of_sums(found) for found in sums],
        }
    return reading.Cache(where, entries)


def change(where, name: str, number: int, edit) -> str:
    """Replaces a shard by what `edit` makes of its bytes; its path."""
    path = layouts(where)[name].path(number)
    path.write_bytes(edit(path.read_bytes()))
    return str(path)


def assert_all_is_there(where) -> None:
    found = opened(where).read(np.arange(CLIPS), np.arange(CAPTIONS))
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_rows_come_back_in_any_order(where):
    write(where)
    cache = opened(where)
    for rows, pairs in (([10, 0, 3, 3], [22, 0, 7, 7]), ([4], [5])):
        found = cache.read(np.array(rows, np.int32), np.array(pairs, np.int32))
        for name, array in arrays().items():
            np.testing.assert_array_equal(found[name], array[pairs if "cap" in name else rows])
    assert "caption_embeddings" not in cache.read(np.array([1]), None)


def test_a_shard_is_a_numpy_file(tmp_path):
    write(tmp_path)
    for name, array in arrays().items():
        array = array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
        found = [np.load(path) for path in sorted((tmp_path / name).iterdir())]
        assert [len(rows) for rows in found[:-1]] == [EACH] * (len(found) - 1)
        np.testing.assert_array_equal(np.concatenate(found), array)
        np.testing.assert_array_equal(
            np.load(tmp_path / name / f"00001-of-{len(found):05d}.npy", mmap_mode="r"),
            array[EACH : 2 * EACH],
        )


def test_several_processes_write_what_one_would(where, tmp_path_factory):
    """Each its own shards; of a job that was killed, another number of them writes the rest."""
    alone = tmp_path_factory.mktemp("alone")
    write(alone)

    def part(process, processes):
        return lambda count: np.concatenate(
            [
                rows
                for number, rows in enumerate(np.split(np.arange(count), range(EACH, count, EACH)))
                if number % processes == process
            ]
        )

    write(where, part(1, 3))
    assert missing(where)["ast_states"] == [0, 2]
    change(where, "ast_states", 1, lambda content: content[:-1])  # of a file system that does that
    assert missing(where)["ast_states"] == [0, 1, 2]
    for process in range(2):
        write(where, part(process, 2), step=5)
    assert not any(missing(where).values())
    assert_all_is_there(where)
    for name, layout in layouts(where).items():
        for number in range(layout.count):
            expected = layouts(alone)[name].path(number).read_bytes()
            assert layout.path(number).read_bytes() == expected


def test_what_is_there_is_not_written_again(where, monkeypatch):
    write(where)
    monkeypatch.setattr(shards.Shard, "write", lambda _: pytest.fail("it is there"))
    write(where)


def test_a_killed_writer_leaves_no_shard_that_is_not_whole(tmp_path, monkeypatch):
    """Its temporary file is none, and the next one makes the shard."""
    real = pathlib.Path.write_bytes

    def die(path, content):
        real(path, bytes(content)[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "write_bytes", die)
    monkeypatch.setattr(files, "_remove", lambda _: None)  # nothing is tidied by SIGKILL
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.npy"))
    write(tmp_path)
    assert_all_is_there(tmp_path)


@pytest.mark.parametrize("name", ["ast_states", "frame_mask", "caption_embeddings"])
def test_a_row_that_is_not_what_was_written_is_refused(where, name):
    write(where)
    cache = opened(where)

    def flip(content):
        return content[:140] + bytes([content[140] ^ 1]) + content[141:]

    path = change(where, name, 1, flip)
    rows = np.arange(EACH, 2 * EACH)
    with pytest.raises(UserError, match=f"{re.escape(path)} is damaged: the row at byte "):
        cache.read(rows, rows)
    others = np.arange(EACH)
    cache.read(others, others)


def test_checksums_are_known_too(where):
    write(where)
    cache = opened(where)
    path = change(where, "ast_states", 2, lambda content: content[:-1] + b"?")
    with pytest.raises(UserError, match=f"{re.escape(path)} is damaged: its checksums"):
        cache.read(np.array([9]), None)


def test_a_shard_that_goes_away_or_shrinks_is_named(where):
    write(where)
    cache = opened(where)
    rows = np.array([CLIPS - 1])
    cache.read(rows, rows)  # the checksums are known
    path = change(where, "ast_states", 2, lambda content: content[:150])
    with pytest.raises(UserError, match=f"{re.escape(path)}: expected 60 bytes at byte 248, found"):
        cache.read(rows, rows)
    layouts(where)["ast_states"].path(2).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(path)}: expected 60 bytes .*found [nN]o "):
        cache.read(rows, rows)


@pytest.mark.parametrize("where", ["bucket"], indirect=True)
@pytest.mark.parametrize(("code", "kind"), [(503, OutageError), (403, UserError)])
def test_a_store_that_fails_ends_the_loop_that_reads(where, monkeypatch, code, kind):
    """What was read before comes first, and nothing that was not read."""
    write(where)
    cache, good = opened(where), threading.Event()
    real, calls = object_store.ObjectStore.cat_file, []

    def fail(store, path, *arguments, **options):
        calls.append(path)
        if good.is_set():
            raise HttpError(code)
        return real(store, path, *arguments, **options)

    monkeypatch.setattr(object_store.ObjectStore, "cat_file", fail)

    def batches():
        for row in range(3):
            yield writing.EMPTY._replace(index=np.array([row]))
            good.set()

    read = cache.lay_over(batches(), {})
    batch = next(read)
    assert isinstance(batch, Batch)
    np.testing.assert_array_equal(batch.ast_states, arrays()["ast_states"][:1])
    with pytest.raises(kind, match=f"gs://bucket/cache/train/.*HTTP {code}"):
        next(read)
    assert not any(thread.name == "cache-read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("where", ["bucket"], indirect=True)
def test_a_store_that_fails_ends_the_writer(where, monkeypatch):
    def fail(*arguments, **options):
        raise HttpError(503)

    monkeypatch.setattr(object_store.ObjectStore, "_open", fail)
    with pytest.raises(OutageError, match=r"gs://bucket/cache/train/.*resume"):
        write(where)
    monkeypatch.setattr(object_store.ObjectStore, "find", fail)
    with pytest.raises(OutageError, match="gs://bucket/cache/train cannot be reached"):
        missing(where)


@pytest.mark.parametrize("where", ["bucket"], indirect=True)
@pytest.mark.parametrize(("code", "kind"), [(503, OutageError), (403, UserError)])
def test_a_store_that_fails_is_not_taken_for_an_empty_one(where, monkeypatch, code, kind):
    """Else a run would compute all, or a writer begin anew."""
    shards.save_meta(where, {})
    assert reading.has_split("gs://bucket/cache", "train")
    assert not reading.has_split("gs://bucket/cache", "test")
    assert shards.read_meta(where) == {"format": shards.FORMAT, "arrays": {}}

    def fail(*arguments, **options):
        raise HttpError(code)

    monkeypatch.setattr(object_store.ObjectStore, "_open", fail)
    monkeypatch.setattr(object_store.ObjectStore, "exists", fail)
    with pytest.raises(kind, match=rf"meta\.json cannot be reached .*HTTP {code}"):
        shards.read_meta(where)
    with pytest.raises(kind, match=f"gs://bucket/cache.* cannot be reached .*HTTP {code}"):
        reading.has_split("gs://bucket/cache", "train")


def test_a_full_disk_is_named_and_what_is_written_stays(tmp_path, monkeypatch):
    real = files.write

    def full(path, *arguments, **options):
        if path.parent.name == "ast_states":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *arguments, **options)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(UserError, match=r"ast_states/0000.*no room for 0\.0 MB.*it resumes"):
        write(tmp_path)
    monkeypatch.undo()
    assert not missing(tmp_path)["frame_embeddings"]
    write(tmp_path)
    assert_all_is_there(tmp_path)


def test_values_that_do_not_fit_are_refused(tmp_path):
    with (
        pytest.raises(UserError, match="rows 3 to 5 of ast_states have values that are not finite"),
        writing.ShardWriter(layouts(tmp_path), missing(tmp_path)) as writer,
    ):
        writer.put("ast_states", np.arange(3, 6), np.full((3, 5, 6), np.inf, np.float16))


@pytest.mark.parametrize("shares", [[3], [4, 4], [1, 2, 4], [64, 64]])
@pytest.mark.parametrize("lacking", [[], [2], [0, 1, 2, 3, 5, 6]])
def test_each_row_is_computed_once_and_a_shard_by_one_process(shares, lacking):
    ranges = [range(7 * n, min(7 * n + 7, 45)) for n in lacking]
    dealt = writing.schedule(ranges, shares)
    assert [rows.shape[1] for rows in dealt] == shares and len({len(x) for x in dealt}) == 1
    own = [rows[rows >= 0] for rows in dealt]
    np.testing.assert_array_equal(
        np.sort(np.concatenate(own)), [x for rows in ranges for x in rows]
    )
    assert all((np.diff(rows) > 0).all() for rows in own)
    shards_of = [set(rows // 7) for rows in own]
    assert sum(map(len, shards_of)) == len(lacking)  # none in two processes
