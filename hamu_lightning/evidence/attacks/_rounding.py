"""Whether forgetting survives weights of fewer bits."""

from __future__ import annotations

import copy

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from hamu_lightning.evidence.attacks._subject import Subject
from hamu_lightning.metrics.functional import Estimate, change

Measured = dict[str, tuple[Estimate, str]]


def quantize_int8(subject: Subject) -> Measured:
    """Round to 8 bits, one scale for each output channel."""
    return _compare(subject, "quantize_int8", 8, None)


def round_4bit(subject: Subject) -> Measured:
    """Round to 4 bits, one scale for each group of weights."""
    return _compare(subject, "round_4bit", 4, subject.plan.group)


def round_weights(module: LightningModule, bits: int, group: int | None) -> LightningModule:
    """Return a copy whose matrices and kernels are rounded to the nearest of `2^bits - 1` values around 0.

        w -> s round(w / s),    s = max |w| / (2^(bits - 1) - 1)  over the weights that share a scale

    As weights are stored for inference (Linear, convolution, embedding, recurrent); biases and norms stay. Our own few
    lines, since torch.ao's are deprecated, and run on some CPUs alone; inputs of layers are not rounded.

    Args:
        module: The module. It is left as it is.
        bits: 8 or 4.
        group: How many weights of one output channel, one after the other, share a scale; None for all of them.

    Example:
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 1)
        >>> line = Line()
        >>> _ = line.layer.weight.data.copy_(torch.tensor([[0.7, 0.32, 0.04]]))
        >>> round_weights(line, bits=4, group=None).layer.weight.data
        tensor([[0.7000, 0.3000, 0.0000]])
    """
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        for weight in rounded.parameters():
            if weight.ndim > 1 and weight.is_floating_point():
                weight.copy_(_round(weight, 2 ** (bits - 1) - 1, group))
    return rounded


def _round(weight: Tensor, largest: int, group: int | None) -> Tensor:
    rows = weight.flatten(1)  # [out, rest]
    pieces = torch.split(rows, group or rows.shape[1], dim=1)
    scales = [piece.abs().amax(dim=1, keepdim=True) / largest for piece in pieces]
    # Where all weights of a group are 0, so is its scale; they stay.
    rounded = [torch.where(s > 0, (p / s).round() * s, p) for p, s in zip(pieces, scales, strict=True)]
    return torch.cat(rounded, dim=1).view_as(weight)


def _compare(subject: Subject, name: str, bits: int, group: int | None) -> Measured:
    before, rounded = subject.scores("forget"), round_weights(subject.module, bits, group)
    after = subject.read(rounded, "forget")
    shared = "output channel" if group is None else f"{group} of them"
    how = f"weights rounded to {bits} bits, one scale for each {shared}"
    loss = (
        f"change of the mean loss of the forgotten samples by {how}, in its unit; below 0 the model knows them better"
    )
    found = {f"{name}_loss": (change(after.losses, before.losses), f"{loss}; good: not below the control's.")}
    if before.log_probs is None:
        return found
    share = f"change of the share of forgotten samples that are recognised, by {how}"
    sides = (x.recognised.mean().item() for x in (before, after))
    told = "{:.2g} before, {:.2g} after".format(*sides)
    found[name] = (change(after.recognised, before.recognised), f"{share} ({told}); good: near 0, as the control's.")
    attacked = f"AUC of the membership attack by loss on {how}; good: near 0.5, as the control's."
    found[f"{name}_auc"] = (subject.membership(rounded, after), attacked)
    return found
