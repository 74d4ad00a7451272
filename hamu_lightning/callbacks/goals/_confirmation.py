"""A check of the user's own before a target counts as reached, and what is asked of the fit while it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from hamu_lightning.callbacks.goals._movement import is_same, look_at
from hamu_lightning.checks import describe
from hamu_lightning.errors import HAMUStateError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.callbacks.passes import ForgetPass

Confirm: TypeAlias = Callable[[nn.Module], "str | None"]
"""Says in words what still speaks against a target that is reached, of a module in evaluation mode; else nothing."""

# Asked again after so many combined steps; each time the mean is then led so much further, to so many times the target.
_ASK_EVERY = 10
_FURTHER, _FURTHEST = 1.15, 2.0


class Confirmation:
    """Asks whether a target that mean and ranks have reached is one, and leads the mean further while it is not.

    What still comes out is forgotten where the loss rises on: so each time that the check fails, the level that the
    steps aim at becomes 1.15 times what it was, twice the target at most. The target itself stays what it is: as soon
    as the check passes there, it counts as reached.

    Args:
        trainer: The trainer.
        forget_pass: What runs the module without a trace.
        confirm: The check; None: there is none.
        state: What `state_dict` returned in the run that this one continues.

    Attributes:
        objection: What spoke against it when the check was asked last, in words; empty where nothing did.
        further: How many times the target the steps aim at.
    """

    def __init__(
        self, trainer: Trainer, forget_pass: ForgetPass, confirm: Confirm | None, state: Mapping[str, Any]
    ) -> None:
        self._trainer, self._forget_pass, self._confirm = trainer, forget_pass, confirm
        self.further: float = state.get("further", 1.0)
        self.objection: str = state.get("objection", "")
        self._asked_at: int = state.get("asked_at", -1)

    def passes(self, taken: int, batch: Any) -> bool:
        """Whether nothing speaks against the target after so many steps; asks where it was not asked lately."""
        if self._confirm is None:
            return True
        if self.waits(taken):
            return False
        self.ask(taken, batch)
        if self.objection:
            self.further = min(_FURTHER * self.further, _FURTHEST)
        return not self.objection

    def ask(self, taken: int, batch: Any) -> None:
        """Ask at the present weights; all processes get the same answer.

        Raises:
            HAMUStateError: If the check has moved weights, or says something else than words.
        """
        if self._confirm is None:
            return
        confirm, module = self._confirm, self._trainer.lightning_module

        def ask() -> str:
            with torch.no_grad(), self._trainer.precision_plugin.forward_context():
                return _as_words(confirm(module))

        self._asked_at, before = taken, [look_at(p) for p in module.parameters()]
        self.objection = self._trainer.strategy.broadcast(self._forget_pass.measuring(ask, batch))
        if not all(is_same(was, look_at(p)) for was, p in zip(before, module.parameters(), strict=True)):
            raise HAMUStateError(
                "Expected `confirm` to leave the weights as they are, but it has moved some. Let it work on a copy: "
                "copy.deepcopy(module)."
            )

    def is_due(self, taken: int) -> bool:
        """Whether to ask again a check that has failed."""
        return bool(self.objection) and self._asked_at >= 0 and not self.waits(taken)

    def waits(self, taken: int) -> bool:
        """Whether it has failed, and is not asked again yet."""
        return bool(self.objection) and self._asked_at >= 0 and 0 <= taken - self._asked_at < _ASK_EVERY

    @property
    def is_there(self) -> bool:
        """Whether there is a check."""
        return self._confirm is not None

    def forget(self) -> None:
        """The weights have gone back: ask again where the target is reached again."""
        self._asked_at = -1

    def describe(self, sentence: str = "{}") -> str:
        """What spoke against the target, and what was done, in words and a sentence; empty where nothing did."""
        if not self.objection:
            return ""
        further = f"; the mean was led to {self.further:.3g} times its target" if self.further > 1 else ""
        return sentence.format(f"{self.objection}{further}")

    def state_dict(self) -> dict[str, Any]:
        """Return what was asked last; nothing without a check."""
        if self._confirm is None:
            return {}
        return {"further": self.further, "objection": self.objection, "asked_at": self._asked_at}


def _as_words(found: object) -> str:
    """What a check returned.

    Raises:
        HAMUStateError: If it is neither words nor None: a False that means "not gone" must not pass.
    """
    if found is not None and not isinstance(found, str):
        raise HAMUStateError(
            "Expected `confirm` to return in words what speaks against the target, or None, but got "
            f"{describe(found)}. Return '' where nothing does."
        )
    return (found or "").strip()
