"""Counts as text."""


def table(counts: dict[str, dict[str, int]]) -> str:
    """A line a split, a column a kind; every split has the same kinds."""
    columns = list(next(iter(counts.values())))
    rows = [["split", *columns]]
    rows += [[split, *(str(its[column]) for column in columns)] for split, its in counts.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
