"""Sources and prepared data in an object store: the same records as here."""

import threading

import pytest
from etils import epath

from data_pipelines.prepare import main
from data_pipelines.storage import build, shards
from save_jax import files, locks
from save_jax.errors import UserError
from tests.data_pipelines.conftest import SMALL
from tests.support import object_store, preparing

WHERE = "msrvtt/9k/1.0.0"
OUT = "gs://bucket/out"


@pytest.fixture(autouse=True)
def quick_lease(monkeypatch):
    monkeypatch.setattr(locks, "_RENEWED", 0.1)
    monkeypatch.setattr(locks, "_LEASE", 1.0)
    monkeypatch.setattr(locks, "_SETTLED", 0.1)


@pytest.fixture
def store(miniature):
    """A store with the miniature in it."""
    store = object_store.register()
    store.put(str(miniature), "gs://bucket/root", recursive=True)
    return store


@pytest.fixture(scope="module")
def local(miniature, tmp_path_factory) -> dict[str, bytes]:
    return contents(preparing.run(str(miniature), str(tmp_path_factory.mktemp("local"))))


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in epath.Path(directory).iterdir()}


def test_a_remote_root(store, tmp_path, local):
    assert contents(preparing.run("gs://bucket/root", str(tmp_path))) == local


def test_a_remote_root_and_out(store, local, capsys):
    directory = preparing.run("gs://bucket/root", OUT)
    assert str(directory) == f"{OUT}/{WHERE}"
    assert contents(directory) == local
    assert {path.split("/9k/")[1].split("/")[0] for path in store.find(OUT)} == {"1.0.0"}
    preparing.run("gs://bucket/root", OUT)
    assert "Already prepared" in capsys.readouterr().out


@pytest.fixture
def other_machine(store):
    """Prepares the same meanwhile: ends that with a call."""
    lock, ended = epath.Path(f"{OUT}/{WHERE}.lock"), threading.Event()

    def work() -> None:
        for beat in range(1000):
            files.write(lock, f'{{"id": "x", "holder": "process 7 on pod-1", "beat": {beat}}}')
            if ended.wait(0.1):
                break
        lock.unlink()

    working = threading.Thread(target=work)
    working.start()

    def end() -> None:
        ended.set()
        working.join()

    yield end
    end()


def test_of_two_machines_one_prepares_into_a_bucket(store, other_machine):
    with pytest.raises(UserError, match=r"1\.0\.0 is in use by process 7 on pod-1 .*same command"):
        preparing.run("gs://bucket/root", OUT)
    assert [path.rpartition("/")[2] for path in store.find(OUT)] == ["1.0.0.lock"]


def test_one_machine_may_wait_for_another(other_machine, local):
    threading.Timer(2, other_machine).start()
    assert contents(preparing.run("gs://bucket/root", OUT, wait=True)) == local


def test_an_interrupted_one_goes_on(store, local, monkeypatch):
    """It is complete once it has its metadata.json, which is written last."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "_describe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preparing.run("gs://bucket/root", OUT)
    assert not store.exists(f"{OUT}/{WHERE}/metadata.json")
    written = []
    write = shards.write
    monkeypatch.setattr(
        shards, "write", lambda shard, *args, **kw: written.append(shard.number) or write(
            shard, *args, **kw
        )
    )  # fmt: skip
    with store.open("gs://bucket/root/VideoData/video5.mp4", "ab") as file:
        file.write(b"\0" * 8)  # as good as before, but not the same
    directory = preparing.run("gs://bucket/root", OUT)
    assert written == [1] and contents(directory) == local


def test_what_stops_before_metadata_json_is_not_complete(store, monkeypatch):
    copied = []
    monkeypatch.setattr(
        "data_pipelines.storage.tfds_format.copy_file",
        lambda _, path: copied.append(epath.Path(path).name),
    )
    preparing.run("gs://bucket/root", OUT)
    assert copied[-1] == "metadata.json" and len(copied) == len(set(copied)) == 6


def test_it_can_be_verified(store, capsys):
    preparing.run("gs://bucket/root", OUT)
    command = ["msrvtt", "--root=gs://bucket/root", f"--out={OUT}", "--verify"]
    assert main(command) == 0
    assert "Nothing stops training" in capsys.readouterr().out


def test_a_remote_root_that_is_not_there(store, tmp_path):
    flags = [f"--{key}={value}" for key, value in SMALL.items()]
    with pytest.raises(UserError, match="--root=gs://bucket/none: no such directory"):
        preparing.run("gs://bucket/none", str(tmp_path))
    assert main(["msrvtt", "--root=gs://bucket/none", f"--out={tmp_path}", *flags]) == 2
