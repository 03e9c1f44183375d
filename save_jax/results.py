"""What evaluations have written to a workdir, and what follows: the best checkpoint, the summary.

`evaluation/STEP/metrics.json` is written last, so an evaluation with it is complete. best.json
follows from these files and from which checkpoints there are: whoever evaluates, the trainer, its
follower or an `evaluate`, writes the same.
"""

import contextlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import jax

from save_jax import files, metrics, recorded
from save_jax.progress import say

CHECKPOINTS = "checkpoints"  # within a workdir
BEST = "best.json"  # likewise
METRICS = "metrics.json"  # of each evaluation
BEST_METRIC = "SumR"  # of text→video
TEST = "test"  # below evaluation/STEP: results of config.data.test_split, whatever its name


def results_at(workdir: files.Path, step: int, subset: str = "") -> files.Path:
    """Returns where an evaluation's results go: evaluation/STEP or evaluation/STEP/SUBSET."""
    return workdir / "evaluation" / str(step) / subset


def read(path: files.Path) -> dict[str, Any] | None:
    """Returns an evaluation's metrics; None where they are absent or, after a fault, damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(found, dict) and "step" in found and BEST_METRIC in found.get("t2v", ())
    return found if whole else None


def is_own(result: dict[str, Any], digests: Mapping[str, str], split: str = "") -> bool:
    """Says whether metrics are of the run's own checkpoint and, where one is given, of a split.

    They are not where the data have that name but are others than the run's.

    Args:
        result: of `read`.
        digests: of the run's splits (`recorded.digests`).
        split: what it must have been evaluated on; "" = whatever it was.
    """
    said = result.get("protocol", {})
    own = {"checkpoint": f"{CHECKPOINTS}/{result['step']}"} | ({"split": split} if split else {})
    # What an evaluation of an earlier version does not say counts as the run's own.
    if any(said.get(key, value) != value for key, value in own.items()):
        return False
    digest = said.get("data", {}).get("digest")
    return not digest or digests.get(said.get("split", split), digest) == digest


def own(
    workdir: files.Path,
    step: int,
    split: str = "",
    subset: str = "",
    digests: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """Returns the metrics of a checkpoint of the run; None where no evaluation of it is complete.

    Args:
        workdir: the run's directory.
        step: updates that made the checkpoint.
        split: what it must have been evaluated on; "" = whatever it was.
        subset: of the results, say TEST.
        digests: as in `is_own`; None reads them, once for many evaluations.
    """
    result = read(results_at(workdir, step, subset) / METRICS)
    if result is None:
        return None
    digests = recorded.digests(workdir) if digests is None else digests
    return result if is_own(result, digests, split) else None


def value(
    workdir: files.Path, step: int, split: str = "", digests: Mapping[str, str] | None = None
) -> float | None:
    """Returns what a checkpoint's evaluation gives it among the others; None without one.

    Of a run of an earlier version it may stand with the checkpoint alone. Arguments as in `own`.
    """
    result = own(workdir, step, split, digests=digests)
    if result is not None:
        return result["t2v"][BEST_METRIC]
    with contextlib.suppress(OSError, ValueError, KeyError):
        beside = workdir / CHECKPOINTS / str(step) / "metrics" / "metrics"
        return json.loads(beside.read_text())[BEST_METRIC]
    return None


def best(workdir: files.Path, steps: Collection[int], split: str = "") -> tuple[float, int] | None:
    """Returns value and step of the best of some checkpoints, of equal ones the later."""
    digests = recorded.digests(workdir)
    values = ((value(workdir, step, split, digests), step) for step in steps)
    return max(((total, step) for total, step in values if total is not None), default=None)


def subset(config: Mapping[str, Any], workdir: files.Path, digest: str = "") -> str:
    """Names what a config evaluates, where that differs from the workdir's own run.

    Args:
        config: all of the evaluation's.
        workdir: the run's directory, perhaps.
        digest: of the split's data, where it is open.

    Returns:
        "" for the run's own evaluation split, or in a workdir without a run; else the split's name,
        after those of the data set and variant where these differ too, and before the digest of
        the data where these are others of the same name.

    Raises:
        UserError: the run's config.json cannot be read.
    """
    path = workdir / recorded.RECORDED
    if not path.exists():
        return ""
    own, data = recorded.read(path).get("data", {}), config["data"]
    same = {key: own.get(key) == data[key] for key in ("dataset", "variant", "eval_split")}
    names = [data["eval_split"]]
    if all(same.values()):
        other = digest and recorded.digests(workdir).get(names[0], digest) != digest
        return f"{names[0]}-{digest[:8]}" if other else ""
    if not (same["dataset"] and same["variant"]):
        names = [data["dataset"], data["variant"], *names]
    return "-".join(filter(None, names))


def read_best(workdir: files.Path) -> int | None:
    """Returns the step of best.json; None where there is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return int(json.loads((workdir / BEST).read_text())["step"])
    return None


