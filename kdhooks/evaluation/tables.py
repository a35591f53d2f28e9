"""Markdown tables with aligned columns, which are also readable in a terminal."""

from collections.abc import Sequence


def markdown(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table.

    lines: the cells of the head and of each row.
    texts: the number of columns, from the left, that are left-aligned.
    """
    head, *rows = lines
    rule = ["---" if column < texts else "---:" for column in range(len(head))]
    every = [head, rule, *rows]
    widths = [max(len(line[column]) for line in every) for column in range(len(head))]
    return "\n".join("| " + " | ".join(_aligned(line, widths, texts)) + " |" for line in every)


def _aligned(line: Sequence[str], widths: Sequence[int], texts: int) -> list[str]:
    return [
        cell.ljust(width) if column < texts else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
