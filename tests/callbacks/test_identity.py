"""A second request on what the first one left: recognised by its data, served, and told on its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from hamu_lightning import HAMUQ, HAMUCallback, VerifySteps
from hamu_lightning.callbacks import StopReason
from hamu_lightning.callbacks._identity import identify, is_same_run
from hamu_lightning.objectives import NPO
from hamu_lightning.rules import FixedRadius, TargetQuota
from hamu_lightning.solvers import FeasibleDirection
from tests.callbacks.many import DATA, flat
from tests.callbacks.modules import Base, build, fit, make_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The fit has ended before the target"),
]
RULE = HAMUQ(0.02, radius=FixedRadius(0.05))
POOL = make_data(96, seed=9)


def request(*chosen: int, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(Subset(POOL, chosen), batch_size=batch_size, shuffle=True)


FIRST, SECOND = request(*range(16)), request(*range(16, 32))


class Noisy(Dataset[Any]):
    """Counts its readings, and draws from random numbers of all kinds."""

    def __init__(self, own: Any = None) -> None:
        self.reads, self.order, self.own = 0, [], own  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        self.order.append(index)
        noise = torch.rand(2) + np.random.rand()
        if self.own is not None:
            noise = noise + float(self.own.random())
        return {"x": noise, "y": index, "text": f"row {index}"}


class Fails(Noisy):
    def __getitem__(self, index: int) -> Any:
        raise ZeroDivisionError


class Streams(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(40))


def as_loader(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=8)


def sampled(*indices: int) -> DataLoader[Any]:
    return DataLoader(POOL, batch_size=8, sampler=SubsetRandomSampler(indices))


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "subsets that differ in the middle": (lambda: request(*range(16)), lambda: request(*range(7), 90, *range(8, 16))),
    "subset samplers": (lambda: sampled(*range(16)), lambda: sampled(*range(15), 40)),
    "sizes": (lambda: as_loader(Streams()), lambda: [("batch",)] * 3),
    "batches in a list": (lambda: [torch.ones(3), torch.zeros(3)] * 4, lambda: [torch.ones(3)] * 8),
    "texts": (lambda: as_loader([f"a{i}" for i in range(9)]), lambda: as_loader([f"b{i}" for i in range(9)])),
    "values alone": (lambda: as_loader(make_data(40, seed=1)), lambda: as_loader(make_data(40, seed=2))),
    "dtype alone": (
        lambda: as_loader(TensorDataset(torch.zeros(8, dtype=torch.int32))),
        lambda: as_loader(TensorDataset(torch.zeros(8, dtype=torch.float32))),
    ),
}


def compare(first: Any, second: Any, *protected: str) -> bool:
    saved = identify({"forget": first}, [])
    return is_same_run(saved, identify({"forget": second}, protected, saved["salt"]))


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_is_recognised(name: str) -> None:
    one, other = OTHERS[name]
    if name == "sizes":
        assert compare(one(), other())  # nothing is known of a stream: then nothing speaks against it
        one = lambda: [("batch",)] * 4  # noqa: E731
    assert compare(one(), one())
    assert not compare(one(), other())
    assert not compare(one(), one(), "forget")  # in another role


@pytest.mark.parametrize(
    "make",
    [
        lambda: as_loader(Noisy()),
        lambda: as_loader(Noisy(np.random.default_rng())),
        lambda: as_loader(Fails()),
        lambda: as_loader(Streams()),
        lambda: request(3),
        lambda: iter([torch.ones(2)]),
    ],
)
def test_the_same_data_is_recognised_without_a_trace(make: Any) -> None:
    source = make()
    data = getattr(source, "dataset", None)
    before = torch.get_rng_state(), np.random.get_state()[2], copy.deepcopy(getattr(data, "__dict__", None))
    assert compare(source, make())
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[2]
    if isinstance(data, Noisy):
        assert (data.reads, data.order) == (0, [])
        if data.own is not None:
            assert before[2] is not None
            assert data.own.bit_generator.state == before[2]["own"].bit_generator.state


def test_an_identity_tells_nothing_of_one_sample() -> None:
    """The digest is one of all samples together, salted, with a byte for each that was read."""
    first, again = (identify({"forget": FIRST}, []) for _ in range(2))
    assert first["groups"]["forget"]["digest"] != again["groups"]["forget"]["digest"]
    assert len(bytes.fromhex(identify({"forget": request(5)}, [])["groups"]["forget"]["digest"])) == 1


def forget_loss(module: nn.Module, loader: DataLoader[Any]) -> float:
    x, y = (torch.stack([sample[i] for sample in loader.dataset]) for i in (0, 1))
    with torch.no_grad():
        return float(cross_entropy(module(x), y))


TO_TARGET = HAMUQ(TargetQuota(2.0), radius=FixedRadius(0.2))


def unlearn(forget: Any, rule: Any = TO_TARGET, checkpoint: Path | None = None, **options: Any) -> Any:
    epochs = options.pop("epochs", 20)
    hamu, module = HAMUCallback(forget, rule, **options), build(Base)
    trainer, _ = fit(module, hamu, max_epochs=epochs, ckpt_path=checkpoint)
    return hamu, module, trainer


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a request whose target was reached."""
    path = tmp_path_factory.mktemp("first") / "first.ckpt"
    hamu, _, trainer = unlearn(FIRST)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    trainer.save_checkpoint(path)
    return path


