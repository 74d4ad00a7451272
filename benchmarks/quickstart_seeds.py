"""Run the quickstart with several seeds, and print its table as mean and standard deviation over them, in Markdown.

OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/quickstart_seeds.py

With `--picture docs/images/forgotten.png` the accuracies of the first setting are drawn as well.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from evaluation import Row
from matplotlib.figure import Figure
from quickstart import Result, parse_args, prepare, run

Column = Callable[[Row, Sequence[Row]], float]
COLUMNS: dict[str, tuple[int, Column]] = {
    "retain acc. %": (1, lambda row, retrained: 100 * row.retain.accuracy),
    "forgotten acc. %": (1, lambda row, retrained: 100 * row.forget.accuracy),
    "test acc. %": (1, lambda row, retrained: 100 * row.test.accuracy),
    "membership AUC": (3, lambda row, retrained: row.auc),
    "gap to retrained": (1, lambda row, retrained: 100 * row.gap(retrained)),
    "JS to retrained": (1, lambda row, retrained: 100 * row.js(retrained)),
}

# Row of the table: marker and colour, those of the other pictures.
MARKS = {0: ("s", "black"), 1: ("D", "#0072B2"), 2: ("*", "#D55E00")}


def run_seeds(options: list[str], seeds: Sequence[int]) -> list[Result]:
    """Run the quickstart with each seed."""
    results = []
    for seed in seeds:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            results.append(run(parse_args([*options, "--seed", str(seed), "--out", out])))
        print(f"{' '.join(options)} seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return results


def format_markdown(results: Sequence[Result]) -> str:
    """Return the table: one line for each model. Test accuracy is without the classes that are gone."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for rows in zip(*(result.rows[:4] for result in results), strict=True):
        cells = []
        for digits, read in COLUMNS.values():
            values = [read(row, result.retrained) for row, result in zip(rows, results, strict=True)]
            cells.append(f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}")
        lines.append(f"| {rows[0].name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_gaps(results: Sequence[Result]) -> str:
    """Return the gaps of each seed: that of the unlearned model, and that of the retrained ones."""
    gaps = [(100 * result.rows[1].gap(result.retrained), result.floor) for result in results]
    seeds = ", ".join(f"{unlearned:.1f} ({floor:.1f})" for unlearned, floor in gaps)
    within = sum(unlearned <= 2 * floor for unlearned, floor in gaps)
    return (
        f"Gap of the unlearned model (of the retrained ones) by seed: {seeds}; within twice: {within} of {len(gaps)}."
    )


def draw(results: Sequence[Result]) -> Figure:
    """Draw the accuracies of the three kinds of models: a dot for each seed, and one for the mean."""
    figure = Figure(figsize=(7.2, 3.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    columns = {
        "the forgotten class": "forgotten acc. %",
        "what it was to keep": "retain acc. %",
        "test data": "test acc. %",
    }
    for place, (row, (marker, colour)) in enumerate(MARKS.items()):
        for height, column in enumerate(columns.values()):
            read = COLUMNS[column][1]
            values = [read(result.rows[row], result.retrained) for result in results]
            y = -height - 0.2 * (place - 1)
            axes.plot(values, [y] * len(values), marker, color=colour, alpha=0.25, markersize=5)
            label = results[0].rows[row].name if height == 0 else None
            axes.plot(mean(values), y, marker, color=colour, markersize=9, label=label)
            axes.annotate(
                f"{mean(values):.1f}", (mean(values), y), (9, 0), textcoords="offset points", va="center", size=8
            )
    axes.set_yticks([-height for height in range(len(columns))], list(columns))
    axes.set(xlim=(-4, 110), xticks=range(0, 101, 20), xlabel="recognised, %")
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    figure.legend(loc="outside upper center", ncols=len(MARKS), frameon=False)
    return figure


def main() -> None:
    """Run both settings of the README."""
    parser = argparse.ArgumentParser(description="Mean and standard deviation of the quickstart's table over seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="at least two")
    parser.add_argument("--forget", nargs="*", default=["class:3", "random:0.1"])
    parser.add_argument("--picture", type=Path, help="where to draw the accuracies of the first setting")
    args = parser.parse_args()
    prepare()
    for forget in args.forget:
        results = run_seeds(["--forget", forget], args.seeds)
        print(f"\n`--forget {forget}`, mean ± standard deviation over {len(results)} seeds:\n")
        print(f"{format_markdown(results)}\n\n{format_gaps(results)}", flush=True)
        if args.picture and forget == args.forget[0]:
            draw(results).savefig(args.picture)


if __name__ == "__main__":
    main()
