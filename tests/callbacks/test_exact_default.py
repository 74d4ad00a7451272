"""With a target the rule's own step is applied, whatever the optimizer; else, and where asked, that of the base."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, Chance, HAMUCallback
from hamu_lightning.callbacks import PassOptions, StepOptions
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import FixedRadius
from tests.callbacks.modules import Base, build, fit, make_data, trained_on

pytestmark = pytest.mark.filterwarnings("ignore:The fit has ended before the target")


@cache
def parts() -> tuple[dict[str, Tensor], TensorDataset, TensorDataset]:
    """A trained state, the samples of two classes to keep, and those of one to forget."""
    data = make_data(300)
    x, y = data.tensors
    gone = y == 2
    return (
        trained_on(data, 100, lr=1e-2).state_dict(),
        TensorDataset(x[~gone], y[~gone]),
        TensorDataset(x[gone], y[gone]),
    )


class Adaptive(Base):
    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.3)


def run(kind: type[Base] = Base, optimizer: str = "sgd", *, max_steps: int = 13, **options: Any) -> tuple[Base, Any]:
    state, retain, forget = parts()
    module = build(kind, optimizer)
    module.load_state_dict(state)
    settings = {name: options.pop(name) for name in ("passes",) if name in options}
    given = {"target": Chance(), "verify": False, "guard": False, **options}
    hamu = HAMUCallback(DataLoader(forget, 32, shuffle=True), **settings, **given)
    trainer, _ = fit(module, hamu, loader=DataLoader(retain, 32, shuffle=True), max_epochs=-1, max_steps=max_steps)
    return module, trainer


def retain_loss(module: Base) -> float:
    x, y = parts()[1].tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(x), y))


@pytest.mark.filterwarnings("ignore:The base optimizer")
def test_a_class_request_with_adamw_does_not_ruin_the_rest() -> None:
    """In 13 steps of its own it does."""
    before = build(Base)
    before.load_state_dict(parts()[0])
    module, _ = run(Adaptive, steps=StepOptions(exact=False))
    assert retain_loss(module) > 2 * retain_loss(before)
    module, _ = run(Adaptive)
    assert retain_loss(module) < retain_loss(before)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "adamw, foreach", "adamw, fused"])
def test_the_steps_are_those_of_plain_sgd(optimizer: str) -> None:
    (module, _), (plain, _) = run(optimizer=optimizer), run()
    for weight, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)  # float32: the gradients are scaled by lr


class KeepsAverages(torch.optim.SGD):
    """As schedule-free optimizers do: the weights are not those that its steps go from."""

    def eval(self) -> None:
        """Put the averages in place."""


class Averaged(Base):
    @override
    def configure_optimizers(self) -> Any:
        return KeepsAverages(self.parameters(), lr=0.05, momentum=0.9)


CASES: dict[str, tuple[dict[str, Any], bool, str]] = {
    "adamw": ({"optimizer": "adamw"}, True, "each step is applied as the rule chose it, in the place of AdamW"),
    "plain SGD": ({}, False, ""),
    "switched off": ({"optimizer": "adamw", "steps": StepOptions(exact=False)}, False, ""),
    "steps between": (
        {"optimizer": "adamw", "passes": PassOptions(every_n_steps=2)},
        False,
        "AdamW makes the steps towards the target, since the steps between the combined ones are its own",
    ),
    "averages": ({"kind": Averaged}, False, "since it keeps an average of its own steps"),
    "no target": ({"optimizer": "adamw", "target": None, "rule": HAMUQ(1e-3, radius=FixedRadius(1e-3))}, False, ""),
}


@pytest.mark.filterwarnings("ignore:The base optimizer")
@pytest.mark.parametrize("name", CASES)
def test_when_it_is_so_and_what_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments, is_exact, words = CASES[name]
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run(**arguments, max_steps=2)
    said = [m for m in caplog.messages if "as the rule chose it" in m or "makes the steps towards" in m]
    assert [words in m for m in said] == [True] * bool(words)
    assert SEEN.pop() is is_exact


SEEN: list[bool] = []


@pytest.fixture(autouse=True)
def _see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Note how optimizers are wrapped."""
    made = HAMUOptimizer.__init__

    def note(self: Any, *args: Any, exact: bool = False, **options: Any) -> None:
        SEEN.append(exact)
        made(self, *args, exact=exact, **options)

    monkeypatch.setattr(HAMUOptimizer, "__init__", note)