def test_a_second_request_on_the_checkpoint_of_the_first(reached: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    done = torch.load(reached, weights_only=True)["callbacks"]["HAMUCallback"]["combined_steps"]
    hamu, module, _ = unlearn(SECOND, checkpoint=reached, epochs=40)
    assert forget_loss(module, SECOND) > 1.8
    assert "is about other data to forget" in caplog.text
    assert hamu.summary is not None
    assert "With the run" not in hamu.summary
    assert hamu.summary.startswith(f"HAMU: {hamu.combined_steps} combined steps")
    assert hamu.combined_steps < done + 100  # its own


def test_the_same_request_again_is_measured_again(reached: Path) -> None:
    """It has reached its target, so that no step is made; with another target it goes on."""
    hamu, _, trainer = unlearn(FIRST, checkpoint=reached, epochs=40)
    before = torch.load(reached, weights_only=True)
    assert hamu.combined_steps == before["callbacks"]["HAMUCallback"]["combined_steps"]
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert trainer.global_step == before["global_step"] + 1  # the step that was not applied
    assert hamu.summary is not None
    assert "HAMU: 0 combined steps" in hamu.summary
    assert f"With the run that this fit continues: {hamu.combined_steps} combined steps" in hamu.summary
    weaker = torch.load(reached, weights_only=True)
    weaker["state_dict"] = build(Base).state_dict()
    torch.save(weaker, reached.parent / "weaker.ckpt")
    hamu, module, _ = unlearn(FIRST, checkpoint=reached.parent / "weaker.ckpt", epochs=40)
    assert hamu.combined_steps > before["callbacks"]["HAMUCallback"]["combined_steps"]
    assert forget_loss(module, FIRST) > 1.8


def test_one_callback_for_several_models() -> None:
    """Each is unlearnt as by a callback of its own, reference model and all; steps are counted on."""
    own, starts = [], [3, 4]
    for seed in starts:
        hamu, module = (
            HAMUCallback(FIRST, RULE, objective=NPO(), verify=VerifySteps(ledger=False)),
            build(Base, "sgd", seed),
        )
        fit(module, hamu)
        own.append(flat(module))
    shared = HAMUCallback(FIRST, RULE, objective=NPO(), verify=VerifySteps(ledger=False))
    for number, seed in enumerate(starts):
        module = build(Base, "sgd", seed)
        shared._state = copy.deepcopy(shared._state)
        if number:  # the same random numbers as in a first fit
            shared._state["groups"]["forget"] = {"passes": 0}
        fit(module, shared)
        assert torch.equal(flat(module), own[number])
    assert shared.combined_steps == 24
    assert shared.summary is not None
    assert shared.summary.startswith("HAMU: 12 combined steps")


TWO = FeasibleDirection({"a": TargetQuota(2.5, steps=9), "b": TargetQuota(2.5, steps=9)}, radius=FixedRadius(0.3))


def groups(a: str, b: str) -> dict[str, Any]:
    return {"a": DataLoader(DATA[a], batch_size=20), "b": DataLoader(DATA[b], batch_size=20)}


def losses(module: nn.Module, name: str) -> Tensor:
    x, y = DATA[name].tensors
    return cross_entropy(module(x), y).detach()


def test_names_that_stand_for_other_data(tmp_path: Path) -> None:
    hamu, _, trainer = unlearn(groups("a", "b"), TWO)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.warns(UserWarning, match="there is nothing to forget"):  # of `a`, which is measured again
        again, module, _ = unlearn(groups("a", "c"), TWO, checkpoint=tmp_path / "first.ckpt", epochs=30)
    assert again.stop_reason is StopReason.TARGET_REACHED
    assert losses(module, "c") > 2.2


def test_protected_after_it_was_forgotten(tmp_path: Path) -> None:
    trainer = unlearn(groups("a", "b"), TWO)[2]
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    rule = FeasibleDirection({"c": 0.01}, {"a": 0.0}, radius=FixedRadius(0.1))
    loaders = {name: DataLoader(DATA[name], batch_size=20) for name in ("a", "c")}
    more = trainer.current_epoch + 2
    hamu, _, _ = unlearn({"c": loaders["c"]}, rule, tmp_path / "first.ckpt", protect={"a": loaders["a"]}, epochs=more)
    assert 0 < hamu.combined_steps == hamu.forget_passes / 2


def test_a_state_without_an_identity_goes_on(tmp_path: Path) -> None:
    """As versions before had it: the run continues, whatever else the state lacks; conclusions are measured again."""
    trainer = unlearn(FIRST, RULE, epochs=1)[2]
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    old = torch.load(tmp_path / "old.ckpt", weights_only=True)
    for name in ("identity", "stop"):
        del old["callbacks"]["HAMUCallback"][name]
    torch.save(old, tmp_path / "old.ckpt")
    hamu = unlearn(FIRST, RULE, tmp_path / "old.ckpt", epochs=2)[0]
    assert hamu.combined_steps == hamu.forget_passes == 12
