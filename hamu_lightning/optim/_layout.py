"""Which tensors an optimizer moves, in which blocks, at which learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.checks import describe, is_iterable
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import Blocks, assign_blocks, compute_gramian, widest_float
from hamu_lightning.optim._mask import Mask
from hamu_lightning.rules import Adapter

_PAIRS = "pairs of a name and a tensor, as from `module.named_parameters()`"


@dataclass(frozen=True)
class Layout:
    """The trainable tensors of an optimizer, in the order of its parameter groups.

    Args:
        parameters: The tensors.
        blocks: For each tensor the index of its block.
        labels: For each block its name.
        groups: For each block the index of its parameter group.
        counts: For each tensor its number of weights that may move.
        mask: Which of the weights rest; None if all may move.
        adapters: Those of which a factor is among the tensors.
    """

    parameters: tuple[Tensor, ...]
    blocks: tuple[int, ...]
    labels: tuple[str, ...]
    groups: tuple[int, ...]
    counts: tuple[int, ...]
    mask: Mask | None = None
    adapters: tuple[Adapter, ...] = ()
    # A number that goes to an accelerator waits for all that it has been asked before: what stays the same goes once.
    _on_device: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _rates: dict[tuple[float, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """For each block its number of weights that may move."""
        sizes = [0] * len(self.labels)
        for block, count in zip(self.blocks, self.counts, strict=True):
            sizes[block] += count
        return tuple(sizes)

    @property
    def device(self) -> torch.device:
        """The device where the numbers of the blocks live."""
        return self.parameters[0].device

    def vector(self, values: Sequence[float | Tensor]) -> Tensor:
        """One number per block as a tensor `[B]` on the device, whether the numbers are floats or tensors.

        A tuple of floats gives the same tensor each time; nobody writes to it.
        """
        dtype = widest_float(self.device)
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack([torch.as_tensor(v, dtype=dtype, device=self.device).reshape(()) for v in values])
        if not isinstance(values, tuple):
            return torch.tensor(values, dtype=dtype, device=self.device)
        if values not in self._on_device:
            self._on_device[values] = torch.tensor(values, dtype=dtype, device=self.device)
        return self._on_device[values]

    @cached_property
    def block_index(self) -> Tensor:
        """For each tensor the index of its block, on the device."""
        return torch.tensor(self.blocks, device=self.device)

    @property
    def weights(self) -> Sequence[Tensor]:
        """The tensors, zero where weights rest."""
        if self.mask is None:
            return self.parameters
        return [self.mask.hide(p, p) for p in self.parameters]

    @property
    def rounds(self) -> bool:
        """Whether weights are so coarse (16 bits or less) that small steps are rounded away."""
        return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in self.parameters)

    def tensor_norms(self) -> Tensor:
        """The L2 norm of each tensor's weights that may move, `[T]`."""
        weights = self.weights
        usual = (Tensor, torch.nn.Parameter)
        if any(type(p) not in usual or p.is_complex() or p.dtype != weights[0].dtype for p in weights):
            return compute_gramian(weights).view(-1).sqrt()  # it knows about shards
        return torch.stack([norm.to(self.device) for norm in _tensor_norms(weights)]).to(widest_float(self.device))

    def weight_norms(self) -> Tensor:
        """The L2 norm of each block's weights that may move, `[B]`."""
        norms = self.tensor_norms()
        if len(self.labels) == len(self.parameters):
            return norms
        return norms.new_zeros(len(self.labels)).index_add_(0, self.block_index, norms.square()).sqrt()

    def learning_rates(self, param_groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """The learning rate of each block, `[B]`."""
        by_group = tuple(group["lr"] for group in param_groups)
        if any(isinstance(lr, Tensor) for lr in by_group):
            return self.vector([by_group[group] for group in self.groups])
        if by_group not in self._rates:  # a schedule has many: the last ones alone are kept
            self._rates.clear()
            self._rates[by_group] = self.vector([by_group[group] for group in self.groups])
        return self._rates[by_group]


def _tensor_norms(weights: Sequence[Tensor]) -> list[Tensor]:
    # One call for all tensors: a third of the time of their Gramians. 16-bit norms would be off by half a percent.
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    return list(torch._foreach_norm(list(weights), 2, dtype=wide))


def make_layout(
    param_groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    blocks: Blocks,
    mask: Mask | None = None,
    adapters: Sequence[Adapter] = (),
) -> Layout:
    """Lay out the trainable tensors of the groups.

    Raises:
        HAMUValueError: If there is none, or if `blocks` needs the names of the tensors and they are not known.
    """
    members = [(p, g) for g, group in enumerate(param_groups) for p in group["params"] if p.requires_grad]
    if not members:
        raise HAMUValueError(
            "Expected the base optimizer to hold at least one parameter that requires grad, but got none. "
            "Unfreeze what should be changed (requires_grad_(True)) before unlearning."
        )
    if blocks not in ("tensor", "global") and any(p not in names for p, _ in members):
        raise HAMUValueError(
            f"Expected the names of all parameters with `blocks={blocks!r}`, but some are not known. Pass "
            "`named_parameters=module.named_parameters()` to HAMUOptimizer, or build the base optimizer from them."
        )
    labels = [names.get(p, f"group{g}.{index}") for index, (p, g) in enumerate(members)]
    ids, block_labels = assign_blocks(labels, [g for _, g in members], blocks)
    groups = [0] * len(block_labels)
    for block, (_, group) in zip(ids, members, strict=True):
        groups[block] = group
    parameters = tuple(p for p, _ in members)
    counts = tuple(p.numel() if mask is None else mask.count(p) for p in parameters)
    known = {id(p) for p in parameters}
    moved = tuple(a for a in adapters if id(a.down) in known or id(a.up) in known)
    return Layout(parameters, tuple(ids), tuple(block_labels), tuple(groups), counts, mask, moved)


def collect_names(param_groups: Sequence[Mapping[str, Any]], given: Any = None) -> dict[Tensor, str]:
    """The names of the tensors: those that the optimizer itself knows, and those that the user gave.

    Args:
        param_groups: Of an optimizer. torch keeps the names when it was built from `named_parameters()`.
        given: Pairs of a name and a tensor, or None.

    Raises:
        HAMUValueError: If what was given is no such pairs.
    """
    names = {
        parameter: name
        for group in param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    if given is not None and not is_iterable(given):
        raise HAMUValueError(f"Expected `named_parameters` to be {_PAIRS}, but got {describe(given)}.")
    for pair in () if given is None else given:
        match pair:
            case (str(name), Tensor() as parameter):
                names[parameter] = name
            case _:
                raise HAMUValueError(f"Expected `named_parameters` to be {_PAIRS}, but got {describe(pair)} in it.")
    return names
