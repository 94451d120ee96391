"""Model cards: the parts that are written by a program, so that they cannot drift.

A card holds two blocks between markers: how the weights were made, from `train.json`, and what was
measured, from `evaluate`. A test measures again and compares.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_contextmix.demo_models import demo_folder

Values = tuple[float | int, ...]
"""Shares, and counts as integers."""


@dataclass(frozen=True)
class Table:
    """Rows of numbers with a name each, as they stand in a model card."""

    columns: tuple[str, ...]
    """Headings, the one of the names first."""
    rows: dict[str, Values]

    def markdown(self) -> str:
        """Returns the table in Markdown, fractions with three decimals, counts as integers."""
        lines = [_row(self.columns), _row(["---"] * len(self.columns))]
        for name, values in self.rows.items():
            lines.append(_row([name, *map(_number, values)]))
        return "\n".join(lines)


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def card_path(name: str) -> Path:
    """Returns the path of the model card of demo model `name`."""
    return demo_folder(name) / "MODEL_CARD.md"


def figures_block(tables: Sequence[Table]) -> str:
    """Returns the measured figures as they stand in a card."""
    return "\n\n".join(table.markdown() for table in tables)


def read_figures(text: str) -> list[Table]:
    """Returns the tables in the block of figures of a card."""
    return [_read_table(part) for part in _parts(text, "figures")[1].split("\n\n")]


def _read_table(text: str) -> Table:
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    rows = {}
    for name, *values in lines[2:]:
        rows[name] = tuple(float(value) if "." in value else int(value) for value in values)
    return Table(tuple(lines[0]), rows)


def training_block(name: str) -> str:
    """Returns how the weights were made, as it stands in a card."""
    record: dict[str, Any] = json.loads((demo_folder(name) / "train.json").read_text("utf-8"))
    versions = ", ".join(f"{package} {v}" for package, v in record["versions"].items())
    lines = [
        f"`{record['command']}`",
        "",
        f"{record['parameters']:,} parameters, initial weights from seed {record['weight_seed']},"
        f" AdamW with weight decay {record['weight_decay']},"
        f" {record['processor_minutes']} minutes of one processor core ({versions}).",
        "",
        _row(["phase", "sentences", "their seed", "order seed", "steps", "batch", "peak rate"]),
        _row(["---"] * 7),
    ]
    keys = ("data_seed", "order_seed", "steps", "batch_size", "peak_learning_rate")
    for number, phase in enumerate(record["phases"], start=1):
        others = (str(phase[key]) for key in keys)
        lines.append(_row([str(number), f"{phase['sentences']:,}", *others]))
    return "\n".join(lines)


def write_card(name: str, tables: Sequence[Table]) -> None:
    """Replaces both blocks of a card."""
    path = card_path(name)
    text = path.read_text(encoding="utf-8")
    for block, content in (("training", training_block(name)), ("figures", figures_block(tables))):
        before, _, after = _parts(text, block)
        text = before + content + after
    path.write_text(text, encoding="utf-8")


def _parts(text: str, block: str) -> tuple[str, str, str]:
    """A card before a block, in it and behind it; the markers lie outside."""
    begin, end = f"<!-- {block}:begin -->\n", f"\n<!-- {block}:end -->"
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after
