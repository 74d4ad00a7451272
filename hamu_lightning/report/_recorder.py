"""Keeps what each step reported, for pictures after the fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from hamu_lightning.optim import StepReport


class _ReportsSteps(Protocol):
    @property
    def last_step(self) -> StepReport | None: ...


@dataclass(frozen=True, eq=False)
class StepHistory:
    """The steps of a fit on the host, float64. `S` steps, `B` blocks of weights.

    Kappas and `norms` are in squared loss units per squared unit of weight, quota and improvements in loss units per
    step; a positive improvement serves its objective (docs/method.md#one-step).

    Args:
        steps: `[S]`, int64, the trainer's global step after each recorded step; the first one is 1.
        labels: The names of the blocks, in the order of the columns.
        kappa: `[S, B]`, the hardness `g_r·g_f`.
        kappa_1: `[S, B]`, the threshold up to which the plain step is enough.
        kappa_2: `[S, B]`, the threshold above which a block must harm the other objective.
        norms: `[S, B]`, the product `|g_r||g_f|`; kappa divided by it is the cosine of the angle.
        quota: `[S]`, what was asked.
        retain_improvement: `[S]`, the predicted fall of the retain loss.
        forget_improvement: `[S]`, the predicted rise of the forget loss.
        margin: `[S]`, how much more than the quota could be had without harm
            (docs/method.md#certificates, eq. 6.5).
    """

    steps: Tensor
    labels: tuple[str, ...]
    kappa: Tensor
    kappa_1: Tensor
    kappa_2: Tensor
    norms: Tensor
    quota: Tensor
    retain_improvement: Tensor
    forget_improvement: Tensor
    margin: Tensor


class StepRecorder(Callback):
    """Records every combined step of a `HAMUCallback`.

    At `on_train_batch_end` the numbers of a new step are packed into one small tensor on the device (a copy, 4 numbers
    per block of weights); nothing is read on the host before `history` is called. Accumulation windows count once. A
    second fit goes on with the same record; validation is not recorded. The record is not part of checkpoints.

    Args:
        source: The `HAMUCallback` of the same trainer, or anything else with its `last_step`.

    Example:
        >>> from hamu_lightning import HAMUCallback, HAMUQ
        >>> hamu = HAMUCallback(forget=[...], rule=HAMUQ(quota=1e-3))
        >>> recorder = StepRecorder(hamu)
        >>> # Trainer(callbacks=[hamu, recorder]).fit(module, retain_loader); recorder.history()
    """

    def __init__(self, source: _ReportsSteps) -> None:
        super().__init__()
        self._source = source
        self._seen: StepReport | None = None
        self._steps: list[int] = []
        self._packed: list[Tensor] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        report = self._source.last_step
        if report is None or report is self._seen:
            return
        self._seen = report
        self._steps.append(trainer.global_step)
        self._packed.append(_pack(report))

    def history(self) -> StepHistory:
        """Return all recorded steps, with one read of the host."""
        n_blocks = len(self._seen.labels) if self._seen else 0
        table = torch.stack(self._packed).cpu() if self._packed else torch.zeros(0, 4 * n_blocks + 4)
        wide, scalars = table[:, : 4 * n_blocks].double(), table[:, 4 * n_blocks :].double()
        kappa, kappa_1, kappa_2, norms = wide.reshape(len(self._steps), 4, n_blocks).unbind(dim=1)
        return StepHistory(
            torch.tensor(self._steps, dtype=torch.long),
            self._seen.labels if self._seen else (),
            kappa,
            kappa_1,
            kappa_2,
            norms,
            *scalars.unbind(dim=1),
        )


def _pack(report: StepReport) -> Tensor:
    """The numbers of one step in the order of `StepHistory`: `[4 B + 4]`."""
    step = report.coefficients
    squares = step.pair_gramian.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # [B, 2]
    scalars = (step.total_quota, step.retain_improvement, step.forget_improvement, step.margin)
    return torch.cat((report.kappa, *report.thresholds, squares.prod(dim=1), torch.stack(scalars))).detach()
