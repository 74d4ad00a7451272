"""What HAMUCallback refuses, at the start of the fit, with the cure."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim import HAMUOptimizer, is_plain_sgd

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from hamu_lightning.callbacks._settings import FitSettings
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.passes import AbsentData
from hamu_lightning.objectives import Objective
from hamu_lightning.rules import Rule, find_adapters

MANUAL_RECIPE = """\
Expected automatic optimization, but the module sets `automatic_optimization = False`. There the module steps itself: \
let it use HAMUOptimizer instead of the callback:
    optimizer = HAMUOptimizer(torch.optim.SGD(self.parameters(), lr=1e-2), HAMUQ(quota=1e-3))  # configure_optimizers
    optimizer = self.optimizers()                                                              # training_step
    with optimizer.retain(): self.manual_backward(retain_loss)
    with optimizer.forget(): self.manual_backward(forget_loss)
    optimizer.step()"""
# By name: these strategies cannot be imported everywhere, and `pytorch_lightning` has its own.
REFUSED_STRATEGIES = {
    "FSDPStrategy": "flattens the weights and shards them where HAMU cannot see which gradients belong together",
    "DeepSpeedStrategy": "keeps and applies the gradients in its own engine, so that two of them cannot be combined",
    "XLAStrategy": "is not tested",
    "XLAFSDPStrategy": "is not tested",
}


def check_strategy(strategy: Any) -> None:
    """Raise unless gradients can be combined under this strategy."""
    for base in type(strategy).__mro__:
        if base.__name__ in REFUSED_STRATEGIES:
            raise HAMUMisconfigurationError(
                f"Expected a strategy that keeps two gradients apart, but {base.__name__} "
                f"{REFUSED_STRATEGIES[base.__name__]}. Use Trainer(strategy=ModelParallelStrategy()) with "
                "torch's fully_shard for sharded weights, or strategy='ddp'."
            )


def check_setup(trainer: Trainer, module: LightningModule, callback: Any) -> None:
    """Raise unless the callback can work in this fit."""
    if not module.automatic_optimization:
        raise HAMUMisconfigurationError(MANUAL_RECIPE)
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise HAMUMisconfigurationError(
            "Expected `training_step` to take a batch, but it takes `dataloader_iter` and fetches its own batches: no "
            "forget batch can take their place. Let it take `batch`, or use manual optimization with HAMUOptimizer."
        )
    if len(trainer.optimizers) != 1:
        raise HAMUMisconfigurationError(
            f"Expected one optimizer, but `configure_optimizers` returned {len(trainer.optimizers)}. "
            "Use one optimizer with several parameter groups, or manual optimization with HAMUOptimizer."
        )
    if sum(isinstance(other, type(callback)) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise HAMUMisconfigurationError(
            "Expected one HAMUCallback, but the Trainer has several. Give all samples to forget to one of them."
        )


def check_data(settings: FitSettings) -> None:
    """Raise where the data was left out of the pickle that the callback comes from."""
    quotas = {} if settings.rule is None else settings.rule.target_quotas
    held_out = {f"the target of {name}": getattr(quota.target, "data", None) for name, quota in quotas.items()}
    named = settings.forget if isinstance(settings.forget, Mapping) else {"forget": settings.forget}
    for name, data in {**named, **settings.protect, **held_out}.items():
        if isinstance(data, AbsentData):
            raise HAMUMisconfigurationError(
                f"Expected the data of {name!r} ({data.description}), but the callback comes from a pickle, which "
                "holds no data. Build it anew with its loaders, HAMUCallback(forget=loader, ...); what it has done so "
                "far is in the checkpoints of the Trainer, fit(ckpt_path=...)."
            )


def check_sketch(trainer: Trainer, sketch: int | None, *, verifies: bool) -> None:
    """Raise unless projections of the gradients will do."""
    if sketch is None:
        return
    reasons = {
        "verified steps": verifies,
        "loss scaler (precision='16-mixed')": _compat.grad_scaler(trainer) is not None,
        "gradient clipping": _compat.clips_gradients(trainer),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise HAMUMisconfigurationError(
            f"Expected no {' and no '.join(found)} with `sketch`, which keeps projections of the gradients only. Leave "
            "`sketch` out, or set verify=False, another precision, or no clipping."
        )


def check_target(objective: Objective | None, rule: Rule) -> None:
    """Raise if a loss is to reach a target that the objective cannot reach."""
    is_judged = any(getattr(quota.target, "by_objective", False) for quota in rule.target_quotas.values())
    if is_judged and objective is not None and not objective.is_nonnegative:
        raise HAMUMisconfigurationError(
            "Expected an objective of at least 0 with a target in its own unit, ByObjective, but got "
            f"{type(objective).__name__}, which is at most 0. Give a target for the module's own loss, such as "
            "Holdout(loader), or a quota."
        )


def check_own_optimizer(base: Any, **given: Any) -> None:
    """Raise where settings are given that a HAMUOptimizer of the module's own would not heed."""
    ignored = [name for name, value in given.items() if value is not None]
    if isinstance(base, HAMUOptimizer) and ignored:
        raise HAMUMisconfigurationError(
            f"Expected a plain optimizer with `{ignored[0]}`, but `configure_optimizers` returned a HAMUOptimizer, "
            "which has its own settings. Let it return the plain optimizer; a mask can also be given to the wrapper, "
            "HAMUOptimizer(..., mask=mask)."
        )


