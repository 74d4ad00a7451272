"""Preflight: what an unlearning run can expect, measured before any weight changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._checks import HAMUMisconfigurationError
from hamu_lightning.callbacks._forget_pass import ForgetPass, check_loss, split_batch
from hamu_lightning.callbacks._guard import ModuleGuard
from hamu_lightning.callbacks._preflight_report import PreflightReport, make_report
from hamu_lightning.callbacks._streams import ForgetStream
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.optim import HAMUOptimizer, StepReport
from hamu_lightning.optim._aim import Aim
from hamu_lightning.optim._mask import NamedMasks
from hamu_lightning.optim._slots import hidden_gradients
from hamu_lightning.randomness import RandomStream
from hamu_lightning.rules import Rule

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

BATCHES = 16


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
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from hamu_lightning.rules import HAMUQ
        >>> loader = DataLoader(torch.eye(32), batch_size=8)
        >>> report = preflight(BoringModel(), loader, loader, HAMUQ(quota=1e-3))
        >>> round(report.estimates["cosine"].mean, 3), report.pairs
        (1.0, 4)
    """
    check_arguments(module, rule, batches, batchnorm)
    guard = ModuleGuard(module)
    probe = Probe(module, _find_groups(module, lr, guard, seed), rule, mask=mask)
    forget = BarePass(module, forget_loader, "forget", guard, RandomStream(seed), probe.forget)
    retain = BarePass(module, retain_loader, "retain", guard, RandomStream(seed, rank=1), probe.retain)
    with batchnorm_frozen(module, batchnorm == "freeze"):
        return probe.measure(forget.run, retain.run, min(batches, retain.stream.length or batches), target)


class Probe:
    """Asks the rule about gradients as they are, with the learning rates of an optimizer, and never moves a weight.

    Args:
        module: Whose weights they are.
        param_groups: Groups of the optimizer of the run. A learning rate of 0 (warm-up) is replaced by the schedule's
            `initial_lr`.
        rule: The rule.
        divisor: What each loss is divided by before its backward pass.
        mask: Which weights may move.
    """

    def __init__(
        self,
        module: nn.Module,
        param_groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        divisor: int = 1,
        mask: NamedMasks | None = None,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(g["params"]), "lr": float(g["lr"]) or float(g.get("initial_lr", 0.0))} for g in param_groups
        ]
        if not any(group["lr"] for group in groups):
            raise HAMUValueError(
                "Expected a learning rate above 0 for the preflight, but all are 0. Start the schedule above 0, or "
                "call `hamu_lightning.preflight(..., lr=...)`."
            )
        # Plain SGD of its own: the base optimizer of the run and its state are not touched.
        self.optimizer = HAMUOptimizer(SGD(groups), rule, module.named_parameters(), mask=mask)
        self.optimizer.approve = lambda report: False
        self.forget, self.retain = self.optimizer.forget, self.optimizer.retain
        self._parameters = {id(p): p for group in groups for p in [*group["params"], *module.parameters()]}
        self._share = 1 / divisor
        self._quota = rule.target_quotas.get("forget")

    def take_aim(self, aim: Aim) -> None:
        """Ask for the same target, in the same number of steps, as the optimizer of the run."""
        self.optimizer.aim.target, self.optimizer.aim.steps, self.optimizer.aim.taken = aim.target, aim.steps, aim.taken

    def measure(
        self, forget: Callable[[], Tensor], retain: Callable[[], Tensor], pairs: int, target: float | None = None
    ) -> PreflightReport:
        """Measure so many batch pairs, and summarise them.

        Args:
            forget: Runs the next forget batch inside `self.forget()`, and returns its loss.
            retain: Likewise, inside `self.retain()`.
            pairs: How many.
            target: The forget loss to be reached; default: that of a `TargetQuota`.
        """
        rows: list[dict[str, float]] = []
        for _ in range(pairs):
            report, numbers = self._measure_pair(forget, retain)
            step = report.coefficients
            numbers["is_finite"] = step.is_finite & (numbers["retain_loss"] + numbers["forget_loss"]).isfinite()
            values = torch.stack([number.to(report.lr) for number in numbers.values()]).tolist()
            rows.append(dict(zip(numbers, values, strict=True)))
        bound = "forget" if step.constrained == 1 else "retain"
        if target is None and self._quota is not None:
            target = float(self._quota.target if self.optimizer.aim.target is None else self.optimizer.aim.target)
        finite = [row for row in rows if row.pop("is_finite")]
        return make_report(finite, left_out=pairs - len(finite), blocks=len(report.labels), target=target, bound=bound)

    def _measure_pair(
        self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]
    ) -> tuple[StepReport, dict[str, Tensor]]:
        with hidden_gradients(self._parameters.values()):
            try:
                losses = {"forget_loss": forget(), "retain_loss": retain()}  # as in a fit: the forget pass first
                if self._quota is not None:
                    self.optimizer.aim.level = losses["forget_loss"].double()
                self.optimizer.plan_step("combine", window_shares=(self._share, self._share))
                self.optimizer.step()
            finally:
                self.optimizer.release_forget()
        report = self.optimizer.last_step
        assert report is not None
        return report, {**losses, **describe_step(report)}


