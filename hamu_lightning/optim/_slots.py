"""Gradient slots: the only code that reads or writes `.grad`. Gradients are pointed at, never copied."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


class GradientSlot:
    """A place where the gradients of one objective are kept while another's are being computed.

    `with slot.filling(parameters):` points every `.grad` at the slot's gradient; `backward()` inside accumulates there.
    At the end of the block `.grad` points at what it pointed at before.

    Attributes:
        is_open: Whether a gradient is being accumulated here.
        is_fresh: Whether the slot holds a gradient of the present step.
        share: Of a gradient of an earlier step: which share of the mean over its window it is.
    """

    def __init__(self) -> None:
        self._grads: dict[Tensor, Tensor] = {}
        self.is_open, self.is_fresh, self.share = False, False, 1.0

    @property
    def is_filled(self) -> bool:
        """Whether the slot holds a gradient."""
        return bool(self._grads)

    def get(self, parameter: Tensor) -> Tensor | None:
        """Return the slot's gradient of a parameter."""
        return self._grads.get(parameter)

    def release(self) -> None:
        """Forget all gradients."""
        self._grads.clear()
        self.is_fresh = False

    def retire(self, share: float) -> None:
        """Keep the gradient for later steps, until the slot is filled again."""
        self.is_fresh, self.share = False, share

    @contextmanager
    def filling(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Point `.grad` at the slot. After an exception the slot is empty: half a gradient is worse than none."""
        parameters = list(parameters)
        if not self.is_fresh:
            self.release()
        with pointed_gradients(parameters, [self._grads.get(p) for p in parameters]):
            with self._open():
                yield
            # A new dict: what was cleared inside, by `zero_grad()`, is gone.
            self._grads = {p: _owned(p.grad) for p in parameters if p.grad is not None}
            self.is_fresh = self.is_filled

    @contextmanager
    def _open(self) -> Iterator[None]:
        self.is_open = True
        try:
            yield
        except BaseException:
            self.release()
            raise
        finally:
            self.is_open = False


@contextmanager
def pointed_gradients(parameters: Iterable[Tensor], grads: Iterable[Tensor | None]) -> Iterator[None]:
    """Point every `.grad` at another tensor (or at none), and back at the end, come what may."""
    parameters = list(parameters)
    before = [p.grad for p in parameters]
    try:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        yield
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


@contextmanager
def hidden_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Take the gradients away, and put them back at the end; those that were made meanwhile are dropped."""
    parameters = list(parameters)
    with pointed_gradients(parameters, [None] * len(parameters)):
        yield


def own_gradients_(parameters: Iterable[Tensor], spent: SpentGradients) -> None:
    """Copy the gradients that live in somebody else's memory, before another backward pass writes over them.

    Those that a step has used are dropped: written over, they would look like new ones.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad._is_view():
            parameter.grad = None if spent.is_spent(parameter) else _owned(parameter.grad)


def _owned(grad: Tensor) -> Tensor:
    # With gradient_as_bucket_view=True DistributedDataParallel hands out views of its buckets, and each backward pass
    # writes over the last one's: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/distributed/c10d/reducer.cpp
    return grad.clone() if grad._is_view() else grad


class SpentGradients:
    """Remembers which gradients a step has used, so that they are not used a second time.

    As with every optimizer of torch, `.grad` keeps its value after a step. A gradient counts as spent while it is the
    same tensor with the same contents: `backward()` and `zero_grad()` change one of the two. Only weak references are
    held.
    """

    def __init__(self) -> None:
        # By the identity of the gradient: two containers, however many tensors there are.
        self._references: dict[int, weakref.ref[Tensor]] = {}
        self._versions: dict[int, int] = {}

    def remember(self, parameters: Iterable[Tensor]) -> None:
        """Mark the present gradients as used."""
        grads = [grad for p in parameters if (grad := p.grad) is not None]
        self._references = {id(grad): weakref.ref(grad) for grad in grads}
        self._versions = {id(grad): grad._version for grad in grads}

    def is_spent(self, parameter: Tensor) -> bool:
        """Whether the parameter's present gradient was used by the last step."""
        return (grad := parameter.grad) is not None and self._is_used(grad)

    def find_new(self, parameters: Iterable[Tensor]) -> list[Tensor | None]:
        """The gradients of the parameters, None for those that the last step has used."""
        if not self._references:
            return [p.grad for p in parameters]
        return [None if (grad := p.grad) is None or self._is_used(grad) else grad for p in parameters]

    def _is_used(self, grad: Tensor) -> bool:
        reference = self._references.get(id(grad))
        return reference is not None and reference() is grad and grad._version == self._versions[id(grad)]

    def __getstate__(self) -> dict[str, object]:
        """Weak references do not survive a copy: a copy starts with no memory."""
        return {"_references": {}, "_versions": {}}
