"""Embed, score, rank: text-to-video and video-to-text retrieval over a whole split (spec 9)."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from save_jax import files, metrics, sharding
from save_jax.batch import Batch
from save_jax.checkpoint import BEST_METRIC, DIRECTORY
from save_jax.messages import counted
from save_jax.models import save
from save_jax.parameters import Parameters, Structure
from save_jax.progress import Progress, Writer, say
from save_jax.similarity import normalise, similarity

CAPTIONS_AT_ONCE, VIDEOS_AT_ONCE = 512, 2048  # a tile of the similarity matrix on the device


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


class Evaluator:
    """The compiled functions of evaluation, for one model on one mesh.

    Attributes:
        encode_video: jitted; (parameters, global batch) -> unit frames and their mask.
        encode_text: jitted; (parameters, global int32 [B, L]) -> unit vectors.
    """

    def __init__(
        self, structure: Structure, mesh: jax.sharding.Mesh, batch_size: int, local_weight: float
    ):
        self._mesh, self._batch_size = mesh, batch_size

        def encode_video(params: Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = save.merge(structure, params)
            with sharding.on_mesh(mesh):
                video = model.encode_video(batch)
            return normalise(video.fused), video.mask

        def encode_text(params: Parameters, ids: jax.Array) -> jax.Array:
            with sharding.on_mesh(mesh):
                return normalise(save.merge(structure, params).encode_text(ids))

        def score(text, frames, mask, logit_scale):
            return similarity(text, frames, mask, jnp.exp(logit_scale), local_weight)

        # Replicated outputs: every process can read the embeddings of the whole global batch.
        everywhere = sharding.replicated(mesh)
        self.encode_video = jax.jit(encode_video, out_shardings=everywhere)
        self.encode_text = jax.jit(encode_text, out_shardings=everywhere)
        self._score = jax.jit(score)

    def embed_videos(
        self, params: Parameters, data: EvaluationSet
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns float32 [videos, F, D] unit frames and bool [videos, F] masks, in split order."""
        frames: np.ndarray | None = None
        mask: np.ndarray | None = None
        progress = Progress("embedding videos", len(data.video_ids))
        everywhere = sharding.replicated(self._mesh)
        for _, batch in sharding.prefetch(data.batches(), self._mesh):
            index = np.asarray(jax.device_put(batch.index, everywhere))
            unit, real = map(np.asarray, self.encode_video(params, batch))
            if frames is None or mask is None:
                frames = np.zeros((len(data.video_ids), *unit.shape[1:]), np.float32)
                mask = np.zeros((len(data.video_ids), real.shape[1]), bool)
            rows = index >= 0
            frames[index[rows]], mask[index[rows]] = unit[rows], real[rows]
            progress.advance(int(rows.sum()))
        progress.close()
        assert frames is not None and mask is not None  # a split without clips has no captions
        return frames, mask

    def embed_captions(self, params: Parameters, caption_ids: np.ndarray) -> np.ndarray:
        """Returns float32 [captions, D], unit vectors."""
        embeddings = []
        for start in range(0, len(caption_ids), self._batch_size):
            ids = caption_ids[start : start + self._batch_size]
            batch = sharding.put_rows(ids, self._batch_size, self._mesh)
            embeddings.append(np.asarray(self.encode_text(params, batch))[: len(ids)])
        return np.concatenate(embeddings)

    def similarity(
        self, params: Parameters, text: np.ndarray, frames: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """Returns float32 [captions, videos], computed tile by tile."""
        logit_scale = np.asarray(params["clip.logit_scale"])
        scores = np.empty((len(text), len(frames)), np.float32)
        rows, columns = min(CAPTIONS_AT_ONCE, len(text)), min(VIDEOS_AT_ONCE, len(frames))

        def tile(array: np.ndarray, start: int, size: int) -> np.ndarray:
            part = array[start : start + size]  # padded to one shape, so that one program serves
            return np.pad(part, [(0, size - len(part))] + [(0, 0)] * (array.ndim - 1))

        for j in range(0, len(frames), columns):
            videos = jax.device_put((tile(frames, j, columns), tile(mask, j, columns)))
            for i in range(0, len(text), rows):
                part = np.asarray(self._score(tile(text, i, rows), *videos, logit_scale))
                scores[i : i + rows, j : j + columns] = part[: len(text) - i, : len(frames) - j]
        return scores

    def evaluate(self, params: Parameters, data: EvaluationSet) -> tuple[np.ndarray, dict]:
        """Returns a split's similarity matrix and metrics (`metrics.retrieval_metrics`)."""
        text = self.embed_captions(params, data.caption_ids)
        frames, mask = self.embed_videos(params, data)
        scores = self.similarity(params, text, frames, mask)
        result = metrics.retrieval_metrics(scores, data.video_of_caption, data.groups)
        return scores, result


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


def write(directory: files.Path, data: EvaluationSet, scores: np.ndarray, result: dict) -> None:
    """Writes one evaluation as the command-line contract says; metrics.json comes last.

    Args:
        directory: evaluation/STEP in a workdir.
        data: names of the rows and columns.
        scores: float32 [captions, videos].
        result: metrics, with their protocol.
    """
    directory.mkdir(parents=True, exist_ok=True)
    matrix = io.BytesIO()
    np.save(matrix, scores)
    files.write(directory / "similarity.npy", matrix.getvalue())
    captions = zip(data.captions, data.video_of_caption, data.groups, strict=True)
    _write_csv(
        directory / "captions.csv",
        ("caption", "video_id", "group"),
        ((caption, data.video_ids[row], group) for caption, row, group in captions),
    )
    _write_csv(directory / "videos.csv", ("video_id",), ((video,) for video in data.video_ids))
    files.write(directory / "metrics.json", json.dumps(result, indent=2) + "\n")


def _write_csv(path: files.Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    files.write(path, text.getvalue())


def results_at(workdir: files.Path, step: int, subset: str = "") -> files.Path:
    """Returns where an evaluation's results go: evaluation/STEP or evaluation/STEP/SUBSET."""
    return workdir / "evaluation" / str(step) / subset


def announce(
    data: EvaluationSet, source: str, step: int, workdir: files.Path, subset: str
) -> files.Path:
    """Says what is about to be evaluated, on what, and where the results go; returns the latter."""
    results = results_at(workdir, step, subset)
    say(
        f"evaluating checkpoint {source} (step {step}) on the split {data.split!r}: "
        f"{counted(len(data.captions), 'caption')}, {counted(len(data.video_ids), 'video')}; "
        f"the results go to {results}"
    )
    return results


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
) -> dict:
    """Evaluates parameters, writes evaluation/STEP, scalars and the table; returns the metrics.

    Args:
        params: all of the model's.
        step: updates that made them.
        selection: when or why these, in words, for the protocol and the table.
        data, evaluator: what to evaluate, and how.
        writer, workdir: where results go.
        source: where the parameters are from; "" = the workdir's checkpoint of this step.
        subset: names what is evaluated where it is not the run's own evaluation split: results
            then go to evaluation/STEP/SUBSET, and scalars to eval/SUBSET/…
    """
    scores, result = evaluator.evaluate(params, data)
    facts = {**protocol(data, selection), "checkpoint": source or f"{DIRECTORY}/{step}"}
    result: dict[str, Any] = {"step": step, "protocol": facts, **result}
    if jax.process_index() == 0:
        write(results_at(workdir, step, subset), data, scores, result)
    name = f"eval/{subset}" if subset else "eval"
    writer.write_scalars(
        step,
        {
            **{f"{name}/t2v/{k}": v for k, v in result["t2v"].items()},
            **{f"{name}/v2t/{k}": v for k, v in result["v2t"].items()},
            **{f"{name}/{k}/R1": group["t2v"]["R1"] for k, group in result["groups"].items()},
        },
    )
    say(
        f"\n{data.split}: {counted(len(data.captions), 'caption')}, "
        f"{counted(len(data.video_ids), 'video')}, "
        f"{selection}\n{metrics.table(result)}\n"
    )
    return result


def _is_own(result: dict[str, Any], split: str) -> bool:
    own = {"checkpoint": f"{DIRECTORY}/{result['step']}", "split": split}
    # What an evaluation of an earlier version does not say counts as the run's own.
    said = result.get("protocol", {})
    return all(said.get(key, value) == value for key, value in own.items())


def summarise(workdir: files.Path, split: str) -> None:
    """Prints the last evaluation's table, and the best one's where that is another.

    Only the run's own count: not those of other weights or another split, which may be there too.
    """
    results = [
        result
        for path in (workdir / "evaluation").glob("*/metrics.json")
        if _is_own(result := json.loads(path.read_text()), split)
    ]
    results.sort(key=lambda result: result["step"])
    last = results[-1]
    # Of equal ones the later, as the checkpoints' retention has it.
    best = max(results, key=lambda result: (result["t2v"][BEST_METRIC], result["step"]))
    say(f"last step ({last['step']}), {split} split:\n{metrics.table(last)}")
    if best["step"] != last["step"]:
        say(
            f"\nbest of {len(results)} evaluations on the {split} split itself (step "
            f"{best['step']}; an optimistic protocol):\n{metrics.table(best)}"
        )
    say(f"\neverything is in {workdir}")
