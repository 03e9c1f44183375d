"""An object store for tests: fsspec's memory file system, under the names of remote ones."""

from typing import ClassVar

import fsspec
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


def register() -> fsspec.AbstractFileSystem:
    """Opens gs:// and s3:// by it, empty, and returns it."""
    for name in ObjectStore.protocol:
        fsspec.register_implementation(name, ObjectStore, clobber=True)
    ObjectStore.store.clear()
    ObjectStore.pseudo_dirs[:] = [""]
    return fsspec.filesystem("gs")
