"""Rows of figures: their table, and the facts that go into a file with them."""

import subprocess
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""`name`, `seconds` (median), `ratio`, `bytes`, `measured` or `simulated` (true), `note`, and what else there is."""


def print_table(lines: list[list[str]]) -> None:
    """Columns as wide as they need to be, under the names in the first line; those of numbers to the right."""
    columns = []
    for column in zip(*lines, strict=True):
        width = max(map(len, column))
        numbers = all(cell[:1].isdigit() for cell in column[1:] if cell)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    for line in zip(*columns, strict=True):
        print("  ".join(line).rstrip())


def print_rows(rows: list[Row]) -> list[Row]:
    """Prints a line for each row, and returns them."""
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['seconds'] * 1e3:9.2f} ms  ratio {row['ratio']:.3f}  {row['note']}")
    return rows


def with_facts(name: str, rows: list[Row], repetitions: int) -> dict[str, Any]:
    """The rows as they are written to a file: on which commit, machine and versions, by which command."""
    # Here, so that benchmarks of kernels need none of the packages that only training needs.
    from armillary.train.run_folder import machine_facts

    return {"benchmark": name, "repetitions": repetitions, "commit": commit(), **machine_facts(), "rows": rows}


def commit() -> str:
    """The commit of the working tree, with a mark if it differs; empty where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()
