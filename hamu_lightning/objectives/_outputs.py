"""How a module is asked about a batch: logits and labels, aligned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hamu_lightning.checks import check_flag, check_optional, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives._packed import find_sequences

# What `torch.nn.functional.cross_entropy` leaves out by default, and what Hugging Face writes into labels.
IGNORED = -100
# The entry of a batch that says which tokens matter.
CORE = "core_tokens"
CURE = (
    "Pass `outputs=`, a function of the module and the batch that returns logits [N, C] with labels [N], or logits "
    "[N, T, V] with labels [N, T] in which labels[n, t] is what logits[n, t] should predict (-100: nothing)."
)


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
    - A mapping with `labels`: `module(**inputs)` with all entries but `labels` and `core_tokens` (which `CoreTokens`
      reads). The labels go in as well where `forward` demands them, or where the model is an encoder and decoder
      (`config.is_encoder_decoder`), which makes its decoder's inputs from them.

    Logits are what the module returns: a tensor, or `.logits` or `["logits"]` of it.

    Causal language models predict token t + 1 at position t, and Hugging Face hands them labels that are copies of the
    inputs. With logits `[N, T, V]` labels are therefore moved by one position if and only if they are such a copy: the
    model is no encoder and decoder, and `input_ids` (of a pair: `x`) is an integer tensor of the labels' shape that
    equals them wherever they are not -100. Labels moved beforehand, token classes and masked tokens differ from the
    inputs, and stay. This is decided batch by batch, on the device.

    Where several sequences are packed into one row each of them is a sample, and the last token of one does not predict
    the first of the next. They are known by `seq_idx`, `segment_ids`, `cu_seq_lens_q`, `cu_seqlens`, or `position_ids`
    that begin anew.

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
        return logits, self._align(logits, labels, inputs, batch)

    def _align(self, logits: Tensor, labels: Tensor, inputs: Any, batch: Any) -> Tensor:
        if logits.dim() != 3 or labels.dim() != 2 or self.shift is False:
            return labels
        moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        sequences = find_sequences(batch, labels.shape)
        if sequences is not None:  # the last token of one does not predict the first of the next
            moved[:, :-1].masked_fill_(sequences[:, 1:] != sequences[:, :-1], IGNORED)
        if self.shift:
            return moved
        if not isinstance(inputs, Tensor) or inputs.is_floating_point() or inputs.shape != labels.shape:
            return labels
        is_copy = ((labels == inputs) | (labels == IGNORED)).all()
        return torch.where(is_copy, moved, labels)


@dataclass(frozen=True)
class CoreTokens:
    """`Outputs` with labels on the tokens that matter alone: `NPO(outputs=CoreTokens())`, `WGA(outputs=CoreTokens())`.

    The batch is a mapping with `labels` and `core_tokens`, a mask of the same shape that belongs to the same tokens
    (moved or not, as the labels are): `QAData(mark_spans=True)` fills it. Labels outside become -100. A sample without
    any core token keeps all of its labels.

    Args:
        given: How the module is asked; default: `ModuleOutputs()`.

    Raises:
        HAMUValueError: If (at a batch) there are no core tokens of the labels' shape.

    Example:
        >>> batch = {"labels": torch.tensor([[2, 0]]), "core_tokens": torch.tensor([[1, 0]])}
        >>> batch["input"] = torch.ones(1, 2, 3)
        >>> CoreTokens()(nn.Identity(), batch)[1]
        tensor([[   2, -100]])
    """

    given: Outputs = field(default_factory=ModuleOutputs)

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits and labels."""
        given: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
        labels, core = given.get("labels", torch.empty(0)), given.get(CORE)
        if not isinstance(core, Tensor) or core.dim() < 2 or core.shape != labels.shape:
            found = list(core.shape) if isinstance(core, Tensor) else "none"
            raise HAMUValueError(
                f"Expected a batch with a mask {CORE!r} of the shape of its labels, but got {found}. "
                "QAData(mark_spans=True) makes it; so may a collator of your own."
            )
        core = core.bool() & (labels != IGNORED)
        kept = core | ~core.any(dim=-1, keepdim=True)
        return self.given(module, {**batch, "labels": labels.masked_fill(~kept, IGNORED)})


def as_outputs(outputs: Outputs | None) -> Outputs:
    """The outputs that an objective was given; those of the module itself by default.

    Raises:
        HAMUValueError: If they are no function.
    """
    if outputs is None:
        return ModuleOutputs()
    found: Outputs = check_type("outputs", outputs, Callable, "a function of the module and the batch", CURE)
    return found


def _is_encoder_decoder(module: nn.Module) -> bool:
    configs = (getattr(part, "config", None) for part in module.modules())
    return any(getattr(config, "is_encoder_decoder", False) is True for config in configs)


def _select_inputs(module: nn.Module, batch: Mapping[str, Any], needs_labels: bool) -> dict[str, Any]:
    """The entries of the batch that `forward` is called with."""
    signature = inspect.signature(module.forward)
    demanded = signature.parameters.get("labels")
    needs_labels |= demanded is not None and demanded.default is inspect.Parameter.empty
    left_out = {CORE} if needs_labels else {CORE, "labels"}
    inputs = {name: value for name, value in batch.items() if name not in left_out}
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
