"""Traces of some training steps (`config.profile`), for XProf, also in TensorBoard."""

import pathlib
import re
import shutil
import tempfile
from types import TracebackType

import jax

from save_jax import files
from save_jax.errors import UserError
from save_jax.progress import say

DIRECTORY = "profile"  # within a workdir


def steps_of(profile: str) -> range:
    """Reads config.profile: "10:20" is the steps 10 to 19, counted from 1; "" is none.

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(r"([1-9]\d*):(\d+)", profile)
    steps = range(*map(int, found.groups())) if found else range(0)
    if profile and not steps:
        raise UserError(
            f"config.profile = {profile!r}: expected FIRST:END, say 10:20 for the steps 10 to 19, "
            "counted from 1; or nothing, for no trace"
        )
    return steps


class Trace:
    """Traces some steps of a run, on each of its processes.

    The trace of process N goes to WORKDIR/profile/process-N; for a workdir in a bucket it is
    written here, and copied at its end. It is a context manager: a trace ends at the latest when
    it is left.

    Args:
        steps: those to trace.
        workdir: the run's directory.
        first: updates done before this process began.
    """

    def __init__(self, steps: range, workdir: files.Path, first: int):
        self._steps = range(max(steps.start, first + 1), steps.stop)
        self._where = workdir / DIRECTORY / f"process-{jax.process_index()}"
        self._writing: pathlib.Path | None = None  # while a trace runs
        if steps and not self._steps:
            say(
                f"config.profile = '{steps.start}:{steps.stop}': no trace is written, because the "
                f"run resumes after step {first}"
            )

    def turns(self, step: int) -> bool:
        """Says whether a trace begins or ends before this step."""
        return bool(self._steps) and step in (self._steps.start, self._steps.stop)

    def turn(self, step: int) -> None:
        """Begins the trace, or ends it, when all steps before this one are done."""
        if step != self._steps.start:
            self._end()
            return
        remote = files.is_remote(self._where)
        self._writing = pathlib.Path(tempfile.mkdtemp() if remote else self._where)
        jax.profiler.start_trace(self._writing)

    def _end(self) -> None:
        if self._writing is None:
            return
        here, self._writing = self._writing, None
        files.check(self._where)
        jax.profiler.stop_trace()
        if files.is_remote(self._where):
            for file in here.rglob("*"):
                if file.is_file():
                    target = self._where / file.relative_to(here).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    files.write(target, file.read_bytes())
            shutil.rmtree(here)
        say(f"the trace of config.profile is in {self._where}")

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._end()
