"""A mask on the weights: those outside of it rest, and no number of a step knows of them (SalUn, Fan et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hamu_lightning.checks import check_number
from hamu_lightning.errors import HAMUStateError, HAMUValueError

NamedMasks: TypeAlias = Mapping[str, Tensor] | Mapping[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Mask:
    """Which weights rest: the step is that of the problem in which they are no variables.

    The step moves `m * d`, `m` being 1 inside of the mask and 0 outside (SalUn's update). With the gradients `m * g` in
    the place of `g` every Gramian, radius and promise is that of the remaining weights, whatever the rule.

    Args:
        rests: For each tensor with a mask, a bool tensor of its shape: True where a weight rests.
        counts: For each of them, how many weights may move.
    """

    rests: dict[Tensor, Tensor]
    counts: dict[Tensor, int]

    def count(self, parameter: Tensor) -> int:
        """How many of a tensor's weights may move."""
        return self.counts.get(parameter, parameter.numel())

    def hide(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A gradient or the weights of a parameter, zero outside of the mask: a copy, or without a mask the tensor."""
        rest = self._find_rest(parameter, tensor)
        return tensor if rest is None else tensor.detach().masked_fill(rest, 0)

    def hide_all(self, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The same of several; None stays None."""
        return [None if t is None else self.hide(t, p) for t, p in zip(tensors, parameters, strict=True)]

    def hide_(self, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
        """Write zeros over what is outside of the mask."""
        for tensor, parameter in zip(tensors, parameters, strict=True):
            rest = None if tensor is None else self._find_rest(parameter, tensor)
            if tensor is not None and rest is not None:
                tensor.masked_fill_(rest, 0)  # not a product: 0 x NaN

    @contextmanager
    def holding(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Put the resting weights back at the end, bit by bit.

        Momentum from before, and weight decay, move weights whose gradient is zero. Costs a copy of the masked tensors.
        """
        before = {p: p.detach().clone() for p in parameters if p in self.rests}
        try:
            yield
        finally:
            for parameter, weights in before.items():
                rest = self._find_rest(parameter, weights)
                assert rest is not None
                parameter.copy_(torch.where(rest, weights, parameter))

    def _find_rest(self, parameter: Tensor, tensor: Tensor) -> Tensor | None:
        rest = self.rests.get(parameter)
        if rest is None:
            return None
        if tensor.is_sparse:
            raise HAMUStateError(
                "Expected dense gradients where there is a mask, but that of a tensor of shape "
                f"{list(parameter.shape)} is sparse. Leave the tensor out of `mask`, or use sparse=False."
            )
        if rest.device != tensor.device:  # the module has moved since: once
            rest = self.rests[parameter] = rest.to(tensor.device)
        return rest


def make_mask(given: NamedMasks, names: Mapping[Tensor, str], known: Sequence[Tensor]) -> Mask:
    """Check a mask, and find the tensors that it names.

    Args:
        given: For names or tensors a bool tensor each, True where a weight may move.
        names: The names of tensors.
        known: The tensors of the optimizer.

    Raises:
        HAMUValueError: If a name is not known, or a mask does not fit its tensor.
    """
    if not isinstance(given, Mapping):
        raise HAMUValueError(
            f"Expected `mask` to map names of weights to bool tensors, but got {type(given).__name__}. "
            "`compute_saliency_mask(module, forget_loader)` makes one."
        )
    by_name = {name: parameter for parameter, name in names.items()}
    rests, counts = {}, {}
    for key, mask in given.items():
        parameter: Any = by_name.get(key) if isinstance(key, str) else key
        if parameter is None or (parameter not in names and not any(parameter is p for p in known)):
            raise HAMUValueError(
                f"Expected the keys of `mask` to be tensors of the optimizer or their names, but got "
                f"{key if isinstance(key, str) else type(key).__name__!r}. Pass "
                "`named_parameters=module.named_parameters()`, and the names as they are there."
            )
        check_fits(mask, parameter, names.get(parameter, "a tensor"))
        rests[parameter] = ~mask.detach().to(parameter.device)
        counts[parameter] = int(mask.sum())
    return Mask(rests, counts)


def check_fits(mask: Tensor, parameter: Tensor, name: str) -> None:
    """Raise unless a mask is a bool tensor of the parameter's shape."""
    if hasattr(parameter, "device_mesh"):
        raise HAMUValueError(
            f"Expected whole tensors with `mask`, but {name} is a DTensor, sharded over processes. "
            "Use strategy='ddp', or freeze whole tensors by requires_grad_(False) instead of a mask."
        )
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.shape != parameter.shape:
        found = f"{mask.dtype}, {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise HAMUValueError(
            f"Expected the mask of {name} to be a bool tensor of shape {list(parameter.shape)}, but got {found}. "
            "True lets a weight move; numbers become a mask by `numbers > threshold`."
        )


def keep_largest(scores: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The mask of the weights with the largest scores, over all tensors together.

    Args:
        scores: For each name a tensor of numbers.
        keep: The share of the weights that is kept, in (0, 1]. Of equal scores the first ones.

    Raises:
        HAMUValueError: If `keep` is out of range, there is no score, or one is not finite.

    Example:
        >>> keep_largest({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[1.0, 2.0]])}, keep=0.5)
        {'a': tensor([ True, False]), 'b': tensor([[False,  True]])}
    """
    if not scores:
        raise HAMUValueError("Expected some parameter that requires grad, but got none. Unfreeze what should change.")
    keep = check_number("keep", keep, above=0, most=1, wanted="a share in (0, 1]")
    first = next(iter(scores.values()))
    flat = torch.cat([score.reshape(-1).to(first.device) for score in scores.values()])
    if not bool(flat.isfinite().all()):
        raise HAMUValueError(
            "Expected finite gradients of the forget loss, but some are not. Check the loss and the precision."
        )
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(1, round(keep * flat.numel()))]] = True
    parts = torch.split(chosen, [score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }
