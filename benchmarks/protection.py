"""What protection is worth: the example of many requests with several seeds; a table in Markdown.

python benchmarks/protection.py         # docs/many_requests.md; about two minutes on one core
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from many_requests import parse_args, prepare, run


def main() -> None:
    """Print the change of accuracy in each seed, with and without protection."""
    parser = argparse.ArgumentParser(description="Protected classes over several seeds.")
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    prepare()
    changes: dict[str, list[dict[str, float]]] = {"unprotected": [], "protected": []}
    with tempfile.TemporaryDirectory() as out:
        for seed in seeds:
            rows, _, summary = run(parse_args(["--seed", str(seed), "--out", out]))
            print(f"{summary}\n", file=sys.stderr, flush=True)
            for name, found in changes.items():
                found.append({group: rows[name][group] - rows["original"][group] for group in rows["original"]})
    print("| accuracy against the original, points | " + " | ".join(changes) + " |\n| --- | ---: | ---: |")
    for group in changes["protected"][0]:
        cells = []
        for found in changes.values():
            numbers = [change[group] for change in found]
            middle = round(mean(numbers), 1) + 0.0  # no "-0.0"
            cells.append(" ".join(f"{number:+.1f}" for number in numbers) + f" (mean {middle:+.1f})")
        print(f"| {group} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
