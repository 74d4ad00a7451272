"""What decides: where the forget loss should end, when to stop, whose turn it is, whether a step kept its promise."""

from hamu_lightning.callbacks.goals._approach import Approach
from hamu_lightning.callbacks.goals._conditions import (
    CEILINGS,
    CollateralDamage,
    ForgetAbove,
    Infeasible,
    NotFinite,
    RetainAbove,
    StopCondition,
    StopOn,
    StopReason,
    as_conditions,
    look_at_loss,
)
from hamu_lightning.callbacks.goals._confirmation import Confirm
from hamu_lightning.callbacks.goals._loss_forms import FORMS, SampleRead, agrees, find_form
from hamu_lightning.callbacks.goals._movement import Movement
from hamu_lightning.callbacks.goals._planning import warn_about_budget
from hamu_lightning.callbacks.goals._reading import Reader, one_by_one, read_as_held_out
from hamu_lightning.callbacks.goals._retain_guard import RetainGuard, choose_guard
from hamu_lightning.callbacks.goals._retain_watch import RETAIN, RetainWatch
from hamu_lightning.callbacks.goals._samples_table import ForgottenSamples
from hamu_lightning.callbacks.goals._stopper import Stopper
from hamu_lightning.callbacks.goals._surroundings import AnswerTarget
from hamu_lightning.callbacks.goals._targets import ByObjective, Chance, Holdout, Target, as_target
from hamu_lightning.callbacks.goals._transforms import explain_difference, with_transforms_of
from hamu_lightning.callbacks.goals._turns import Turns
from hamu_lightning.callbacks.goals._unseen import SecondChoice, Unseen
from hamu_lightning.callbacks.goals._verification import Verifier, VerifySteps

__all__ = [
    "CEILINGS",
    "ByObjective",
    "AnswerTarget",
    "Approach",
    "Chance",
    "CollateralDamage",
    "Confirm",
    "FORMS",
    "ForgetAbove",
    "ForgottenSamples",
    "Holdout",
    "Infeasible",
    "Movement",
    "NotFinite",
    "RETAIN",
    "Reader",
    "RetainAbove",
    "SecondChoice",
    "RetainGuard",
    "RetainWatch",
    "SampleRead",
    "StopCondition",
    "StopOn",
    "StopReason",
    "Stopper",
    "Target",
    "Turns",
    "Unseen",
    "Verifier",
    "VerifySteps",
    "agrees",
    "as_conditions",
    "as_target",
    "choose_guard",
    "explain_difference",
    "find_form",
    "look_at_loss",
    "one_by_one",
    "read_as_held_out",
    "warn_about_budget",
    "with_transforms_of",
]
