"""What a step for many groups takes outside their forward and backward passes.

python benchmarks/groups.py

The quickstart's ResNet-20, batches of 64 images, retain, two protected groups, and the rest to forget; interleaved
repetitions. The step: Gramians, the quadratic programs (with both copies to and from the solver), combination, SGD.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from shapes import SHAPES, Batch, make_batches
from torch import nn

from hamu_lightning import HAMUOptimizer
from hamu_lightning.rules import RelativeRadius
from hamu_lightning.solvers import FeasibleDirection, GroupCoefficients


def make_optimizer(model: nn.Module, groups: int, sketch: int | None) -> HAMUOptimizer:
    """Wrap plain SGD for so many groups, retain among them: two are protected, as far as there are enough."""
    protected = {f"protected {n}": 0.0 for n in range(min(2, groups - 2))}
    quota = {f"request {n}": 1e-3 for n in range(groups - 1 - len(protected))}
    rule = FeasibleDirection(quota, protected, radius=RelativeRadius(1e-3))
    return HAMUOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), rule, sketch=sketch)


def measure(groups: int, sketch: int | None, repetitions: int) -> tuple[list[float], list[float]]:
    """Return the seconds of the passes, and of the step after them, in each repetition."""
    model, ((images, labels), _) = SHAPES["digits"].make(), make_batches(SHAPES["digits"])
    optimizer = make_optimizer(model, groups, sketch)
    batches: dict[str, Batch] = {
        name: (torch.randn_like(images), torch.randint_like(labels, 10)) for name in optimizer.rule.groups
    }

    def run(name: str) -> None:
        x, y = batches[name]
        nn.functional.cross_entropy(model(x), y).backward()

    optimizer.recompute = run
    passes, steps = [], []
    for _ in range(repetitions + 2):
        optimizer.zero_grad()
        start = time.perf_counter()
        for name in batches:
            with optimizer.group(name):
                run(name)
        middle = time.perf_counter()
        optimizer.step()
        passes.append(middle - start)
        steps.append(time.perf_counter() - middle)
    return passes[2:], steps[2:]  # the first ones warm up


def measure_sketch(size: int, seeds: int) -> tuple[float, float]:
    """How far cosines are off (root mean square), and by how much a step misses a constraint at worst.

    The second one is in units of what the trust region allows for the group, `R |g|`, over random batches.
    """
    squares, worst = [], 0.0
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, ((images, labels), _) = SHAPES["digits"].make(), make_batches(SHAPES["digits"])
        optimizer = make_optimizer(model, 8, size)
        before, grads = [p.detach().clone() for p in model.parameters()], {}
        batches = {n: (torch.randn_like(images), torch.randint_like(labels, 10)) for n in optimizer.rule.groups}

        def run(name: str, model: nn.Module = model, batches: dict[str, Batch] = batches) -> None:
            nn.functional.cross_entropy(model(batches[name][0]), batches[name][1]).backward()

        for name in batches:
            with optimizer.group(name):
                run(name)
            loss = nn.functional.cross_entropy(model(batches[name][0]), batches[name][1])
            grads[name] = [g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
        optimizer.recompute = run
        optimizer.step()
        rows = torch.stack([torch.cat(grad) for grad in grads.values()])
        pairs = zip(model.parameters(), before, strict=True)
        moved = torch.cat([(p.detach() - old).double().flatten() for p, old in pairs])
        lengths = rows.norm(dim=1)
        step = optimizer.last_step
        assert step is not None and isinstance(step.coefficients, GroupCoefficients)
        exact, seen = rows @ rows.T, step.gramian.sum(dim=0)
        squares.append(((seen - exact) / lengths / lengths[:, None]).square().mean())
        served = step.coefficients.count_as_served(rows @ moved)[1:]
        missing = (step.coefficients.group_quota[0] - served) / (step.coefficients.radius[0] * lengths[1:])
        worst = max(worst, float(missing.max()))
    return float(torch.stack(squares).mean().sqrt()), worst


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description="The cost of a step for many groups.")
    parser.add_argument("--repetitions", type=int, default=20)
    repetitions = parser.parse_args().repetitions
    torch.manual_seed(0)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| groups | passes, ms | step, ms (quartiles) | share of the step |\n| ---: | ---: | ---: | ---: |")
    for groups in (2, 4, 8, 16):
        passes, steps = measure(groups, None, repetitions)
        a, b = (1e3 * statistics.median(times) for times in (passes, steps))
        low, _, high = (1e3 * q for q in statistics.quantiles(steps, n=4))
        print(f"| {groups} | {a:.1f} | {b:.1f} ({low:.1f} to {high:.1f}) | {b / (a + b):.1%} |", flush=True)
    exact, sketched = (measure(8, sketch, repetitions) for sketch in (None, 2**16))
    whole = [statistics.median(a + b for a, b in zip(*times, strict=True)) for times in (exact, sketched)]
    print(f"\n8 groups with sketch=2**16: {whole[1] / whole[0]:.2f} times the time of a step without.\n")
    print("| sketch | cosines off by (rms) | constraint missed by at most |\n| ---: | ---: | ---: |")
    for power in (10, 12, 14, 16):
        error, worst = measure_sketch(2**power, seeds=5)
        print(f"| 2^{power} | {error:.4f} | {worst:.4f} |", flush=True)


if __name__ == "__main__":
    main()