def describe_step(report: StepReport) -> dict[str, Tensor]:
    """The numbers of one batch pair by name, 0-d each; see `PreflightReport`."""
    step = report.coefficients
    total, radius = step.gramian.sum(dim=0), step.radius.square().sum().sqrt()
    norms = total.diagonal().clamp(min=0).sqrt()
    bound, free = step.constrained, 1 - step.constrained
    share = step.total_quota / radius
    block_norms = step.gramian[:, bound, bound].clamp(min=0).sqrt()
    capacity = (step.radius * block_norms).sum()
    kappa_1, kappa_2 = report.thresholds
    return {
        "retain_norm": norms[0],
        "forget_norm": norms[1],
        "kappa": report.kappa.sum(),
        "kappa_1": -share * norms[free],
        "kappa_2": norms[free] * (norms[bound].square() - share.square()).clamp(min=0).sqrt(),
        "cosine": report.total_cosine,
        "conflicting_blocks": share_of(report.cosine > 0),
        "direct_blocks": share_of(report.kappa <= kappa_1),
        "damaging_blocks": share_of((report.kappa > kappa_2) & (report.kappa > 0)),
        "quota": step.total_quota,
        "largest_quota": capacity,
        "free_quota": step.feasible_improvement,
        "infeasible": (step.total_quota > capacity * (1 + 1e-9)).double(),
        "forget_improvement": step.forget_improvement,
        "retain_cost": -step.retain_improvement,
    }


def share_of(blocks: Tensor) -> Tensor:
    """The share of blocks `[B]`, bool, that are True."""
    return blocks.double().mean()


class BarePass:
    """Runs batches through `training_step` without a Trainer, and leaves nothing behind but the gradient.

    Args:
        module: The module.
        loader: Its batches.
        name: What the loader is called in errors.
        guard: Keeps the module as it was.
        random: The random numbers of the pass.
        slot: A context in which `backward()` accumulates.

    Attributes:
        samples: How many samples the last batch had; NaN where that cannot be told.
    """

    samples = math.nan

    def __init__(
        self,
        module: Any,
        loader: Iterable[Any],
        name: str,
        guard: ModuleGuard,
        random: RandomStream,
        slot: Callable[[], Any],
    ) -> None:
        if not isinstance(loader, Iterable):
            raise HAMUValueError(
                f"Expected `{name}_loader` to be a DataLoader or another iterable of batches, but got "
                f"{type(loader).__name__}. A Dataset becomes one by DataLoader(dataset, batch_size=...)."
            )
        self.stream = ForgetStream(twin_loader(_compat.without_indices(loader)), random)
        if self.stream.length == 0:
            raise HAMUValueError(f"Expected `{name}_loader` to hold at least one batch, but it is empty.")
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._module, self._name, self._guard, self._random, self._slot = module, name, guard, random, slot

    def run(self) -> Tensor:
        """Run the next batch that gives a loss."""
        for _ in range(self.stream.length or 100):
            loss = self.run_next()
            if loss is not None:
                return loss
        raise HAMUStateError(
            f"Expected `training_step` to return a loss, but it returned None for all {self._name} data."
        )

    def run_next(self) -> Tensor | None:
        """Run the next batch, and return its loss, if it gives one."""
        self._random.draw += 1
        with self._random.active(), self._guard.guarding(), without_trainer(self._module):
            batch = _compat.transfer_batch_alone(self._module, next(self.stream), self._device)
            self.samples = _compat.count_samples(batch)
            arguments = _compat.step_arguments(self._module, batch, self._random.draw - 1)
            loss: Any = _compat.split_step_output(self._module.training_step(*arguments))
            if loss is None:
                return None
            check_loss(loss)
            with self._slot():
                torch.autograd.backward(loss)
            detached: Tensor = loss.detach().float().mean().clone()
            return detached


