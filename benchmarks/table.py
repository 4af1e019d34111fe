"""What was measured: the median with its spread, and the ratio to the first column."""

import statistics
from collections.abc import Mapping, Sequence

LOWER_IS_BETTER = ("us", "ms", "MB", "%", "s")


class Table:
    def __init__(self, title: str, columns: Sequence[str]) -> None:
        self.title = title
        self.columns = columns
        self.rows: list[list[str]] = []

    def add(self, name: str, unit: str, values: Mapping[str, Sequence[float]], aim: str) -> None:
        cells = [name, unit]
        reference = statistics.median(values[self.columns[0]]) if self.columns[0] in values else None
        for column in self.columns:
            if column not in values:
                cells.append("")
                continue
            median = statistics.median(values[column])
            text = f"{median:,.2f}" if median < 10 else f"{median:,.0f}"
            if len(values[column]) > 1:
                text += f" [{min(values[column]):,.0f}..{max(values[column]):,.0f}]"
            if reference and column != self.columns[0]:
                text += f" = {median / reference:.2f}"
            cells.append(text)
        self.rows.append([*cells, aim])

    def print(self) -> None:
        header = ["measure", "unit", *self.columns, "aim"]
        print(f"\n## {self.title}\n\nMedian [least..greatest] = ratio to {self.columns[0]}.\n")
        print("| " + " | ".join(header) + " |")
        print("|" + "---|" * len(header))
        for row in self.rows:
            print("| " + " | ".join(row) + " |")
