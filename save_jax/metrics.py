"""Retrieval metrics: ranks, R@K, SumR, by direction and by query group (spec section 9).

Ranks of a whole similarity matrix define what `save_jax.ranking` counts without one.
"""

from collections.abc import Sequence

import numpy as np

from save_jax.messages import counted

Metrics = dict[str, float]


def check_finite(broken: int, size: int) -> None:
    """Raises ValueError where any of `size` similarities, `broken` of them, is not finite."""
    if broken:
        raise ValueError(
            f"{broken} of {size} similarities are not finite: the parameters are broken"
        )


def check_targets(target: np.ndarray, gallery: int) -> None:
    """Raises ValueError where a target is no column of a gallery."""
    absent = target[(target < 0) | (target >= gallery)]
    if absent.size:
        raise ValueError(
            f"{absent.size} targets are not in the gallery, such as column {absent[0]} of "
            f"{gallery}: leave out the queries without an answer"
        )


def ranks(similarity: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Ranks each row's target column, from 0; ties count against the model (spec section 9).

    Args:
        similarity: [queries, candidates], finite.
        target: int [queries], the column of each query's answer.

    Returns:
        int [queries]: columns that score strictly higher, plus those that tie and are not the
        target.

    Raises:
        ValueError: a score is not finite, where a comparison would look like a perfect rank; or a
            target is no column, where a negative one would count from the end.
    """
    check_finite(int(np.count_nonzero(~np.isfinite(similarity))), similarity.size)
    check_targets(target, similarity.shape[1])
    score = np.take_along_axis(similarity, target[:, None], axis=1)
    return (similarity >= score).sum(axis=1) - 1


def summarise(rank: np.ndarray) -> Metrics:
    """Returns R@1, R@5, R@10 and their sum in percent, median and mean rank from 1."""
    recall = {f"R{k}": 100 * float(np.mean(rank < k)) for k in (1, 5, 10)}
    return {
        **recall,
        "MdR": float(np.median(rank + 1)),
        "MnR": float(np.mean(rank + 1)),
        "SumR": sum(recall.values()),
    }


def text_to_video(similarity: np.ndarray, video_of_caption: np.ndarray) -> np.ndarray:
    """Ranks every caption's own video among all videos, from 0."""
    return ranks(similarity, video_of_caption)


def video_to_text(similarity: np.ndarray, video_of_caption: np.ndarray) -> np.ndarray:
    """Ranks every video's own captions, from 0; of each video's captions the best one counts.

    Videos without captions are neither queries nor candidates.
    """
    captioned = np.unique(video_of_caption)
    best = np.stack(
        [similarity[video_of_caption == video].max(axis=0) for video in captioned], axis=1
    )
    return ranks(best[captioned], np.arange(len(captioned)))


def retrieval_metrics(
    similarity: np.ndarray, video_of_caption: np.ndarray, groups: Sequence[str]
) -> dict:
    """Returns the metrics of a whole similarity matrix, as `of_ranks` does.

    Args:
        similarity: float [captions, videos].
        video_of_caption: int [captions], the column of each caption's own video.
        groups: one name per caption, "" for none.
    """
    return of_ranks(
        text_to_video(similarity, video_of_caption),
        video_to_text(similarity, video_of_caption),
        groups,
    )


def of_ranks(rank: np.ndarray, v2t: np.ndarray, groups: Sequence[str]) -> dict:
    """Returns the metrics of both directions and of every query group.

    Args:
        rank: int [captions], of text-to-video, from 0.
        v2t: int [videos that have captions], of video-to-text, from 0.
        groups: one name per caption, "" for none.

    Returns:
        {"t2v": Metrics, "v2t": Metrics, "groups": {name: {"queries": n, "t2v": Metrics}}}.
    """
    group = np.asarray(groups)
    return {
        "t2v": summarise(rank),
        "v2t": summarise(v2t),
        "groups": {
            name: {"queries": int((group == name).sum()), "t2v": summarise(rank[group == name])}
            for name in dict.fromkeys(groups)
            if name
        },
    }


def table(metrics: dict) -> str:
    """Formats the retrieval table for a terminal."""
    columns = ("R1", "R5", "R10", "MdR", "MnR", "SumR")
    rows = [("text → video", metrics["t2v"]), ("video → text", metrics["v2t"])]
    rows += [
        (f"  {name} ({counted(g['queries'], 'query')})", g["t2v"])
        for name, g in metrics["groups"].items()
    ]
    width = max(len(label) for label, _ in rows) + 2
    lines = [" " * width + "".join(f"{c:>8}" for c in columns)]
    lines += [f"{label:<{width}}" + "".join(f"{m[c]:>8.1f}" for c in columns) for label, m in rows]
    return "\n".join(lines)
