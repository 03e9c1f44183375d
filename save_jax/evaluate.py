"""Embed, score, rank: text-to-video and video-to-text retrieval over a whole split (spec 9)."""

import contextlib
import csv
import io
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from save_jax import checkpoint, files, metrics, ranking, results, sharding
from save_jax.batch import Batch
from save_jax.messages import counted
from save_jax.models import save
from save_jax.parameters import Parameters, Structure
from save_jax.progress import Progress, Writer, say
from save_jax.similarity import normalise, similarity

ABLATED_UP_TO = 20_000  # videos; each view of them takes as much host memory as the whole model's
SIMILARITY = "similarity.npy"
Heed = Callable[[], None]  # called between batches; raises what ends the evaluation


def _go_on() -> None:
    """Heeds nothing."""


class EvaluationSet(NamedTuple):
    """A split to retrieve from.

    Attributes:
        split: its name.
        batches: starts a pass over all clips, for embedding them.
        video_ids: one per clip.
        captions: the queries.
        caption_ids: int32 [captions, L], their byte-pair ids.
        video_of_caption: int32 [captions], the row of each caption's clip.
        groups: one query group per caption, "" for none.
        settings: what else the results depend on, for their protocol (`config.protocol`).
    """

    split: str
    batches: Callable[[], Iterator[Batch]]
    video_ids: Sequence[str]
    captions: Sequence[str]
    caption_ids: np.ndarray
    video_of_caption: np.ndarray
    groups: Sequence[str]
    settings: Mapping[str, Any] = {}

    @property
    def digest(self) -> str:
        """What tells its data from others of the same name; "" where nothing does."""
        return self.settings.get("data", {}).get("digest", "")


class Evaluator:
    """The compiled functions of evaluation, for one model on one mesh.

    Args:
        structure: the model's.
        mesh: devices.
        batch_size: the most captions of a batch, over all devices.
        local_weight: of the similarity (spec section 5).
        matrix_entries: captions × videos up to which similarity.npy is written.

    Attributes:
        encode_video: jitted; (parameters, global batch) -> `save.Views` of unit frames.
        encode_text: jitted; (parameters, global int32 [B, L]) -> unit vectors.
    """

    def __init__(
        self,
        structure: Structure,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        local_weight: float,
        matrix_entries: int,
    ):
        self._mesh, self._batch_size = mesh, batch_size
        self.matrix_entries = matrix_entries

        def encode_video(params: Parameters, batch: Batch) -> save.Views:
            model = save.merge(structure, params)
            with sharding.on_mesh(mesh):
                views = model.encode_views(batch)
            ablated = {name: normalise(frames) for name, frames in views.ablated.items()}
            gates = {name: values.astype(jnp.float32) for name, values in views.gates.items()}
            return save.Views(normalise(views.frames), views.mask, ablated, gates)

        def encode_text(params: Parameters, ids: jax.Array) -> jax.Array:
            with sharding.on_mesh(mesh):
                return normalise(save.merge(structure, params).encode_text(ids))

        def score(logit_scale: jax.Array, text: jax.Array, video: tuple) -> jax.Array:
            return similarity(text, *video, jnp.exp(logit_scale), local_weight)

        # Replicated outputs: every process can read the embeddings of the whole global batch.
        everywhere = sharding.replicated(mesh)
        self.encode_video = jax.jit(encode_video, out_shardings=everywhere)
        self.encode_text = jax.jit(encode_text, out_shardings=everywhere)
        self._ranker = ranking.Ranker(score, mesh)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], structure: Structure, mesh: jax.sharding.Mesh
    ) -> "Evaluator":
        """Returns the evaluator that a config describes."""
        size, entries = (config[f"eval_{key}"] for key in ("caption_batch_size", "matrix_entries"))
        return cls(structure, mesh, size, config["loss"]["local_weight"], entries)

    def embed_videos(
        self, params: Parameters, data: EvaluationSet, heed: Heed = _go_on
    ) -> save.Views:
        """Returns the embeddings of a split's videos, on the host and in the split's order.

        Views with branches left out are of up to ABLATED_UP_TO videos.
        """
        count = len(data.video_ids)
        found: save.Views | None = None
        progress = Progress("embedding videos", count)
        everywhere = sharding.replicated(self._mesh)
        for _, batch in sharding.prefetch(data.batches(), self._mesh):
            heed()
            index = np.asarray(jax.device_put(batch.index, everywhere))
            part = self.encode_video(params, batch)
            if count > ABLATED_UP_TO:
                part = part._replace(ablated={})
            if found is None:
                found = jax.tree.map(lambda x: np.zeros((count, *x.shape[1:]), x.dtype), part)
            rows = index >= 0
            for all_videos, here in zip(jax.tree.leaves(found), jax.tree.leaves(part), strict=True):
                all_videos[index[rows]] = np.asarray(here)[rows]
            progress.advance(int(rows.sum()))
        progress.close()
        assert found is not None  # a split without clips has no captions
        return found

    def embed_captions(
        self, params: Parameters, caption_ids: np.ndarray, heed: Heed = _go_on
    ) -> np.ndarray:
        """Returns float32 [captions, D], unit vectors."""
        count = len(caption_ids)
        size = sharding.even_size(count, self._batch_size, self._mesh.size)
        embeddings: list[np.ndarray] = []
        running: jax.Array | None = None
        for start in range(0, count, size):
            heed()
            batch = sharding.put_rows(caption_ids[start : start + size], size, self._mesh)
            # The next batch is on its way before the last one is waited for.
            last, running = running, self.encode_text(params, batch)
            if last is not None:
                embeddings.append(np.asarray(last))
        return np.concatenate([*embeddings, np.asarray(running)])[:count]

    def evaluate(
        self,
        params: Parameters,
        data: EvaluationSet,
        keep: ranking.Keep | None = None,
        heed: Heed = _go_on,
    ) -> tuple[dict[str, Any], dict]:
        """Embeds and ranks a split.

        Args:
            params: all of the model's.
            data: the split.
            keep: gets every tile of the similarity matrix.
            heed: called before each batch and each ranking, on all processes as often.

        Returns:
            The NumPy arrays of ranks.npz by name (`save_jax/README.md`), and the metrics
            (`metrics.of_ranks`).
        """
        text = self.embed_captions(params, data.caption_ids, heed)
        videos = self.embed_videos(params, data, heed)

        def rank(frames: Any, keep: ranking.Keep | None = None) -> ranking.Ranks:
            heed()
            scale, video = params["clip.logit_scale"], (frames, videos.mask)
            return self._ranker.rank(scale, text, video, data.video_of_caption, keep)

        ranks = rank(videos.frames, keep)
        arrays = {
            "t2v_rank": ranks.t2v,
            "own_score": ranks.own,
            "best_videos": ranks.best,
            "best_scores": ranks.best_scores,
            "v2t_rank": ranks.v2t,
            **{f"{branch}_gates": gates for branch, gates in videos.gates.items()},
            **{f"t2v_rank_{name}": rank(frames).t2v for name, frames in videos.ablated.items()},
        }
        return arrays, metrics.of_ranks(ranks.t2v, ranks.v2t[ranks.v2t >= 0], data.groups)


