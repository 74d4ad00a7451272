"""What a module says about a batch: logits and labels, in one form for classes and for tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from hamu_lightning.checks import check_flag, check_optional, check_type
from hamu_lightning.errors import HAMUValueError

# What `torch.nn.functional.cross_entropy` leaves out by default, and what Hugging Face writes into labels.
IGNORED = -100
CURE = (
    "Pass `outputs=`, a function of the module and the batch that returns logits [N, C] with labels [N], or logits "
    "[N, T, V] with labels [N, T] in which labels[n, t] is what logits[n, t] should predict (-100: nothing)."
)
# Brings logits into the form `[N, T, V]`.
Form: TypeAlias = Callable[[Tensor], Tensor]


class Outputs(Protocol):
    """How an objective asks a module about a batch.

    Returns logits `[N, C]` and labels `[N]` (one class per sample), or logits `[N, T, V]` and labels `[N, T]` (tokens),
    already aligned: `labels[n, t]` is what `logits[n, t]` should predict, -100 where nothing is. Two other forms are
    understood: logits `[N, C, ...]` with labels `[N, ...]` (a class for each place of an image), and one logit per
    sample, `[N]` or `[N, 1]`, with labels 0 and 1: two classes. It is also called with the reference model in the
    module's place.
    """

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits and labels."""
        ...


