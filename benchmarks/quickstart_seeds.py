"""Run the quickstart with several seeds, and print its table as mean and standard deviation over them, in Markdown.

python benchmarks/quickstart_seeds.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from evaluation import Row
from quickstart import parse_args, prepare, run

COLUMNS: dict[str, tuple[int, Callable[[Row], float]]] = {
    "retain loss": (4, lambda row: row.retain.loss),
    "retain acc. %": (1, lambda row: 100 * row.retain.accuracy),
    "forget loss": (3, lambda row: row.forget.loss),
    "forget acc. %": (1, lambda row: 100 * row.forget.accuracy),
    "test loss": (3, lambda row: row.test.loss),
    "test acc. %": (1, lambda row: 100 * row.test.accuracy),
    "membership AUC": (3, lambda row: row.auc),
}
OTHERS = {"test acc. % without {}": (1, lambda row: 100 * row.others.accuracy)}


def run_seeds(options: list[str], seeds: int) -> tuple[list[list[Row]], list[int]]:
    """Return the rows of each seed, and the classes that were forgotten as a whole."""
    results = []
    for seed in range(seeds):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            args = parse_args([*options, "--seed", str(seed), "--out", out])
            results.append(run(args))
        print(f"{' '.join(options)} seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return [result.rows for result in results], results[0].gone


def format_markdown(results: list[list[Row]], gone: list[int]) -> str:
    """Return the table: one line for each model."""
    others = {name.format(", ".join(map(str, gone))): column for name, column in OTHERS.items()} if gone else {}
    columns = COLUMNS | others
    lines = ["| model | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for rows in zip(*results, strict=True):
        cells = []
        for digits, read in columns.values():
            values = [read(row) for row in rows]
            cells.append(f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}")
        lines.append(f"| {rows[0].name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_worst(results: list[list[Row]], gone: list[int]) -> str:
    """Say how far the unlearned model is off in the worst seed."""
    triples = [dict(zip(("original", "unlearned", "retrained"), rows, strict=True)) for rows in results]
    if gone:
        accuracy = max(100 * t["unlearned"].forget.accuracy for t in triples)
        loss = max(100 * (t["original"].others.accuracy - t["unlearned"].others.accuracy) for t in triples)
        return f"Worst seed: forget accuracy {accuracy:.1f} %, other classes {loss:.1f} points under the original."
    gap = max(abs(t["unlearned"].auc - t["retrained"].auc) for t in triples)
    return f"Worst seed: membership AUC {gap:.3f} from the retrained model's."


def main() -> None:
    """Run both settings of the README."""
    parser = argparse.ArgumentParser(description="Mean and standard deviation of the quickstart's table over seeds.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--forget", nargs="*", default=["class:3", "random:0.1"])
    args = parser.parse_args()
    prepare()
    for forget in args.forget:
        results, gone = run_seeds(["--forget", forget], args.seeds)
        print(f"\n`--forget {forget}`, mean ± standard deviation over {args.seeds} seeds:\n")
        print(format_markdown(results, gone) + "\n\n" + format_worst(results, gone), flush=True)


if __name__ == "__main__":
    main()
