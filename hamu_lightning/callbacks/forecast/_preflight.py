"""Preflight: what an unlearning run can expect, measured before any weight changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer

from hamu_lightning.callbacks.forecast._in_fit import BATCHES
from hamu_lightning.callbacks.forecast._probe import Probe, check_two_groups
from hamu_lightning.callbacks.forecast._report import PreflightReport
from hamu_lightning.callbacks.passes import BarePass, ModuleGuard, batchnorm_frozen, check_module, without_trainer
from hamu_lightning.checks import check_count, check_number, check_optional, check_seed, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim import NamedMasks
from hamu_lightning.randomness import RandomStream
from hamu_lightning.rules import Rule

if TYPE_CHECKING:
    pass


def preflight(
    module: nn.Module,
    retain_loader: Iterable[Any],
    forget_loader: Iterable[Any],
    rule: Rule,
    batches: int = BATCHES,
    *,
    target: float | None = None,
    lr: float | None = None,
    batchnorm: Literal["freeze", "retain"] = "freeze",
    seed: int = 0,
    mask: NamedMasks | None = None,
) -> PreflightReport:
    """Predict what unlearning will cost and whether the quota can be had, before any weight changes.

    Runs the module's `training_step` without a Trainer on pairs of a retain and a forget batch, asks the rule for the
    step of each pair, and takes means with bootstrap intervals over the pairs. Weights, gradients, buffers, the
    module's attributes and the global random state are what they were afterwards. The module is taken in the mode
    (train, eval) and precision and on the device that it is in; `self.log` does nothing.

    Both loaders are iterated from the start, DataLoaders through copies that share the dataset only. What a dataset or
    a loader of another kind changes in itself when it is iterated (a position in a file, a random generator of its
    own) stays changed: give such a one its own copy.

    Args:
        module: A LightningModule, or another module with `training_step(batch)` or `training_step(batch, batch_idx)`.
        retain_loader: Batches to retain; one pass at most.
        forget_loader: Batches to forget; cycles when it is shorter.
        rule: The rule of the run that is planned. A `TargetQuota` needs a number as its target, and its steps.
        batches: The largest number of batch pairs.
        target: The forget loss to be reached. Default: that of a `TargetQuota`.
        lr: Learning rate of all trainable weights. Default: the learning rates of `configure_optimizers()`.
        batchnorm: As for `HAMUCallback`: "freeze" takes BatchNorm layers in evaluation mode, "retain" as they are.
        seed: Seed of the random numbers that shuffling, dropout and the like draw.
        mask: As for `HAMUOptimizer`: which weights may move.

    Raises:
        HAMUValueError: If an argument cannot be used, or a loader is empty or can be iterated only once.
        HAMUStateError: If the module needs a Trainer: `HAMUCallback(preflight=True)` then does the same in the fit.

    Example:
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from torch.utils.data import DataLoader
        >>> from hamu_lightning.rules import HAMUQ
        >>> loader = DataLoader(torch.eye(32), batch_size=8)
        >>> report = preflight(BoringModel(), loader, loader, HAMUQ(quota=1e-3))
        >>> round(report.estimates["cosine"].mean, 3), report.pairs
        (1.0, 4)
    """
    check_arguments(module, rule, batches, batchnorm)
    batches, seed = int(batches), check_seed(seed)
    lr, target = check_optional(check_number, "lr", lr, least=0), check_optional(check_number, "target", target)
    guard = ModuleGuard(module)
    probe = Probe(module, _find_groups(module, lr, guard, seed), rule, mask=mask)
    forget = BarePass(module, forget_loader, "forget", guard, RandomStream(seed), probe.forget)
    retain = BarePass(module, retain_loader, "retain", guard, RandomStream(seed, rank=1), probe.retain)
    with batchnorm_frozen(module, batchnorm == "freeze"):
        return probe.measure(forget.run, retain.run, min(batches, retain.stream.length or batches), target)


def check_arguments(module: Any, rule: Any, batches: int, batchnorm: str) -> None:
    """Raise unless the preflight can run."""
    check_module(module, batchnorm)
    check_type("rule", rule, Rule, "a rule such as HAMUQ(quota=1e-3)")
    check_two_groups(rule)
    quota = rule.target_quotas.get("forget")
    if quota is not None and (quota.steps is None or not isinstance(quota.target, float | int)):
        raise HAMUValueError(
            "Expected a number as target and a number of steps, but got neither or one. Give both, TargetQuota(2.3, "
            "steps=100), or let HAMUCallback(..., preflight=True) measure the target and count the steps of the fit."
        )
    check_count("batches", batches)


def _find_groups(module: Any, lr: float | None, guard: ModuleGuard, seed: int) -> Sequence[Mapping[str, Any]]:
    """Parameter groups with learning rates: one group at `lr`, or those of the module's optimizer."""
    if lr is not None:
        return [{"params": [p for p in module.parameters() if p.requires_grad], "lr": lr}]
    if not callable(getattr(module, "configure_optimizers", None)):
        raise HAMUValueError("Expected `lr`, since the module has no `configure_optimizers()`. Pass lr=1e-2, say.")
    with RandomStream(seed).active(), guard.guarding(), without_trainer(module):
        found = list(_find_optimizers(module.configure_optimizers()))
    if len(found) != 1:
        raise HAMUValueError(
            f"Expected `configure_optimizers()` to return one optimizer, but got {len(found)}. "
            "Pass `lr`, or use one optimizer with several parameter groups."
        )
    return found[0].param_groups


def _find_optimizers(configured: Any) -> Iterator[Optimizer]:
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from _find_optimizers(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for part in configured:
            yield from _find_optimizers(part)
