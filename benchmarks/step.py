"""What HAMU adds to a step, against what any unlearning with two streams needs.

python benchmarks/step.py

For each model, in interleaved repetitions on the same batches:

- (a) the two forward and backward passes, each into its own gradient slot;
- (b) the step after them: Gramians, rule, combination, and the base optimizer's own step;
- (c) gradient difference by hand: two forward passes, one combined backward pass, one step of plain SGD.

Prints medians in milliseconds with the quartiles of (b), and ratios. Only the ratios compare between machines.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from hamu_lightning import HAMUQ, HAMUOptimizer
from hamu_lightning.rules import RelativeRadius, Rule

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


class Transformer(nn.Module):
    """A language model of about 25 million parameters in about 150 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8000, 384)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(384, 8000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, L]` to logits `[N * L, 8000]`."""
        return self.head(self.layers(self.embedding(tokens))).flatten(0, 1)


class Adapters(nn.Module):
    """448 tensors of LoRA's size, 16 x 512, in pairs that map 512 numbers to 512 through 16."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ParameterList(nn.Parameter(torch.randn(16, 512) * 0.05) for _ in range(448))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 512]` to `[N, 512]`."""
        for down, up in zip(self.pairs[::2], self.pairs[1::2], strict=True):
            x = x + (x @ down.t()) @ up
        return x


Batch = tuple[Tensor, Tensor]


def make_resnet() -> tuple[nn.Module, Batch, Batch]:
    """The quickstart's ResNet-20, batches of 64 images."""
    from digits import make_resnet20

    images, labels = torch.randn(2, 64, 1, 8, 8), torch.randint(10, (2, 64))
    return make_resnet20().eval(), (images[0], labels[0]), (images[1], labels[1])


def make_transformer() -> tuple[nn.Module, Batch, Batch]:
    """Batches of 8 sequences of 64 tokens."""
    tokens, targets = torch.randint(8000, (2, 8, 64)), torch.randint(8000, (2, 512))
    return Transformer(), (tokens[0], targets[0]), (tokens[1], targets[1])


def make_adapters() -> tuple[nn.Module, Batch, Batch]:
    """Batches of 64 rows."""
    rows, targets = torch.randn(2, 64, 512), torch.randint(512, (2, 64))
    return Adapters(), (rows[0], targets[0]), (rows[1], targets[1])


def measure(model: nn.Module, retain: Batch, forget: Batch, rule: Rule, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of (a), (b) and (c) in each repetition; the weights are put back after each step."""
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = HAMUOptimizer(base, rule)
    start = [p.detach().clone() for p in model.parameters()]

    def loss(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def passes() -> None:
        with optimizer.retain():
            loss(retain).backward()
        with optimizer.forget():
            loss(forget).backward()

    def difference() -> None:
        base.zero_grad()
        (loss(retain) - loss(forget)).backward()
        base.step()

    times: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for repetition in range(repetitions + 2):
        for name, run in (("a", passes), ("b", optimizer.step), ("c", difference)):
            seconds = _time(run)
            if repetition >= 2:  # the first ones warm up
                times[name].append(seconds)
            if name != "a":
                _restore(model.parameters(), start)
        base.zero_grad()
    return times


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _restore(parameters: Iterable[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def main() -> None:
    """Measure all models, and print a Markdown table."""
    parser = argparse.ArgumentParser(description="The cost of one step.")
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    torch.manual_seed(0)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| model | rule | tensors | weights | a ms | b ms (quartiles) | c ms | b/a | (a + b)/c |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rules = {"HAMUQ, paper's radius": HAMUQ(1e-3), "HAMUQ, relative radius": HAMUQ(1e-3, radius=RelativeRadius(1e-3))}
    for name, make in (("ResNet-20", make_resnet), ("transformer", make_transformer), ("LoRA", make_adapters)):
        model, retain, forget = make()
        for words, rule in rules.items():
            times = measure(model, retain, forget, rule, repetitions)
            a, b, c = (1e3 * statistics.median(times[key]) for key in "abc")
            low, _, high = (1e3 * q for q in statistics.quantiles(times["b"], n=4))
            sizes = [p.numel() for p in model.parameters()]
            print(
                f"| {name} | {words} | {len(sizes)} | {sum(sizes) / 1e6:.2f} M | {a:.1f} | {b:.1f} ({low:.1f} to "
                f"{high:.1f}) | {c:.1f} | {b / a:.1%} | {(a + b) / c:.2f} |"
            )


if __name__ == "__main__":
    main()
