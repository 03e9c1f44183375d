"""An object store for tests: fsspec's memory file system, under the names of remote ones."""

from typing import ClassVar

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):
    """Lives in this process alone; as in a real one, there are no folders, only names."""

    protocol = ("gs", "gcs", "s3")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    def mkdir(self, path: str, create_parents: bool = True, **options) -> None:
        """Leaves nothing behind."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Leaves nothing behind."""


def glob_without_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names what `Path.glob` finds as real stores do."""
    glob = ObjectStore.glob
    monkeypatch.setattr(
        ObjectStore,
        "glob",
        lambda *arguments, **options: [
            name.removeprefix("gs://") for name in glob(*arguments, **options)
        ],
    )


def _forget() -> None:
    """Makes epath ask anew which file system opens a name: it keeps the first one."""
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


def register() -> fsspec.AbstractFileSystem:
    """Opens gs:// and s3:// by it, empty, and returns it."""
    _forget()
    for name in ObjectStore.protocol:
        fsspec.register_implementation(name, ObjectStore, clobber=True)
    ObjectStore.store.clear()
    ObjectStore.pseudo_dirs[:] = [""]
    return fsspec.filesystem("gs")


class SharedStore(DirFileSystem):
    """A store that several processes see: names of gs:// are files below a directory."""

    protocol = ("gs", "gcs")
    root: ClassVar[str] = ""
    cachable = False

    def __init__(self, **_: object) -> None:
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))


def share(root: str) -> None:
    """Opens gs:// by `SharedStore`, in this process."""
    SharedStore.root = root
    _forget()
    for name in SharedStore.protocol:
        fsspec.register_implementation(name, SharedStore, clobber=True)


class HttpError(Exception):
    """As gcsfs has it."""

    __module__ = "gcsfs.retry"

    def __init__(self, code):
        super().__init__(f"HTTP {code}")
        self.code = code
