"""The optimizer wrapper: works in a plain PyTorch loop, with Fabric, and under Lightning."""

from hamu_lightning.optim._aim import Aim, Exchange
from hamu_lightning.optim._checks import is_plain_sgd
from hamu_lightning.optim._engine import Plan
from hamu_lightning.optim._hamu_optimizer import HAMUOptimizer
from hamu_lightning.optim._mask import NamedMasks, keep_largest
from hamu_lightning.optim._report import StepReport
from hamu_lightning.optim._scaling import unscale_unseen_
from hamu_lightning.optim._slots import GradientSlot, hidden_gradients
from hamu_lightning.optim._trial import Referee, Snapshot, Verdict

__all__ = [
    "Aim",
    "Exchange",
    "GradientSlot",
    "HAMUOptimizer",
    "NamedMasks",
    "Referee",
    "Plan",
    "Snapshot",
    "StepReport",
    "Verdict",
    "hidden_gradients",
    "is_plain_sgd",
    "keep_largest",
    "unscale_unseen_",
]