@dataclass(frozen=True)
class ModuleOutputs:
    """The default `Outputs`: calls the module itself.

    - A pair `(x, y)`: `module(x)` and `y`.
    - A mapping with `labels`: `module(**inputs)` with all entries but the labels. The labels go in as well where
      `forward` demands them, or where the model is an encoder and decoder (`config.is_encoder_decoder`), which makes
      its decoder's inputs from them.

    Logits are what the module returns: a tensor, or `.logits` or `["logits"]` of it.

    Causal language models predict token t + 1 at position t, and Hugging Face hands them labels that are copies of the
    inputs. With logits `[N, T, V]` labels are therefore moved by one position if and only if they are such a copy: the
    model is no encoder and decoder, and `input_ids` (of a pair: `x`) is an integer tensor of the labels' shape that
    equals them wherever they are not -100. Labels moved beforehand, token classes and masked tokens differ from the
    inputs, and stay. This is decided batch by batch, on the device.

    Args:
        shift: True always moves the labels of `[N, T, V]` logits, False never does.

    Raises:
        HAMUValueError: If the batch or what the module returns has another form.

    Example:
        >>> logits, labels = ModuleOutputs()(nn.Linear(4, 3), (torch.ones(2, 4), torch.tensor([0, 2])))
        >>> logits.shape, labels.tolist()
        (torch.Size([2, 3]), [0, 2])
    """

    shift: bool | None = None

    def __post_init__(self) -> None:
        """Check the choice."""
        check_optional(check_flag, "shift", self.shift)

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits and labels."""
        if isinstance(batch, Mapping) and "labels" in batch:
            labels = batch["labels"]
            is_seq2seq = _is_encoder_decoder(module)
            logits = _call(module, (), _select_inputs(module, batch, is_seq2seq))
            inputs = None if is_seq2seq else batch.get("input_ids")
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            inputs, labels = batch
            logits = _call(module, (inputs,), {})
        else:
            what = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise HAMUValueError(f"Expected a batch (x, y) or a mapping with 'labels', but got {what}. {CURE}")
        if not isinstance(labels, Tensor):
            raise HAMUValueError(f"Expected the labels to be a tensor, but got {type(labels).__name__}. {CURE}")
        return logits, self._align(logits, labels, inputs)

    def _align(self, logits: Tensor, labels: Tensor, inputs: Any) -> Tensor:
        if logits.dim() != 3 or labels.dim() != 2 or self.shift is False:
            return labels
        moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        if self.shift:
            return moved
        if not isinstance(inputs, Tensor) or inputs.is_floating_point() or inputs.shape != labels.shape:
            return labels
        is_copy = ((labels == inputs) | (labels == IGNORED)).all()
        return torch.where(is_copy, moved, labels)


def as_outputs(outputs: Outputs | None) -> Outputs:
    """The outputs that an objective was given; those of the module itself by default.

    Raises:
        HAMUValueError: If they are no function.
    """
    if outputs is None:
        return ModuleOutputs()
    found: Outputs = check_type("outputs", outputs, Callable, "a function of the module and the batch", CURE)
    return found


@dataclass(frozen=True)
class Prediction:
    """Logits and labels of N samples with T places each; a class per sample is one place.

    Attributes:
        logits: `[N, T, V]`, float32 or wider; 0 where `mask` is False, so that what stands there cannot do harm.
        labels: `[N, T]`, 0 where `mask` is False.
        mask: `[N, T]`, bool: where there is something to predict.
        form: Brings logits as a model returns them into that of `logits`.
    """

    logits: Tensor
    labels: Tensor
    mask: Tensor
    form: Form

    @property
    def is_sequence(self) -> bool:
        """Whether each sample is a sequence, `[N, T, V]` as it was."""
        return self.form is _as_it_is

    @property
    def is_answer(self) -> bool:
        """Whether the model gave one number for each sample, read as the logit of yes or no."""
        return self.form is _as_two_classes

    def align(self, logits: Tensor) -> Tensor:
        """Bring the logits of another model for the same batch into the form of `logits`."""
        places = self.form(logits)
        if places.shape != self.logits.shape:
            raise HAMUValueError(
                f"Expected the other model's logits to be of shape {list(self.logits.shape)}, but got "
                f"{list(places.shape)}. Both models need the same classes, and samples padded to the same length."
            )
        return _blanked(places, self.mask)

    def log_likelihoods(self, logits: Tensor | None = None) -> Tensor:
        """The log p of each label, `[N, T]` in nats, 0 where there is none; `logits` may be those of another model."""
        logits = self.logits if logits is None else logits
        # Not log_softmax: it would keep a second tensor of the size of the logits.
        picked = logits.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        return torch.where(self.mask, picked, 0.0)

    def mean_over_places(self, values: Tensor) -> Tensor:
        """The mean of `[N, T]` over each sample's places, `[N]`; 0 for a sample without one."""
        return mean_where(values, self.mask)


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `[N, T]` over each sample's places where `mask` is True, `[N]`; 0 for a sample without one."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def make_prediction(logits: Tensor, labels: Tensor) -> Prediction:
    """Check what `outputs` returned, and bring it into one form.

    Raises:
        HAMUValueError: If shapes do not fit, or labels are not classes.
    """
    form = _find_form(logits, labels)
    if form is None:
        raise HAMUValueError(
            "Expected logits [N, C] with labels [N], or logits [N, T, V] with labels [N, T], but got shapes "
            f"{list(logits.shape)} and {list(labels.shape)}. {CURE}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise HAMUValueError(f"Expected the labels to be classes, integers, but got {labels.dtype}. {CURE}")
    labels = labels.reshape(len(labels), -1)  # [N, T], with one class per sample [N, 1]
    mask = labels != IGNORED
    return Prediction(_blanked(form(logits), mask), torch.where(mask, labels, 0).long(), mask, form)


def has_one_logit(logits: Tensor, labels: Tensor) -> bool:
    """Whether a model says yes or no by one logit per sample: `[N]` or `[N, 1]`, with as many labels."""
    shapes = ((len(logits),), (len(logits), 1)) if logits.dim() else ()
    return tuple(logits.shape) in shapes and tuple(labels.shape) in shapes


def _find_form(logits: Tensor, labels: Tensor) -> Form | None:
    """What brings logits into the form `[N, T, V]`; None where labels do not fit to them."""
    if has_one_logit(logits, labels):
        return _as_two_classes
    if logits.dim() == 2 and labels.shape == logits.shape[:1]:
        return _as_one_place
    if logits.dim() == 3 and labels.shape == logits.shape[:2]:
        return _as_it_is
    if logits.dim() > 2 and labels.shape == (logits.shape[0], *logits.shape[2:]):
        return _as_places
    return None


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


def _as_one_place(logits: Tensor) -> Tensor:
    return logits.unsqueeze(1)  # [N, 1, C]


def _as_two_classes(logits: Tensor) -> Tensor:
    logits = logits.reshape(len(logits), -1)
    return torch.stack((torch.zeros_like(logits), logits), dim=-1)  # [N, 1, 2]


def _as_places(logits: Tensor) -> Tensor:
    return logits.flatten(2).transpose(1, 2)  # [N, C, ...] to [N, T, C]


def _blanked(logits: Tensor, mask: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.masked_fill(~mask.unsqueeze(-1), 0.0)


def _is_encoder_decoder(module: nn.Module) -> bool:
    configs = (getattr(part, "config", None) for part in module.modules())
    return any(getattr(config, "is_encoder_decoder", False) is True for config in configs)


def _select_inputs(module: nn.Module, batch: Mapping[str, Any], needs_labels: bool) -> dict[str, Any]:
    """The entries of the batch that `forward` is called with."""
    signature = inspect.signature(module.forward)
    demanded = signature.parameters.get("labels")
    needs_labels |= demanded is not None and demanded.default is inspect.Parameter.empty
    inputs = {name: value for name, value in batch.items() if needs_labels or name != "labels"}
    try:
        signature.bind(**inputs)
    except TypeError as error:
        raise HAMUValueError(
            f"Expected `forward` of {type(module).__name__} to take the batch's entries {sorted(inputs)} by name, but "
            f"it does not: {error}. {CURE}"
        ) from error
    return inputs


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    try:
        output = module(*args, **kwargs)
    except NotImplementedError as error:
        raise HAMUValueError(f"Expected {type(module).__name__} to have a `forward` that works. {CURE}") from error
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise HAMUValueError(
            f"Expected {type(module).__name__} to return logits, or something with `.logits`, but got "
            f"{type(output).__name__}. {CURE}"
        )
    return output
