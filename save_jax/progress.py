"""Progress with the time left, and the writer of a run's scalars."""

import contextlib
import json
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from typing import Any

import jax

from save_jax import files


def duration(seconds: float) -> str:
    """Formats seconds: 8s, 3m05s, 2h10m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """A line now and then for work that takes longer than a few seconds; silent otherwise."""

    EVERY = 5.0  # seconds between lines

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._start = self._shown = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown >= self.EVERY:
            self._shown = now
            left = (now - self._start) / max(self._done, 1) * (self._total - self._done)
            say(f"  {self._what}: {self._done}/{self._total}, {duration(left)} left")

    def close(self) -> None:
        if self._shown > self._start:
            say(f"  {self._what}: {self._done} in {duration(time.monotonic() - self._start)}")


def say(text: str) -> None:
    """Prints on the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


class _Events:
    """TensorBoard's events, which are in their file once they are written.

    A `SummaryWriter` would write them from a thread, up to two minutes later: in a workdir that may
    be another run's by then.

    Args:
        folder: where the file goes.
        purge_step: from which step on TensorBoard hides earlier events; None = no step.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None):
        # Late, because evaluation does without it. And without PyTorch: where that is installed,
        # tensorboardX imports it to accept its tensors, 3 s and 200 MB at the start of each run.
        hidden = "torch" not in sys.modules
        if hidden:
            sys.modules["torch"] = None  # ty: ignore[invalid-assignment], an import that fails
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.writer import Event, SessionLog
        finally:
            if hidden:
                del sys.modules["torch"]
        self._event, self._scalar = Event, summary.scalar
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        if purge_step is not None:
            self._write(purge_step, file_version="brain.Event:2")
            self._write(purge_step, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event(step=step, wall_time=time.time(), **content))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one point per scalar."""
        for name, value in scalars.items():
            self._write(step, summary=self._scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Writer:
    """Scalars of a run, to metrics.jsonl and to TensorBoard; only the first process writes.

    After an interruption, lines beyond the restored step are dropped: they will be written
    again. With `restored_step` None nothing is dropped. Files in a bucket cannot grow:
    there, both are written here first and copied by `sync`.

    Attributes:
        restored: the last line of training that was kept; empty without one.
    """

    def __init__(self, workdir: files.Path, restored_step: int | None):
        self._events = self._lines = None
        self.restored: Mapping[str, float] = {}
        if jax.process_index():
            return
        path = workdir / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    found = json.loads(line)
                    step = found["step"]
                except (json.JSONDecodeError, KeyError):
                    continue  # cut off in the middle of a line
                if restored_step is None or step <= restored_step:
                    kept.append(line + "\n")
                    self.restored = found if "loss" in found else self.restored
        self._remote = workdir if files.is_remote(workdir) else None
        self._here = pathlib.Path(tempfile.mkdtemp()) if self._remote else pathlib.Path(workdir)
        files.write(self._here / "metrics.jsonl", "".join(kept))
        self._lines = open(self._here / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        purge_step = None if restored_step is None else restored_step + 1
        self._events = _Events(self._here, purge_step)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line {"step": …, …} and one TensorBoard point per scalar."""
        if self._lines is None or self._events is None:
            return
        files.check(self._here / "metrics.jsonl")
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        self._events.write(step, scalars)

    def sync(self) -> None:
        """Copies what is written to the bucket; before a checkpoint, which vouches for it."""
        if self._lines is None or self._events is None or self._remote is None:
            return
        for file in self._here.iterdir():
            files.write(self._remote / file.name, file.read_bytes())

    def close(self) -> None:
        if self._lines is not None and self._events is not None:
            self.sync()
            self._lines.close()
            self._events.close()
            if self._remote is not None:
                shutil.rmtree(self._here)


@contextlib.contextmanager
def writing(
    workdir: files.Path, restored_step: int | None, given: Writer | None
) -> Generator[Writer, None, None]:
    """Gives the writer of a run's scalars: the one given, which stays open, or the workdir's own.

    Args:
        workdir: the run's directory, or that of an evaluation's results.
        restored_step: as in `Writer`.
        given: takes the scalars in place of the workdir's files; None = these.
    """
    if given is not None:
        yield given
        return
    with contextlib.closing(Writer(workdir, restored_step)) as own:
        yield own


def warn(text: str) -> None:
    """Prints a warning on stderr, from the first process only."""
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
