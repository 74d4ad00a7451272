"""The model that objectives compare with: the module as it was before unlearning."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.checks import check_type
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives._base import BatchPass
from hamu_lightning.objectives._outputs import Outputs
from hamu_lightning.objectives._prediction import Prediction

# A reference that should be the starting model may differ from it by so much, for rounding: the distance in
# log-likelihood, in nats, as a mean over the labels of a batch.
_SAME = 0.25


class Reference(ABC):
    """A model in evaluation mode and without gradients, next to the one that is trained.

    Attributes:
        is_start: Whether it should be the module before the first step: True makes a difference an error, None a
            warning; False where it need not be, or cannot be anything else.
    """

    is_start: bool | None = False
    _is_due: bool = False

    @abstractmethod
    def using(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        """A context that gives the reference model; `module` is the one that is trained."""

    def logits(self, batch: BatchPass, outputs: Outputs) -> Tensor:
        """The reference model's logits of a batch, `[N, C]` or `[N, T, V]`.

        To be called after the module itself has run: where both share weights, autocast keeps the 16-bit copies of the
        first pass, and those of a pass without gradients would take the gradients of the second one away
        (https://github.com/pytorch/pytorch/issues/112583; mended in newer versions of torch than our oldest).
        """
        with torch.no_grad(), self.using(batch.module) as reference:
            return outputs(reference, batch.batch)[0]

    def logits_for(self, prediction: Prediction, batch: BatchPass, outputs: Outputs) -> Tensor:
        """The same in the form of a prediction, `[N, T, V]`: right where there is a label."""
        return prediction.align(self.logits(batch, outputs))

    def predict(self, batch: BatchPass, outputs: Outputs) -> tuple[Prediction, Tensor]:
        """What the module says about a batch, and then the reference model's logits in the same form."""
        prediction = batch.predict(outputs)
        logits = self.logits_for(prediction, batch, outputs)
        if self._is_due:
            self._compare(batch, outputs, prediction, prediction.log_likelihoods(logits))
        return prediction, logits

    def log_ratio(self, batch: BatchPass, outputs: Outputs) -> Tensor:
        """log(p(y|x) / p_ref(y|x)) per sample, `[N]` in nats, the likelihoods being products over tokens."""
        prediction = batch.predict(outputs)
        original = self.likelihoods_for(prediction, batch, outputs)
        if self._is_due:
            self._compare(batch, outputs, prediction, original)
        return _differ(prediction, prediction.log_likelihoods(), original)

    def likelihoods_for(self, prediction: Prediction, batch: BatchPass, outputs: Outputs) -> Tensor:
        """Log p_ref of each label, `[N, T]` in nats, or only their sums over each sample, `[N]`."""
        return prediction.log_likelihoods(self.logits_for(prediction, batch, outputs))

    def expect_start(self, expected: bool = True) -> None:
        """Compare with the module at the next batch, if this should be the same model then: a fit begins.

        A wrong reference makes every ratio of likelihoods, and all that is forgotten by it, wrong in silence.
        """
        self._is_due = expected and self.is_start is not False

    def _compare(self, batch: BatchPass, outputs: Outputs, prediction: Prediction, original: Tensor) -> None:
        self.expect_start(False)
        with torch.no_grad(), evaluating(batch.module):
            now = prediction.align(outputs(batch.module, batch.batch)[0])
        now = prediction.log_likelihoods(now)
        distances = (now if original.dim() == 2 else prediction.sum_over_places(now)) - original
        apart = float(distances.abs().sum() / prediction.mask.sum().clamp(min=1))
        if apart <= _SAME:
            return
        told = (
            f"Expected {type(self).__name__} to be the module before unlearning, but at the first batch their "
            f"log-likelihoods of a label differ by {apart:.3g} nats in the mean (at most {_SAME} are rounding)."
        )
        if self.is_start:
            raise HAMUStateError(f"{told} {self._cure}")
        warnings.warn(f"{told} {self._cure}", stacklevel=2)

    _cure = "If another model is meant, go on."

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be in a checkpoint."""
        return {}

    def final_state_dict(self) -> dict[str, Any]:
        """Return what has to be in the checkpoint of a fit that has ended."""
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # most references have no state
        """Go on with what `state_dict` returned; an empty dict makes a fresh start."""


def _differ(prediction: Prediction, likelihoods: Tensor, original: Tensor) -> Tensor:
    """The sums over each sample, `[N]`, of log-likelihoods less those of the original, `[N, T]` or their sums `[N]`."""
    if original.dim() == 2:
        return prediction.sum_over_places(likelihoods - original)
    return prediction.sum_over_places(likelihoods) - original


class FrozenCopy(Reference):
    """A frozen copy of the module, made at its first use: the module as it was before the first step.

    Costs the memory of a second model. The copy belongs to nobody's `state_dict` but to the callback's state: a resumed
    run compares with the model from before the first step too, and the checkpoints of a running fit are so much larger.
    They hold the weights that still remember: delete them when unlearning is done. The checkpoint of a fit that has
    ended holds them no more, and neither does this object; to train on from it, give the original as `module`. Give the
    same `FrozenCopy` to both objectives to hold one copy.

    Args:
        module: A model to compare with instead of the copy. It is used as it is, in evaluation mode, on the trained
            module's device, and is not saved.

    Raises:
        HAMUStateError: If the module cannot be copied, or the fit that is to go on had ended.

    Example:
        >>> trained = nn.Linear(2, 2)
        >>> with FrozenCopy().using(trained) as reference:
        ...     _ = trained.weight.data.zero_()
        ...     reference.training, bool(reference.weight.any())
        (False, True)
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        check_type("module", module, nn.Module | None, "a model to compare with, or None for a copy of the trained one")
        self._given = module
        self.is_start = False if module is None else None  # a copy cannot be another model
        self._copy: nn.Module | None = None
        self._weights: dict[str, Any] | None = None
        self._is_released = False

    @override
    @contextmanager
    def using(self, module: nn.Module) -> Iterator[nn.Module]:
        if self._given is module:
            raise HAMUValueError(
                "Expected `module` of the reference to be another model, but it is the one that is trained. "
                "FrozenCopy() without an argument takes a copy of it."
            )
        if self._is_released:
            raise HAMUStateError(
                "Expected the weights from before the first step, but this goes on with a fit that had ended, and such "
                "a one keeps none. Go on from a checkpoint of the running fit, or give the original: "
                "FrozenCopy(original_module)."
            )
        if self._copy is None:
            self._copy = self._make(module) if self._given is None else _moved(self._given, module)
        with evaluating(self._copy):
            yield self._copy

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._given is not None:
            return {}
        weights = self._weights if self._copy is None else dict(self._copy.state_dict())
        if self._is_released:
            return {"released": True}
        return {} if weights is None else {"weights": weights}

    @override
    def final_state_dict(self) -> dict[str, Any]:
        return {"released": True} if self.state_dict() else {}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._given is None:
            self._copy, self._weights = None, state.get("weights")
            self._is_released = bool(state.get("released", False))

    def __getstate__(self) -> dict[str, Any]:
        """A copy of this object holds weights, and makes a model of them at its first use."""
        weights = self.state_dict().get("weights")
        kept = {name: getattr(self, name) for name in ("_given", "_is_released", "is_start")}
        return {**kept, "_copy": None, "_weights": weights}

    def _make(self, module: nn.Module) -> nn.Module:
        frozen = copy_module(module)
        if self._weights is not None:
            frozen.load_state_dict(self._weights)
            self._weights = None
        return frozen


def as_reference(reference: Reference | None) -> Reference:
    """The reference that an objective was given; a frozen copy of the trained module by default.

    Raises:
        HAMUValueError: If it is none.
    """
    cure = "A model of your own goes in as FrozenCopy(model)."
    wanted = "FrozenCopy(), AdaptersDisabled(), SecondAdapter(name) or CachedLogits(folder)"
    check_type("reference", reference, Reference | None, wanted, cure)
    return FrozenCopy() if reference is None else reference


@contextmanager
def evaluating(module: nn.Module, but: Callable[[nn.Module], bool] = lambda _: False) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its submodules back into its own mode at the end.

    `eval()` and `train()` are not called: modules override them to do more.

    Args:
        module: The module.
        but: Which of its submodules keep their mode.

    Example:
        >>> module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(module):
        ...     module[0].training
        False
        >>> module[0].training, module[1].training
        (True, False)
    """
    modes = [(part, part.training) for part in module.modules() if not but(part)]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def copy_module(module: nn.Module) -> nn.Module:
    """A copy of a module that shares nothing with it, frozen and in evaluation mode."""
    try:
        twin = copy.deepcopy(module)
    except Exception as error:  # what a module refuses with is its own choice
        raise HAMUStateError(
            f"Expected to be able to copy {type(module).__name__} for the reference, but it refused: {error}. "
            "Give the reference a model of its own, FrozenCopy(model), or stored results, CachedLogits(folder)."
        ) from error
    for original, part in zip(module.modules(), twin.modules(), strict=True):
        _restore_forward(original, part)
    return twin.requires_grad_(False).eval()


def _restore_forward(original: nn.Module, part: nn.Module) -> None:
    """Undo a replaced `forward` that was not copied: it would run the weights of the original."""
    forward = vars(part).get("forward")
    if forward is None or forward is not vars(original).get("forward"):
        return
    if not hasattr(forward, "_torchdynamo_orig_callable"):
        raise HAMUStateError(
            f"Expected `forward` of {type(part).__name__} to be a method, but it was replaced by {forward}, which a "
            "copy would share. Give the reference a model of its own, FrozenCopy(model)."
        )
    del part.__dict__["forward"]  # torch.compile of a LightningModule; the copy runs uncompiled


def _moved(given: nn.Module, module: nn.Module) -> nn.Module:
    """The given model on the device of the trained one."""
    here, there = (next((weight.device for weight in m.parameters()), None) for m in (given, module))
    return given if there is None or here == there else given.to(there)