def protocol(data: EvaluationSet, selection: str) -> dict:
    """Returns what the metrics depend on: without it, two tables cannot be compared."""
    videos, captions = len(data.video_ids), len(data.captions)
    captioned = len(np.unique(data.video_of_caption))
    return {
        "split": data.split,
        "captions": captions,
        "videos": videos,
        "videos_with_captions": captioned,
        "selection": selection,
        "ties": "count against the model",
        "v2t": "the only caption of each video"
        if captions == captioned
        else "the best of each video's captions",
        **data.settings,
    }


@contextlib.contextmanager
def _similarity_file(
    directory: files.Path, captions: int, videos: int, entries: int
) -> Generator[ranking.Keep | None, None, None]:
    """Gives what writes tiles of scores to similarity.npy, which appears at the end.

    Without it, gives None, and removes the file of an earlier evaluation.

    Args:
        directory: as in `write`.
        captions, videos: rows and columns.
        entries: the most that are written.
    """
    path, vouching = directory / SIMILARITY, directory / results.METRICS
    if captions * videos > entries:
        yield None
        if jax.process_index() == 0:
            vouching.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    elif jax.process_index():
        yield lambda rows, first, scores: None  # but tiles are gathered by all processes
    else:
        directory.mkdir(parents=True, exist_ok=True)
        with files.appearing(path) as temporary:
            matrix = np.lib.format.open_memmap(temporary, "w+", np.float32, (captions, videos))
            files.reserve(temporary)

            def keep(rows: np.ndarray, first: int, scores: jax.Array) -> None:
                tile = np.asarray(scores)[: len(rows), : videos - first]
                matrix[rows, first : first + tile.shape[1]] = tile

            yield keep
            matrix.flush()
            vouching.unlink(missing_ok=True)  # for what an earlier evaluation has left


