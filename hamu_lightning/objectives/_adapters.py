"""References that share the weights of the trained module: its adapters off, or another one on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from typing_extensions import override

from hamu_lightning.checks import check_flag, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives._reference import Reference, evaluating


class AdaptersDisabled(Reference):
    """The trained module itself with its adapters switched off (LoRA): no memory at all.

    Right where only adapters are trained, and all of them were new when unlearning began. Where they hold what is to be
    forgotten the model without them is another one: at the first batch of a fit its log-likelihoods of the labels are
    compared with the module's own, and more than 0.25 nats in the mean are an error. The first submodule with a method
    `disable_adapter` (PEFT's models) is asked.

    Args:
        is_start: Whether this should be the module before unlearning; False for a reference that is meant to be
            another model. A teacher is not compared.

    Raises:
        HAMUStateError: At the first batch of a fit, if it is not the model that the fit begins with.
    """

    _cure = (
        "Adapters that hold knowledge are part of that model: merge them first, use FrozenCopy(), or a copy of the "
        "adapter, SecondAdapter(name). If another model is meant, say is_start=False."
    )

    def __init__(self, *, is_start: bool = True) -> None:
        self.is_start = check_flag("is_start", is_start)

    @override
    @contextmanager
    def using(self, module: nn.Module) -> Iterator[nn.Module]:
        adapted = _find(module, "disable_adapter")
        with evaluating(module), adapted.disable_adapter():
            yield module


class SecondAdapter(Reference):
    """The trained module with another of its adapters switched on in the place of the trained one: little memory.

    For adapters that hold what is to be forgotten. With PEFT:

        model.load_adapter(folder, adapter_name="original")    # a second time what is trained
        HAMUCallback(objective=NPO(reference=SecondAdapter("original")), ...)

    The first submodule with `set_adapter` and `active_adapter` (PEFT's models) is asked; which weights are trained
    stays as it is. Compared once with the module, as `AdaptersDisabled`.

    Args:
        name: The name of the other adapter.
        is_start: As for `AdaptersDisabled`.

    Raises:
        HAMUValueError: If there is no such adapter, or it is the one that is trained.
        HAMUStateError: At the first batch of a fit, if it is not the model that the fit begins with.
    """

    _cure = (
        "Give it the weights that the trained adapter begins with: model.load_adapter(folder, adapter_name=...). If "
        "another model is meant, say is_start=False."
    )

    def __init__(self, name: str, *, is_start: bool = True) -> None:
        self.name: str = check_type("name", name, str, "the name of an adapter")
        self.is_start = check_flag("is_start", is_start)

    @override
    @contextmanager
    def using(self, module: nn.Module) -> Iterator[nn.Module]:
        adapted = _find(module, "set_adapter", "active_adapter")
        active, known = adapted.active_adapter, getattr(adapted, "peft_config", (self.name,))
        if self.name not in known or self.name == active:
            raise HAMUValueError(
                f"Expected another adapter than the active {active!r}, one of {sorted(known)}, but got {self.name!r}. "
                "model.load_adapter(folder, adapter_name=...) adds one."
            )
        trained = [(p, p.requires_grad) for p in module.parameters()]
        with evaluating(module):
            try:
                adapted.set_adapter(self.name)
                yield module
            finally:
                adapted.set_adapter(active)
                for parameter, requires_grad in trained:  # `set_adapter` decides about that as well
                    parameter.requires_grad_(requires_grad)


def _find(module: nn.Module, *names: str) -> Any:
    found = next((m for m in module.modules() if all(hasattr(m, name) for name in names)), None)
    if found is None:
        raise HAMUValueError(
            f"Expected a module with `{names[0]}`, as PEFT's models have it, but {type(module).__name__} has "
            "none. FrozenCopy() works with every module."
        )
    return found
