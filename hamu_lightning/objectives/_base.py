"""What every objective is: a quantity that is raised on the forget stream or lowered on the retain stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.checks import check_number, check_positive, check_type, describe
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives._outputs import Outputs
from hamu_lightning.objectives._packed import find_sequences
from hamu_lightning.objectives._prediction import Prediction, make_prediction


class Stateful(Protocol):
    """Has a state that belongs into a checkpoint: tensors, numbers and dicts of them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def final_state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint of a fit that has ended."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over; an empty one makes a fresh start."""
        ...


def to_raise(loss: Tensor) -> Tensor:
    """The quantity to raise where a paper has a forget loss to be *minimised*: its negative.

    This is the only place where an objective turns a sign round. All others are in the rules, which raise the
    forget quantity and lower the retain quantity.
    """
    return -loss


@dataclass
class BatchPass:
    """One batch on its way through the module, as an objective sees it.

    Args:
        module: The module that is trained, in the mode that it is in.
        batch: The batch, on the module's device.
        training_step: Runs the module's own `training_step` on the batch and returns its loss; None where there is no
            such step.
    """

    module: nn.Module
    batch: Any
    training_step: Callable[[], Any] | None = None
    _predictions: list[tuple[Outputs, Prediction]] = field(default_factory=list, init=False, repr=False)

    def predict(self, outputs: Outputs) -> Prediction:
        """Run the module on the batch, once for all objectives that ask in the same way."""
        for known, prediction in self._predictions:
            if known == outputs:
                return prediction
        logits, labels = outputs(self.module, self.batch)
        prediction = make_prediction(logits, labels, find_sequences(self.batch, labels.shape))
        self._predictions.append((outputs, prediction))
        return prediction

    def module_loss(self) -> Tensor:
        """The loss of the module's own `training_step`, 0-d."""
        loss = None if self.training_step is None else self.training_step()
        if not isinstance(loss, Tensor):
            raise HAMUStateError(
                f"Expected the module's `training_step` to return a loss for this objective, but got {describe(loss)}. "
                "Only ModuleLoss() on its own can skip a batch."
            )
        return loss.mean()


class Objective(ABC):
    """A quantity of the module and a batch, differentiable in the weights.

    On the forget stream the rules *raise* it, on the retain stream they *lower* it. So a forget loss that its paper
    minimises (NPO) is here its negative. Which it is stands in `is_forget_only`.

    Attributes:
        is_forget_only: Whether it makes sense on the forget stream alone.
        is_nonnegative: Whether it is at least 0 and can reach a positive target (`TargetQuota`).
        evaluates: Whether the module is asked in evaluation mode, without dropout, when it is raised.
    """

    is_forget_only: bool = True
    is_nonnegative: bool = False
    evaluates: ClassVar[bool] = False
    _parts: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def samples(self, batch: BatchPass) -> Tensor:
        """The quantity per sample, `[N]` in nats, or `[1]` where only the batch's mean is known."""

    def __call__(self, batch: BatchPass) -> Tensor:
        """The mean over the samples of a batch, 0-d."""
        return self.samples(batch).mean()

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be in a checkpoint: tensors, numbers and dicts of them."""
        states = {name: part.state_dict() for name, part in self._stateful().items()}
        return {name: state for name, state in states.items() if state}

    def final_state_dict(self) -> dict[str, Any]:
        """Return the same for a fit that has ended: without what only a running one needs, such as a second model."""
        states = {name: part.final_state_dict() for name, part in self._stateful().items()}
        return {**self.state_dict(), **{name: state for name, state in states.items() if state}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned; an empty dict makes a fresh start."""
        for name, part in self._stateful().items():
            part.load_state_dict(state.get(name, {}))

    def expect_start(self, expected: bool = True) -> None:
        """Tell references that the next batch is the first of a fit: they should be the module itself, and look."""
        for name, part in self._stateful().items():
            tell = getattr(part, "expect_start", None)
            if tell is not None and name != "teacher":
                tell(expected)

    def _stateful(self) -> dict[str, Stateful]:
        return {name: getattr(self, name) for name in self._parts}


class ModuleLoss(Objective):
    """The loss that the module's own `training_step` returns: plain training, and the default.

    Example:
        >>> import torch
        >>> float(ModuleLoss()(BatchPass(nn.Identity(), None, lambda: torch.tensor(2.0))))
        2.0
    """

    is_forget_only = False
    is_nonnegative = True

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        return batch.module_loss().reshape(1)


class LossCap(Objective):
    """An objective that stops rising: no gradient from samples whose value is above a level.

    Per sample `min(value, level)`, and the mean of it. It bounds forgetting sample by sample: those that are forgotten
    rest, the others go on. Around `ModuleLoss()`, which is one number, the batch counts as one sample; `CrossEntropy()`
    is per sample.

    Args:
        objective: What is capped.
        level: In the units of the objective (nats; the log of the number of classes is the cross-entropy of a guess).

    Raises:
        HAMUValueError: If an argument is of another kind.

    Example:
        >>> LossCap(ModuleLoss(), level=2.3).level
        2.3
    """

    _parts = ("objective",)

    def __init__(self, objective: Objective, level: float) -> None:
        check_objective("objective", objective)
        self.objective, self.level = objective, check_number("level", level)
        self.is_nonnegative = objective.is_nonnegative

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        return self.objective.samples(batch).clamp(max=self.level)


class WeightedSum(Objective):
    """A sum of objectives with positive weights, such as SCRUB's `alpha * KL + gamma * CE` on the retain stream.

    Objectives that ask the module in the same way share one forward pass. With `ModuleLoss()` as a term the module's
    `training_step` runs besides: a second forward pass, and what it logs is logged. `CrossEntropy()` needs neither.

    Args:
        *terms: Pairs of a weight and an objective.

    Raises:
        HAMUValueError: If there is no term, or a weight is not positive: what is to be raised and what is to be lowered
            does not belong into one sum.

    Example:
        >>> WeightedSum((0.5, ModuleLoss()), (2, ModuleLoss())).weights
        (0.5, 2.0)
    """

    def __init__(self, *terms: tuple[float, Objective]) -> None:
        cure = "Give what is to be raised to `objective`, and what is to be lowered to `retain_objective`."
        if not terms or not all(isinstance(term, Sequence) and len(term) == 2 for term in terms):
            raise HAMUValueError(
                "Expected pairs of a positive weight and an objective, but got "
                f"{', '.join(map(describe, terms)) or 'none'}. "
                "Write WeightedSum((1.0, ReferenceKL()), (0.1, CrossEntropy()))."
            )
        self.weights: Sequence[float] = tuple(check_positive("weight", weight, cure) for weight, _ in terms)
        self.objectives: Sequence[Objective] = tuple(check_objective("term", objective) for _, objective in terms)
        self.is_forget_only = any(o.is_forget_only for o in self.objectives)
        self.is_nonnegative = all(o.is_nonnegative for o in self.objectives)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        first, *others = (w * o.samples(batch) for w, o in zip(self.weights, self.objectives, strict=True))
        return sum(others, start=first)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {str(i): objective for i, objective in enumerate(self.objectives)}


def check_objective(name: str, value: object) -> Objective:
    """Raise unless a value is an objective; return it."""
    found: Objective = check_type(name, value, Objective, "one of hamu_lightning.objectives, such as NPO(beta=0.1)")
    return found
