"""Random projections of gradients: the Gramian of many groups in the memory of two gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hamu_lightning.checks import check_count
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.gramian import widest_float
from hamu_lightning.optim._combine import add_up
from hamu_lightning.optim._gradients import Combined, StepGradients
from hamu_lightning.optim._layout import Layout
from hamu_lightning.optim._slots import GradientSlot, hidden_gradients

# Random numbers are drawn for so many weights at once.
_PIECE = 2**20


class Sketch:
    """Projects gradients of any length onto `size` numbers, always the same way (Charikar et al. 2002, count sketch).

    Each weight has a bucket and a sign, both drawn from the seed; a bucket holds the sum of its weights' gradients
    times their signs. Inner products survive in the mean: over the seeds `<S a, S b>` has the mean `a·b` and at most
    the variance `(|a|^2 |b|^2 + (a·b)^2) / size`. So a cosine is off by about `1/sqrt(size)`: 0.004 with 2^16.

    Args:
        size: Number of buckets.
        seed: Of the buckets and signs.

    Raises:
        HAMUValueError: If `size` is less than 1.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = check_count("sketch", size, cure="It is the number of buckets."), seed

    def project(self, grads: Sequence[Tensor | None], blocks: Sequence[int]) -> Tensor:
        """Project gradients block by block.

        Args:
            grads: One gradient per tensor; None counts as zero.
            blocks: For each tensor the index of its block.

        Returns:
            `[B, size]`, float64 where the device has it.

        Raises:
            HAMUValueError: If a gradient is sharded.
        """
        present = [grad for grad in grads if grad is not None]
        device = present[0].device if present else torch.device("cpu")
        result = torch.zeros(max(blocks) + 1, self.size, dtype=widest_float(device), device=device)
        for number, (grad, block) in enumerate(zip(grads, blocks, strict=True)):
            if grad is not None:
                self._add(result[block], grad, number)
        return result

    def _add(self, buckets: Tensor, grad: Tensor, number: int) -> None:
        if hasattr(grad, "device_mesh"):
            raise HAMUValueError("Expected whole gradients with `sketch`, but got sharded ones. Leave `sketch` out.")
        flat = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
        generator = torch.Generator(device=flat.device).manual_seed((self.seed << 20) ^ number)
        for piece in torch.split(flat, _PIECE):
            # One draw for both: the lowest bit is the sign.
            drawn = torch.randint(2 * self.size, piece.shape, generator=generator, device=piece.device)
            signs = 1 - 2 * (drawn & 1)
            buckets.index_add_(0, drawn >> 1, piece.to(buckets.dtype) * signs)


class SketchSlot(GradientSlot):
    """A slot that keeps the projection of its gradient, and lets the gradient go.

    Args:
        sketch: The projection.
        find_layout: Tells which tensors there are, in which blocks.
    """

    def __init__(self, sketch: Sketch, find_layout: Callable[[], Layout]) -> None:
        super().__init__()
        self._sketch, self._find_layout = sketch, find_layout
        self.projection: Tensor | None = None

    @property
    def is_filled(self) -> bool:
        """Whether the slot holds a projection."""
        return self.projection is not None

    def release(self) -> None:
        """Forget the projection."""
        super().release()
        self.projection = None

    @contextmanager
    def filling(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Let a gradient accumulate, and add its projection to what is there: projecting is linear."""
        parameters = list(parameters)
        with hidden_gradients(parameters):
            with self._open():
                yield
            layout = self._find_layout()
            grads = [p.grad for p in layout.parameters]
            if all(grad is None for grad in grads):
                return
            with torch.no_grad():
                added = self._sketch.project(grads, layout.blocks)
            self.projection = added if self.projection is None else self.projection + added
            self.is_fresh = True


@dataclass(frozen=True, eq=False)
class SketchedGradients(StepGradients):
    """The gradients of a step where all but retain's are gone: their projections stand for them.

    Args:
        sketch: The projection.
        projections: For each group other than retain the projection of its gradient, `[B, size]`.
        recompute: Runs the backward pass of a group again.
        parameters: The tensors whose `.grad` is to stay as it is meanwhile.
    """

    sketch: Sketch
    projections: list[Tensor]
    recompute: Callable[[str], object] | None
    parameters: Sequence[Tensor]

    @override
    def multiply(self) -> Tensor:
        rows = torch.stack([self.sketch.project(self.lists[0], self.layout.blocks), *self.projections], dim=1)
        return rows @ rows.mT  # [B, n, size] -> [B, n, n]

    @override
    def combine(self, factors: Tensor, is_finite: Tensor, keeps_last: bool) -> Combined:
        return add_up(self.lists[0], self._make_again(), factors, self.layout.blocks, is_finite)

    def _make_again(self) -> Iterator[list[Tensor | None]]:
        """The gradients of one group after the other.

        Raises:
            HAMUStateError: If nothing says how to make them.
        """
        if self.recompute is None:
            raise HAMUStateError(
                "Expected `optimizer.recompute` with `sketch`, but it is None: of the gradients only projections are "
                "kept, and each group's backward pass has to run again. Set it to a function of the group's name."
            )
        for name in self.groups[1:]:
            with hidden_gradients(self.parameters), torch.enable_grad():
                self.recompute(name)
                grads = [p.grad for p in self.layout.parameters]
            yield grads
