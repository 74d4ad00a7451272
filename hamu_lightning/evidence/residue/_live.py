"""What a module, an optimizer, a trainer and a callback in memory may still hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from hamu_lightning.callbacks import HAMUCallback
from hamu_lightning.evidence import Finding
from hamu_lightning.evidence.residue._checkpoints import has_moments, leaves
from hamu_lightning.evidence.residue._state import strip
from hamu_lightning.wording import count

_RENEW = (
    "They average training batches, forgotten ones among them unless these are long gone. Renew them: "
    "`reset_running_stats`, then retain batches in training mode."
)
_AVERAGE = "An average of weights reaches back before unlearning unless it began after it. Begin a new one."


def judge_module(module: LightningModule) -> Iterator[Finding]:
    """Running statistics, averaged weights, hyper-parameters and data that hang on the module."""
    parts = dict(module.named_modules())
    norms = [name for name, part in parts.items() if isinstance(part._buffers.get("running_mean"), Tensor)]
    if norms:
        which = norms[0] if len(norms) == 1 else f"{norms[0]}, ..."
        yield Finding(f"module: running statistics of {count(len(norms), 'norm')} ({which})", "unknown", _RENEW)
    else:
        yield Finding("module: running statistics", "no", "It has none.")
    for name, part in parts.items():
        if isinstance(part, AveragedModel):
            yield Finding(f"module: averaged weights, {name}", "yes" if part.n_averaged > 0 else "no", _AVERAGE)
        yield from _judge_attributes(part, name)
    if any(_is_data(leaf) for leaf in leaves(dict(module.hparams))):
        advice = "They go into each checkpoint and hparams.yaml. Leave them out: save_hyperparameters(ignore=...)."
        yield Finding("module: data among the hyper-parameters", "yes", advice)


def judge_optimizer(optimizer: Optimizer, place: str = "optimizer") -> Finding:
    """Moments: averages of past gradients."""
    if has_moments([dict(state) for state in optimizer.state.values()]):
        advice = "They average gradients of past batches, forgotten ones among them. Train on with a fresh optimizer."
        return Finding(f"{place}: moments", "yes", advice)
    return Finding(f"{place}: moments", "no", "It has none.")


def judge_trainer(trainer: Trainer) -> Iterator[Finding]:
    """Optimizers, callbacks that average weights, and the HAMUCallback."""
    for number, optimizer in enumerate(trainer.optimizers):
        yield judge_optimizer(optimizer, f"trainer: optimizer {number}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        averages = isinstance(callback, WeightAveraging | StochasticWeightAveraging)
        if averages or "EMA" in type(callback).__name__:  # as other packages call theirs
            yield Finding(f"trainer: averaged weights of {type(callback).__name__}", "unknown", _AVERAGE)


def judge_callback(callback: HAMUCallback) -> Iterator[Finding]:
    """The state that goes into checkpoints, and the table of forgotten samples."""
    _, kinds = strip(callback.state_dict())
    held = [*kinds]
    if callback.forgotten_samples:
        held.append("table of forgotten samples")
    if callback.settings.forget is not None:
        held.append("the data to forget")  # its pickles hold a description alone
    for what in held:
        yield Finding(f"HAMUCallback: {what}", "yes", "It is in memory, and goes with the callback.")


def _judge_attributes(part: nn.Module, name: str) -> Iterator[Finding]:
    for key, value in vars(part).items():
        # What begins with an underscore is torch's and Lightning's own, hyper-parameters among it.
        if not key.startswith("_") and any(_is_data(leaf) for leaf in leaves(_contents(value))):
            advice = "Data hang on the module, and go into each pickle of it. Take them off."
            yield Finding(f"module: {'.'.join(filter(None, [name, key]))}", "yes", advice)


def _contents(value: Any) -> Any:
    return value if isinstance(value, Mapping | list | tuple | Dataset | DataLoader) else None


def _is_data(value: Any) -> bool:
    return isinstance(value, Dataset | DataLoader)