class FitPreflight:
    """The same in a fit, through the trainer's strategy, precision, transfer and clipping.

    Args:
        trainer: The trainer, with its loaders set up.
        optimizer: The optimizer of the fit; it is only asked for its rule, its mask and its learning rates.
        forget_loader: The loader of forget batches; None where the training loader brings them.
        seed: Of the random numbers.

    Raises:
        HAMUMisconfigurationError: With several processes, or where a loader can be iterated only once.
    """

    def __init__(self, trainer: Trainer, optimizer: HAMUOptimizer, forget_loader: Any, seed: int) -> None:
        if trainer.world_size > 1:
            raise HAMUMisconfigurationError(
                f"Expected one process with `preflight=True`, but the Trainer has {trainer.world_size}: the batches of "
                "one are not those of all. Call `hamu_lightning.preflight(module, retain_loader, forget_loader, rule)` "
                "in one process before the fit, with the joint batch size."
            )
        check_two_groups(optimizer.rule)
        self._trainer, self._aim = trainer, optimizer.aim
        randoms = RandomStream(seed), RandomStream(seed, rank=1)
        try:
            divisor, module = trainer.accumulate_grad_batches, trainer.lightning_module
            self._probe = Probe(module, optimizer.param_groups, optimizer.rule, divisor, optimizer.mask)
            streams = [twin_loader(loader) for loader in (forget_loader, _compat.train_batches(trainer))]
        except HAMUValueError as error:
            raise HAMUMisconfigurationError(str(error)) from error
        self._forget, self._retain = (
            ForgetPass(trainer, self._probe.optimizer, random, slot, ModuleGuard(trainer.lightning_module))
            for random, slot in zip(randoms, (self._probe.forget, self._probe.retain), strict=True)
        )
        if forget_loader is not None:
            self._forget.stream = ForgetStream(streams[0], randoms[0])
        self._retain.stream = ForgetStream(streams[1], randoms[1])
        self._batch: Any = None
        self._index = -1

    def run(self, forget_step: Callable[..., Any], retain_step: Callable[..., Any]) -> PreflightReport:
        """Measure, before the first forget pass: all hooks that prepare the module have run, BatchNorm is frozen.

        Args:
            forget_step: Runs a forget batch: the strategy's `training_step`, or an objective.
            retain_step: Runs a retain batch, likewise.
        """
        pairs = int(min(BATCHES, self._trainer.num_training_batches))
        self._probe.take_aim(self._aim)
        return self._probe.measure(
            partial(self._run_forget, forget_step), partial(self._run_retain, retain_step), pairs
        )

    def _run_forget(self, step: Callable[..., Any]) -> Tensor:
        self._index += 1
        forget = None
        if self._forget.stream is None:
            self._batch, forget = split_batch(self._retain.fetch(), self._probe.optimizer.rule.groups)
        return self._run(step, self._forget, forget)

    def _run_retain(self, step: Callable[..., Any]) -> Tensor:
        return self._run(step, self._retain, self._batch)

    def _run(self, step: Callable[..., Any], one: ForgetPass, batch: Any) -> Tensor:
        arguments = _compat.step_arguments(self._trainer.lightning_module, batch, self._index)
        loss = one.run(step, arguments, {}, batch)
        one.unscale()
        if _compat.clips_gradients(self._trainer):
            one.clip()
        return loss


