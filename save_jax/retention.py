"""Which checkpoints of a run are kept: the latest, the best, and those still to be evaluated."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import checkpoint_managers

from save_jax import distributed, files, locks, results
from save_jax.progress import say

LATEST = 2  # the one before, should the last turn out to be damaged


class Decision(NamedTuple):
    """What happens to a run's checkpoints.

    Attributes:
        kept: steps whose checkpoints stay.
        unevaluated: steps, of the others, that were to be evaluated and now never will be.
    """

    kept: frozenset[int]
    unevaluated: tuple[int, ...]


def decide(
    steps: Collection[int],
    due: Collection[int],
    evaluated: Collection[int],
    best: Collection[int],
    most: int,
) -> Decision:
    """Decides which checkpoints are kept.

    Whether a follower lives makes no difference: without one, the trainer leaves nothing to
    evaluate behind, and what a follower has left behind another may still evaluate.

    Args:
        steps: of all checkpoints.
        due: those to be evaluated.
        evaluated: those that are.
        best: those that are the best so far.
        most: how many are kept, the latest first, because they are still to be evaluated.
    """
    ordered = sorted(steps)
    waiting = [step for step in ordered if step in due and step not in evaluated]
    kept = {*ordered[-LATEST:], *waiting[-most:], *(step for step in best if step in ordered)}
    return Decision(frozenset(kept), tuple(step for step in waiting if step not in kept))


class Retention:
    """Decides, from what lies in a workdir, which of its checkpoints are kept: orbax asks it.

    Args:
        workdir: the run's directory.
        split: the run's own evaluation split; "" = whatever was evaluated counts.
        due: says whether a step is to be evaluated.
        most: see `decide`; config.follow_keep.
    """

    def __init__(
        self,
        workdir: files.Path,
        split: str = "",
        due: Callable[[int], bool] = lambda step: False,
        most: int = LATEST,
    ):
        self._workdir, self._split, self._due, self._most = workdir, split, due, most

    def __call__(self, steps: Sequence[int]) -> frozenset[int]:
        """Returns those of the steps that are kept, and says what of them is lost."""
        values = {step: results.value(self._workdir, step, self._split) for step in steps}
        # An evaluation counts from the moment on that its metrics are there, whether or not
        # whoever wrote them has come to write best.json.
        found = results.best(self._workdir, steps, self._split)
        best = {results.read_best(self._workdir), found[1] if found else None}
        # Whoever evaluates a checkpoint holds that directory: it may be the best one in a moment.
        held = [s for s in steps if (results.results_at(self._workdir, s) / locks.LOCK).exists()]
        decision = decide(
            steps,
            [step for step in steps if self._due(step)],
            [step for step, total in values.items() if total is not None],
            [step for step in best if step is not None],
            self._most,
        )
        for step in set(decision.unevaluated) - set(held):
            say(
                f"checkpoint {step} is dropped before it was evaluated: {self._most} later ones "
                "(config.follow_keep) wait for the follower"
            )
        return decision.kept | frozenset(held)

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: checkpoint_managers.PreservationContext
    ) -> list[bool]:
        """Says of each checkpoint, in order, whether it is kept; on all processes the same."""
        del context
        steps = [found.step for found in checkpoints]
        kept = self(steps) if jax.process_index() == 0 else ()
        return distributed.of_first(np.asarray([step in kept for step in steps], bool)).tolist()