def write(
    directory: files.Path, data: EvaluationSet, arrays: Mapping[str, Any], result: dict
) -> None:
    """Writes one evaluation as the command-line contract says; metrics.json comes last.

    Args:
        directory: evaluation/STEP in a workdir.
        data: names of the captions and videos.
        arrays: those of ranks.npz (`Evaluator.evaluate`).
        result: metrics, with their protocol.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with files.appearing(directory / "ranks.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    captions = zip(data.captions, data.video_of_caption, data.groups, strict=True)
    _write_csv(
        directory / "captions.csv",
        ("caption", "video_id", "group"),
        ((caption, data.video_ids[row], group) for caption, row, group in captions),
    )
    _write_csv(directory / "videos.csv", ("video_id",), ((video,) for video in data.video_ids))
    files.write(directory / results.METRICS, json.dumps(result, indent=2) + "\n")


def _write_csv(path: files.Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    files.write(path, text.getvalue())


def announce(
    data: EvaluationSet, source: str, step: int, workdir: files.Path, subset: str
) -> files.Path:
    """Says what is about to be evaluated, on what, and where the results go; returns the latter."""
    where = results.results_at(workdir, step, subset)
    say(
        f"evaluating checkpoint {source} (step {step}) on the split {data.split!r}: "
        f"{counted(len(data.captions), 'caption')}, {counted(len(data.video_ids), 'video')}; "
        f"the results go to {where}"
    )
    return where


def run_evaluation(
    params: Parameters,
    step: int,
    selection: str,
    *,
    data: EvaluationSet,
    evaluator: Evaluator,
    writer: Writer,
    workdir: files.Path,
    source: str = "",
    subset: str = "",
    heed: Heed = _go_on,
    saved: bool = True,
) -> dict:
    """Evaluates parameters, writes evaluation/STEP, scalars and the table; returns the metrics.

    Of a run's own checkpoint on its own split, best.json is written too.

    Args:
        params: all of the model's.
        step: updates that made them.
        selection: when or why these, in words, for the protocol and the table.
        data, evaluator: what to evaluate, and how.
        writer, workdir: where results go.
        source: where the parameters are from; "" = the workdir's checkpoint of this step.
        subset: names what is evaluated where it is not the run's own evaluation split: results
            then go to evaluation/STEP/SUBSET, and scalars to eval/SUBSET/…
        heed: as in `Evaluator.evaluate`.
        saved: whether their checkpoint is complete; it may still be on its way, or may be gone.
    """
    directory = results.results_at(workdir, step, subset)
    shape, most = (len(data.captions), len(data.video_ids)), evaluator.matrix_entries
    with _similarity_file(directory, *shape, most) as keep:
        arrays, found = evaluator.evaluate(params, data, keep, heed)
    facts = {**protocol(data, selection), "checkpoint": source or f"{checkpoint.DIRECTORY}/{step}"}
    written = {"written": keep is not None, "entries": math.prod(shape), "most": most}
    result: dict[str, Any] = {"step": step, "protocol": facts, SIMILARITY: written, **found}
    if keep is None:
        say(
            f"{SIMILARITY} is not written: it would have {math.prod(shape):,} entries, more than "
            f"config.eval_matrix_entries = {most:,}. Ranks and scores of the best are in ranks.npz"
        )
    name = f"eval/{subset}" if subset else "eval"
    writer.write_scalars(
        step,
        {
            **{f"{name}/t2v/{k}": v for k, v in result["t2v"].items()},
            **{f"{name}/v2t/{k}": v for k, v in result["v2t"].items()},
            **{f"{name}/{k}/R1": group["t2v"]["R1"] for k, group in result["groups"].items()},
        },
    )
    writer.sync()  # metrics.json, which comes last, vouches for the scalars
    if jax.process_index() == 0:
        write(directory, data, arrays, result)
        if not subset:
            steps = {*checkpoint.complete_steps(workdir), *(() if saved else (step,))}
            results.write_best(workdir, steps, data.split)
    say(
        f"\n{data.split}: {counted(len(data.captions), 'caption')}, "
        f"{counted(len(data.video_ids), 'video')}, "
        f"{selection}\n{metrics.table(result)}\n"
    )
    return result


def run_evaluations(
    models: Mapping[str, Parameters], step: int, selection: str, *, subset: str = "", **rest: Any
) -> None:
    """Evaluates parameters and, before them, their average.

    Args:
        models: parameters by the name of their results (`averaging.models`), "" last: its
            metrics.json says that all are evaluated.
        step, selection, subset: as in `run_evaluation`. The name follows after the latter two, so
            the average's results go to evaluation/STEP/ema or evaluation/STEP/SUBSET/ema.
        rest: the other arguments of `run_evaluation`.
    """
    for name, params in models.items():
        run_evaluation(
            params,
            step,
            f"{selection}, {name}" if name else selection,
            subset="/".join(filter(None, (subset, name))),
            **rest,
        )
