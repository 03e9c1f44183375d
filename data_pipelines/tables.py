"""Formats counts as text."""


def of_teacher(columns: str) -> str:
    """Formats what columns about the teacher's vectors are about."""
    return f"{columns}: ImageBind's vectors of a clip, for one loss, which skips clips without them"


def table(counts: dict[str, dict[str, int]]) -> str:
    """Formats counts: one row per split, one column per kind; all splits have the same kinds."""
    columns = list(next(iter(counts.values())))
    rows = [["split", *columns]]
    rows += [[split, *(str(its[column]) for column in columns)] for split, its in counts.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
