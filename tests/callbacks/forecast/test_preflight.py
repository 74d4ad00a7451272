"""The preflight as a function: no trace, learning rates, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, preflight
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.rules import FineTune
from tests.callbacks.forecast.setups import RULE, TARGET, AsksForTrainer, ConfiguresWithTrainer, retain_loader, states
from tests.callbacks.modules import MODULES, Base, build, make_data
from tests.callbacks.passes.test_invariants import attributes, forget_loader

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.mark.parametrize("batchnorm", ["freeze", "retain"])
@pytest.mark.parametrize("kind", MODULES)
def test_the_function_leaves_no_trace(kind: type[Base], batchnorm: Any) -> None:
    """BatchNorm buffers are in the state; the loaders have generators of their own."""
    module = build(kind)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    loaders = [retain_loader(generator=generators[0]), DataLoader(make_data(40, 9), 8, True, generator=generators[1])]

    def everything() -> dict[str, Any]:
        tensors = {f"grad {name}": p.grad for name, p in module.named_parameters()} | module.state_dict()
        found: dict[str, Any] = {name: None if t is None else t.tolist() for name, t in tensors.items()}
        modes = [m.training for m in module.modules()]
        return (
            found
            | attributes(module)
            | {"random": states(), "modes": modes, "own": [*map(repr, vars(module))]}
            | {f"generator {n}": g.get_state().tolist() for n, g in enumerate(generators)}
        )

    before = everything()
    report = preflight(module, *loaders, RULE, batchnorm=batchnorm)
    assert everything() == before
    assert report.pairs == 6


@pytest.mark.parametrize(
    ("optimizer", "lr", "expected"), [("sgd", None, 0.05), ("adamw", None, 0.01), ("sgd", 0.3, 0.3)]
)
def test_learning_rates_come_from_the_module_or_the_argument(optimizer: str, lr: Any, expected: float) -> None:
    report = preflight(build(Base, optimizer), retain_loader(), forget_loader(), FineTune(), lr=lr).estimates
    squares = [norm**2 for norm in report["retain_norm"].values]
    assert report["retain_cost"].values == pytest.approx([-expected * square for square in squares], rel=1e-5)


class WarmsUp(Base):
    """The first learning rate is 0; a list of optimizers and a list of schedulers."""

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5, 1.0))]


def test_a_warm_up_from_0_counts_with_its_full_rate() -> None:
    found = [preflight(build(kind), retain_loader(), forget_loader(), HAMUQ(1e-3)) for kind in (Base, WarmsUp)]
    assert found[0].as_dict() == found[1].as_dict()


class Manual(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Base):
    @override
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


class GivesNone(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def one_shot() -> Iterator[Any]:
    yield from retain_loader()


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (Manual, {}, HAMUValueError, "Expected automatic optimization"),
        (AsksForTrainer, {}, HAMUStateError, "it asks for one. Use HAMUCallback\\(preflight=True\\)"),
        (ConfiguresWithTrainer, {}, HAMUStateError, "pass `lr`"),
        (TwoOptimizers, {}, HAMUValueError, "to return one optimizer, but got 2"),
        (GivesNone, {}, HAMUStateError, "returned None for all forget data"),
        (Base, {"rule": 0.1}, HAMUValueError, "Expected `rule` to be a rule"),
        (Base, {"rule": TARGET}, HAMUValueError, "Expected a number as target and a number of steps"),
        (Base, {"batches": 0}, HAMUValueError, "Expected `batches` to be at least 1"),
        (Base, {"lr": 0.0}, HAMUValueError, "Expected a learning rate above 0"),
        (Base, {"batchnorm": "eval"}, HAMUValueError, "Expected `batchnorm` to be one of 'freeze', 'retain'"),
        (Base, {"retain_loader": make_data()}, HAMUValueError, "A Dataset becomes one by DataLoader"),
        (Base, {"forget_loader": []}, HAMUValueError, "`forget_loader` to hold at least one batch, but it is empty"),
        (Base, {"forget_loader": one_shot()}, HAMUValueError, "got a generator, which can be iterated only once"),
        (lambda: nn.Linear(1, 1), {}, HAMUValueError, "but Linear has none. Give the LightningModule"),
    ],
)
def test_what_cannot_work_is_said(kind: Any, arguments: dict[str, Any], error: Any, message: str) -> None:
    module = build(kind) if isinstance(kind, type) else kind()
    options = {"retain_loader": retain_loader(), "forget_loader": forget_loader(), "rule": RULE, **arguments}
    with pytest.raises(error, match=message):
        preflight(module, **options)


def test_a_module_without_lightning() -> None:
    class Plain(nn.Linear):
        def training_step(self, batch: Any) -> Any:
            return cross_entropy(self(batch[0]), batch[1])

    report = preflight(Plain(10, 3), retain_loader(), forget_loader(), RULE, lr=0.1)
    assert (report.pairs, report.blocks) == (6, 2)
    with pytest.raises(HAMUValueError, match="Expected `lr`, since the module has no"):
        preflight(Plain(10, 3), retain_loader(), forget_loader(), RULE)