def choose_exact(base: Any, settings: FitSettings) -> bool:
    """Return whether the rule's step itself is applied: as the user says, and by default where there is a target."""
    if settings.steps.exact is not None:
        return settings.steps.exact
    if not settings.has_target or isinstance(base, HAMUOptimizer) or is_plain_sgd(base):
        return False
    name, between = type(base).__name__, settings.passes.every_n_steps > 1
    if between or callable(getattr(base, "eval", None)):
        why = "the steps between the combined ones are its own" if between else "it keeps an average of its own steps"
        rank_zero_info(
            f"HAMU: {name} makes the steps towards the target, since {why}: it goes another way than the rule chose, "
            "which can cost retain data. With plain SGD the weights go as chosen."
        )
        return False
    rank_zero_info(
        f"HAMU: on the way to a target each step is applied as the rule chose it, in the place of {name}, of which no "
        "momentum, weight decay or scaling acts. StepOptions(exact=False) lets it act."
    )
    return True


def wrap_optimizer(module: LightningModule, base: Any, rule: Any, mask: Any = None, **options: Any) -> HAMUOptimizer:
    """Wrap the module's optimizer, or take the HAMUOptimizer that it made itself."""
    if isinstance(base, HAMUOptimizer):
        return base
    if rule is None:
        raise HAMUMisconfigurationError(
            "Expected `rule`, such as HAMUCallback(rule=HAMUQ(quota=1e-3)), but got None. "
            "It can be left out only when `configure_optimizers` returns a HAMUOptimizer."
        )
    try:
        adapters = find_adapters(module)
        names = module.named_parameters
        return HAMUOptimizer(base, rule, named_parameters=names, mask=mask, adapters=adapters, **options)
    except HAMUValueError as error:
        raise HAMUMisconfigurationError(str(error)) from error


def warn_about_averages(trainer: Trainer) -> list[str]:
    """Warn where another callback hands an average of the weights back; return the names of those that do."""
    found = [
        type(other).__name__
        for other in trainer.callbacks  # type: ignore[attr-defined]
        if any(re.search(r"Averag|EMA", base.__name__) for base in type(other).__mro__)
    ]
    for name in found:
        rank_zero_warn(
            f"{name} puts an average of the weights in the place of the model when the fit ends, and in validation. "
            "Weights from before unlearning are part of it: the forget loss of that model is lower than what is logged "
            "here, what stops the fit and what the summary says. Leave it out of this fit, or let the average begin "
            "when unlearning is over, such as EMAWeightAveraging(update_starting_at_step=...)."
        )
    return found


def best_checkpoints(trainer: Trainer) -> dict[str, str]:
    """The path of the best checkpoint so far, for each value that a checkpoint callback monitors."""
    found = {getattr(c, "monitor", None): getattr(c, "best_model_path", "") for c in trainer.checkpoint_callbacks}
    # Who monitors what unlearning does has chosen for unlearning.
    return {name: path for name, path in found.items() if name and path and not name.startswith(("forget/", "hamu/"))}


def warn_about_stale_best(before: dict[str, str], after: dict[str, str]) -> None:
    """Warn where the best checkpoint is from before the last step: whoever loads it takes unlearning back."""
    for monitor in sorted(name for name, path in after.items() if before.get(name) == path):
        rank_zero_warn(
            f"The best checkpoint by {monitor!r} is from before the end of this fit. Whoever loads it, as some "
            "projects do at the end of training, takes unlearning back. Keep the module as it is now, or save it: "
            "ModelCheckpoint(save_last=True) or trainer.save_checkpoint(path)."
        )


def warn_about_guess(loss: Tensor, batch: Any) -> None:
    """Warn where the first retain loss of a run is that of a guess: the weights of a trained model were not loaded.

    Args:
        loss: The mean loss of the batch, 0-d; read on the host.
        batch: Where its labels tell how many classes there are at least.
    """
    labels = batch.get("labels", batch.get("label")) if isinstance(batch, Mapping) else None
    if isinstance(batch, list | tuple) and len(batch) == 2:
        labels = batch[1]
    if not isinstance(labels, Tensor) or labels.ndim < 1 or labels.dtype not in (torch.int64, torch.int32):
        return
    guess = math.log(max(int(labels.max()) + 1, 1)) if labels.numel() else 0.0
    if guess > 0 and _AS_A_GUESS[0] * guess <= float(loss) <= _AS_A_GUESS[1] * guess:
        rank_zero_warn(
            f"The retain loss of the first batch is {float(loss):.3g}, and a guess among the classes of its labels "
            f"costs {guess:.3g}: the weights of the trained model were probably not loaded. Load them before the fit, "
            "Module.load_from_checkpoint(path), or `hamu-lightning unlearn --weights path`."
        )


# In units of the loss of a guess. What is far above is another kind of loss.
_AS_A_GUESS = (0.95, 3.0)
