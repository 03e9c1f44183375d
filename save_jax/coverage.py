"""Which clips of a split have sound, a transcript, the teacher's vectors: nothing is silently off.

A branch of the model whose input no clip has would train, or be evaluated, on zeros.
"""

from collections.abc import Collection, Mapping
from typing import Any

from save_jax.errors import UserError
from save_jax.messages import counted


def percentages(split: Any) -> dict[str, float]:
    """Returns how many percent of a split's clips have "sound", "transcript" and "teacher".

    A transcript that the tokenizer takes for none (spec section 1) is none here.

    Args:
        split: a `data_pipelines.splits.Split`.
    """
    found = {
        "sound": split.has_audio.sum(),
        "transcript": _spoken(split),
        "teacher": split.has_teacher.sum(),
    }
    return {name: round(100 * int(n) / max(split.num_clips, 1), 1) for name, n in found.items()}


def line(splits: Collection[Any]) -> str:
    """Formats the percentages of splits in one line."""
    parts = []
    for split in splits:
        found = percentages(split)
        parts.append(
            f"{split.name} ({counted(split.num_clips, 'clip')}) {found['sound']:g} % with sound, "
            f"{found['transcript']:g} % with a transcript, {found['teacher']:g} % with the "
            "teacher's vectors"
        )
    return "data: " + "; ".join(parts)


def check_training(split: Any, config: Mapping[str, Any]) -> str:
    """Checks that a training split has something for each branch and loss that is switched on.

    Args:
        split: a `data_pipelines.splits.Split`.
        config: the run's.

    Returns:
        A line about the clips that soft-ALBEF leaves out (spec section 6); "" where there are none.

    Raises:
        UserError: no clip has what a switch needs; names all such switches.
    """
    clips, aligned = counted(split.num_clips, "clip"), config["loss"]["soft_albef_weight"]
    mute = bool(config["model"]["sound_weight"]) and not split.has_audio.any()
    lines, flags = [], []
    if mute:
        lines.append("sound: none has an audio track. Give videos with sound")
        flags.append("--config.model.sound_weight=0")
    if config["model"]["speech_weight"] and not _spoken(split):
        lines.append(
            "speech: none has a transcript. Prepare the data again with a file of transcripts or "
            "with Whisper (python -m data_pipelines.prepare … --transcripts=whisper)"
        )
        flags.append("--config.model.speech_weight=0")
    usable = int((split.has_audio & split.has_teacher).sum())
    left_out = {
        "without an audio track": int((~split.has_audio).sum()),
        "with sound but without the teacher's vectors": int(
            (split.has_audio & ~split.has_teacher).sum()
        ),
    }
    why = " and ".join(f"{count} {words}" for words, count in left_out.items() if count)
    if aligned and usable < 2:
        if not mute:
            lines.append(
                "soft-ALBEF: it compares clips that have sound and the teacher's vectors, and has "
                f"{usable}{f' ({why})' if why else ''}. Prepare the data again with these vectors "
                "(python -m data_pipelines.prepare … --imagebind=imagebind_huge.pth)"
            )
        flags.append("--config.loss.soft_albef_weight=0")
    if lines:
        raise UserError(
            f"the {clips} in the split {split.name!r} lack what the config would train on:\n"
            + "".join(f"  {line}.\n" for line in lines)
            + "To train without on "
            f"purpose, set {' '.join(flags)}"
        )
    if aligned and why:
        return f"soft-ALBEF aligns {usable} of {clips}, and leaves out {why}"
    return ""


def lacking(split: Any, model: Any) -> list[str]:
    """Returns a sentence for each branch of the model for which no clip of a split has an input.

    Args:
        split: a `data_pipelines.splits.Split`, to be evaluated.
        model: a `SAVEConfig`.
    """
    branches = (
        ("sound", model.sound_weight, split.has_audio.any(), "an audio track"),
        ("speech", model.speech_weight, _spoken(split), "a transcript"),
    )
    return [
        f"no clip of the split {split.name!r} has {what}: the model's {name} branch gets nothing, "
        f"and these results do not show what {name} is worth"
        for name, weight, found, what in branches
        if weight and not found
    ]


def _spoken(split: Any) -> int:
    """Counts the clips whose transcript has tokens."""
    from save_jax.tokenizer import MIN_CHARACTERS  # here, for a model without the data pipelines

    return sum(len(text) >= MIN_CHARACTERS for text in split.transcripts)