def twin_loader(loader: Any) -> Any:
    """A loader that can be iterated beside this one: a DataLoader's copy, with samplers and generators of its own.

    Raises:
        HAMUValueError: If the loader is used up by iterating it.
    """
    if isinstance(loader, Iterator):
        raise HAMUValueError(
            f"Expected a loader that can be iterated again, but got a {type(loader).__name__}, which can be iterated "
            "only once: the preflight would take its batches away. Give a DataLoader or a list."
        )
    if isinstance(loader, _compat.CombinedBatches):
        return loader.twin(twin_loader)
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
    names = ("sampler", "batch_sampler", "generator")
    # Not by assignment, which DataLoader forbids. Persistent workers belong to the first one's iterator.
    twin.__dict__.update({name: _deep_copied(getattr(loader, name), memo) for name in names}, _iterator=None)
    return twin


def _deep_copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError, NotImplementedError):
        return value  # what cannot be copied is shared


@contextmanager
def batchnorm_frozen(module: nn.Module, is_frozen: bool) -> Iterator[None]:
    """Keep BatchNorm layers in evaluation mode, and put them back."""
    modes = {m: m.training for m in module.modules() if isinstance(m, _BatchNorm)} if is_frozen else {}
    try:
        for layer in modes:
            layer.training = False
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


@contextmanager
def without_trainer(module: Any) -> Iterator[None]:
    """Let `self.log` do nothing, and say what to do where `training_step` needs its Trainer.

    To be used inside `ModuleGuard.guarding()`, which puts the attributes back.
    """
    vars(module).update({name: _log_nothing for name in ("log", "log_dict") if hasattr(module, name)})
    try:
        yield
    except RuntimeError as error:
        # lightning/pytorch/core/module.py `trainer`
        if "attached to a `Trainer`" not in str(error):
            raise
        raise HAMUStateError(
            "Expected the module to work without a Trainer, but it asks for one. Use HAMUCallback(preflight=True), "
            "which measures the same at the start of the fit; or, where only `configure_optimizers` asks, pass `lr`."
        ) from error


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def check_module(module: Any, batchnorm: str) -> None:
    """Raise unless batches can be run through the module."""
    if not callable(getattr(module, "training_step", None)):
        raise HAMUValueError(
            f"Expected `module` to have a `training_step(batch)` that returns the loss, but {type(module).__name__} "
            "has none. Give the LightningModule, or add such a method."
        )
    if not getattr(module, "automatic_optimization", True):
        raise HAMUValueError(
            "Expected automatic optimization, but the module sets `automatic_optimization = False`: its "
            "`training_step` would change the weights. Give a module whose `training_step` only returns the loss."
        )
    if batchnorm not in ("freeze", "retain"):
        raise HAMUValueError(f"Expected `batchnorm` to be 'freeze' or 'retain', but got {batchnorm!r}.")


def check_arguments(module: Any, rule: Any, batches: int, batchnorm: str) -> None:
    """Raise unless the preflight can run."""
    check_module(module, batchnorm)
    if not isinstance(rule, Rule):
        raise HAMUValueError(f"Expected `rule` to be a rule such as HAMUQ(quota=1e-3), but got {rule!r}.")
    check_two_groups(rule)
    quota = rule.target_quotas.get("forget")
    if quota is not None and (quota.steps is None or not isinstance(quota.target, float | int)):
        raise HAMUValueError(
            f"Expected a number as target and a number of steps, but got {quota}. Give both, TargetQuota(2.3, "
            "steps=100), or let HAMUCallback(..., preflight=True) measure the target and count the steps of the fit."
        )
    if batches < 1:
        raise HAMUValueError(f"Expected `batches` to be at least 1, but got {batches}.")


def check_two_groups(rule: Rule) -> None:
    """Raise unless the rule has one group to forget, and none to protect."""
    if len(rule.groups) != 2:
        raise HAMUMisconfigurationError(
            f"Expected a rule with one group to forget for the preflight, but it has the groups {rule.groups}. Call "
            "`hamu_lightning.preflight` with HAMUQ for one of them."
        )


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
