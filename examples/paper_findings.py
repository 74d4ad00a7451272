"""The findings of the HAMU paper (Chen et al., ICML 2026, arXiv 2606.02119) on a small data set.

    python examples/paper_findings.py                               # all of them, on the 8x8 digits
    python examples/paper_findings.py --findings hardness quotas    # two of them
    python examples/paper_findings.py --cifar10 cifar-10-batches-bin

docs/paper_findings.md holds the results, and what they say about the paper's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from cifar10 import CIFAR10Classifier, load_cifar10
from digits import DigitsClassifier, load_splits
from findings_experiments import Finding, allocations, bases, batches, hardness, methods, quotas, stopping
from unlearning_runs import Bench, Task

FINDINGS: dict[str, Callable[[Bench], Finding]] = {
    "hardness": hardness,
    "quotas": quotas,
    "methods": methods,
    "allocations": allocations,
    "stopping": stopping,
    "batches": batches,
    "bases": bases,
}


def format_cell(numbers: Sequence[float]) -> str:
    """Return mean ± standard deviation over the seeds that have a number, and how many have."""
    known = [number for number in numbers if math.isfinite(number)]
    if not known:
        return ""
    spread = f" ± {float(f'{stdev(known):.1g}'):g}" if len(known) > 1 else ""
    return f"{mean(known):.3g}{spread}" + (f" ({len(known)} of {len(numbers)})" if len(known) < len(numbers) else "")


def format_table(name: str, finding: Finding) -> str:
    """Return the table of a finding in Markdown."""
    titles = list(dict.fromkeys(column for row in finding.rows.values() for column in row))
    lines = [f"| {' | '.join([name, *titles])} |", "| --- |" + " ---: |" * len(titles)]
    for label, row in finding.rows.items():
        lines.append(f"| {' | '.join([label, *(format_cell(row.get(column, [])) for column in titles)])} |")
    return "\n".join(lines)


def make_digits() -> Task:
    """The training split of the digits."""
    images, labels = load_splits()[0].tensors
    return Task(
        "digits", images, labels, DigitsClassifier, {"early": 4, "converged": 12}, {"early": 0.002, "converged": 0.06}
    )


def make_cifar10(folder: Path) -> Task:
    """The training set of CIFAR-10, on an accelerator where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = (tensor.to(device) for tensor in load_cifar10(folder))
    return Task(
        "cifar10", images, labels, CIFAR10Classifier, {"early": 5, "converged": 30}, {"early": 0.01, "converged": 0.01}
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The findings of the HAMU paper on a small data set.")
    parser.add_argument("--findings", nargs="+", choices=FINDINGS, default=list(FINDINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="steps of an unlearning run")
    parser.add_argument("--batch-size", type=int, default=128, help="samples of a batch, of each of the two streams")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="a folder with CIFAR-10's binary files")
    parser.add_argument(
        "--out", type=Path, default=Path("paper_findings_out"), help="for pictures, numbers and originals"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each finding, and write its pictures and the numbers of each seed."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    task = make_cifar10(args.cifar10) if args.cifar10 else make_digits()
    bench = Bench(task, range(args.seeds), args.out, args.steps, args.batch_size)
    for name in args.findings:
        start, processor = time.perf_counter(), time.process_time()
        finding = FINDINGS[name](bench)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(json.dumps(finding.rows, indent=1))
        for title, draw in finding.figures.items():
            draw().savefig(args.out / f"{title}.png")
        seconds = f"{time.perf_counter() - start:.0f} s, {time.process_time() - processor:.0f} s of one core"
        print(f"{format_table(name, finding)}\n\n({seconds})\n", flush=True)


if __name__ == "__main__":
    main()