def write_best(workdir: files.Path, steps: Collection[int], split: str) -> None:
    """Writes best.json.

    Args:
        workdir: the run's directory.
        steps: checkpoints that there are.
        split: the run's own evaluation split.
    """
    found = best(workdir, steps, split)
    if found is None:
        return
    total, step = found
    protocol = (own(workdir, step, split) or {}).get("protocol", {})
    named = {
        "step": step,
        "metric": BEST_METRIC,
        "value": total,
        "split": split,
        "selection": protocol.get("selection", ""),
    }
    files.write(workdir / BEST, json.dumps(named, indent=2) + "\n")


def drop_beyond(workdir: files.Path, step: int, split: str) -> None:
    """Removes what says that the run's evaluations beyond a step are complete.

    A run that goes on from an earlier checkpoint makes the later ones, and evaluates them, again.
    The first process removes; on the others, nothing happens.
    """
    if jax.process_index():
        return
    digests = recorded.digests(workdir)
    for folder in (workdir / "evaluation").glob("*"):
        if not folder.name.isdigit() or int(folder.name) <= step:
            continue
        # Not those of other weights, or of other splits and data, which are as true as before.
        for subset, of in (("", split), ("ema", split), (TEST, ""), (f"{TEST}/ema", "")):
            if own(workdir, int(folder.name), of, subset, digests) is not None:
                (folder / subset / METRICS).unlink()


def summarise(workdir: files.Path, split: str, test_split: str = "") -> None:
    """Prints the last evaluation's table and the best one's, and both on the test split if any.

    Only the run's own count: not those of other weights or another split, which may be there too.

    Args:
        workdir: the run's directory.
        split: whose results choose the best checkpoint.
        test_split: whose results are reported of it; "" = those of `split` itself.
    """
    digests = recorded.digests(workdir)
    results = [
        result
        for path in (workdir / "evaluation").glob(f"*/{METRICS}")
        if (result := read(path)) and is_own(result, digests, split)
    ]
    results.sort(key=lambda result: result["step"])
    if not results:
        say(f"no evaluation on the {split} split can be read in {workdir}")
        return
    last = results[-1]
    # Of equal ones the later, as the checkpoints' retention has it.
    top = max(results, key=lambda result: (result["t2v"][BEST_METRIC], result["step"]))
    if test_split:
        kept = read_best(workdir)
        top = next((result for result in results if result["step"] == kept), top)
    say(f"last step ({last['step']}), {split} split:\n{metrics.table(last)}")
    if top["step"] != last["step"]:
        how = f"which chooses the checkpoint for {test_split}" if test_split else "itself"
        optimistic = "" if test_split else "; an optimistic protocol"
        say(
            f"\nbest of {len(results)} evaluations on the {split} split {how} (step "
            f"{top['step']}{optimistic}):\n{metrics.table(top)}"
        )
    if test_split:
        of_test = {
            step: own(workdir, step, test_split, TEST) for step in (top["step"], last["step"])
        }
        for step, result in of_test.items():
            why = f"chosen on {split}" if step == top["step"] else "the last step"
            why += ", and the last step" if step == top["step"] == last["step"] else ""
            say(
                f"\n{test_split} split, step {step} ({why}):\n{metrics.table(result)}"
                if result
                else f"\n{test_split} split, step {step} ({why}): not evaluated"
            )
    say(f"\neverything is in {workdir}")
