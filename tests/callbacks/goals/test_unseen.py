"""The targets that bring what is raised: calibrated without a trace, each at its own end, resumed and on processes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, SecondChoice, Unseen, split_forget
from hamu_lightning.callbacks import PassOptions, StopReason
from hamu_lightning.callbacks.passes._classes import read_labels
from hamu_lightning.errors import HAMUError
from hamu_lightning.objectives import BatchPass, CachedLogits, Calibration, FrozenCopy, UnseenAnswer
from hamu_lightning.rules import FineTune, FixedRadius, RelativeRadius, TargetQuota
from tests.callbacks.modules import Base, WithBatchNorm, WithDropout, build, fit, trained_on
from tests.callbacks.passes.test_invariants import GradientsAreEqual, SameRandomState
from tests.callbacks.test_distributed import to_tensor
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:The fit has ended before the target",
    "ignore:The target should be reached in 8 combined steps",
    "ignore:Be aware that when using `ckpt_path`",
)


def draw(n: int, seed: int) -> TensorDataset:
    """Three classes that cannot be told apart without error, so that a model remembers what it was trained on."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 10, generator=generator)
    return TensorDataset(x, (x[:, :3] + torch.randn(n, 3, generator=generator)).argmax(1))


TRAIN, HELD_OUT = draw(120, 1), draw(90, 2)
RETAIN, SAMPLES = split_forget(TRAIN, range(24))
CLASS = 1
OTHERS, WHOLE = split_forget(TRAIN, TRAIN.tensors[1] == CLASS)


def trained(kind: type[Base] = Base) -> Base:
    return trained_on(TRAIN, 200, kind)


def unlearn(
    module: Base, forget: Any, target: Any, retain: Any = None, *, radius: float = 0.005, **options: Any
) -> HAMUCallback:
    arguments = options.pop("arguments", {})
    rule = HAMUQ(TargetQuota(target), radius=RelativeRadius(radius))
    hamu = HAMUCallback(forget, rule, verify=True, **arguments)
    retain = RETAIN if retain is None else retain
    loader = retain if isinstance(retain, DataLoader) else DataLoader(retain, batch_size=32)
    fit(module, hamu, **{"loader": loader, "max_epochs": 30, **options})
    return hamu


def likelihood(module: Base, data: Dataset[Any]) -> float:
    """The mean probability of the labels."""
    x, y = next(iter(DataLoader(data, batch_size=1000)))
    with torch.no_grad():
        return float(module.eval()(x).softmax(1)[torch.arange(len(y)), y].mean())


def end_of(module: Base, original: Base, target: Any, data: Dataset[Any]) -> tuple[float, float]:
    """What has come true, and the end, of the objective with the state that the fit began with."""
    objective = target.objective
    objective.reference = FrozenCopy(original)
    batch = next(iter(DataLoader(data, batch_size=1000)))
    one = BatchPass(module.eval(), batch)
    with torch.no_grad():
        return float(objective(one)), float(objective.end(one))


@pytest.mark.parametrize("kind", [Base, WithBatchNorm])
def test_samples_look_unseen(kind: type[Base]) -> None:
    module, original, target = trained(kind), trained(kind), Unseen(HELD_OUT)
    unlearn(module, SAMPLES, target)
    came, end = end_of(module, original, target, SAMPLES)
    assert came >= 0.9 * end > 0
    pairs = (original, SAMPLES), (module, SAMPLES), (original, HELD_OUT)
    before, after, unseen = (likelihood(*pair) for pair in pairs)
    assert before > unseen + 0.2
    assert after == pytest.approx(unseen, abs=0.1)


def test_a_class_goes_as_a_whole_without_held_out_data() -> None:
    module, target = trained(), Unseen()
    hamu = unlearn(module, WHOLE, target, OTHERS)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert target.objective.calibration.goes(torch.device("cpu")).tolist() == [False, True, False]
    x, _ = TRAIN[range(len(TRAIN))]
    assert float((module.eval()(x).argmax(1) == CLASS).float().mean()) < 0.02


def test_a_second_choice_in_the_place_of_a_wrong_label() -> None:
    module, original, target = trained(), trained(), SecondChoice()
    wrong = TensorDataset(SAMPLES[:][0], (SAMPLES[:][1] + 1) % 3)
    for _ in range(150):  # so that it has learnt the wrong labels
        loss = nn.functional.cross_entropy(original(wrong.tensors[0]), wrong.tensors[1])
        for weight, grad in zip(
            original.parameters(), torch.autograd.grad(loss, list(original.parameters())), strict=True
        ):
            weight.data -= 0.3 * grad
    module = copy.deepcopy(original)
    hamu = unlearn(module, wrong, target)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    before, after = (
        (one.eval()(wrong.tensors[0]).argmax(1) == SAMPLES[:][1]).float().mean() for one in (original, module)
    )
    assert float(after) > float(before) + 0.4
    assert likelihood(module, wrong) < 0.2 < likelihood(original, wrong)


@pytest.mark.parametrize("forget", [SAMPLES, DataLoader(SAMPLES, batch_size=7, shuffle=True)])
def test_classes_are_counted_from_datasets_or_in_a_pass(forget: Any) -> None:
    """Lists of batches say nothing of their labels: they are read."""
    listed = DataLoader([(x, y) for x, y in RETAIN], batch_size=32)
    read: list[dict[str, Any]] = []
    for retain in (RETAIN, listed, ConcatDataset([Subset(RETAIN, range(50)), Subset(RETAIN, range(50, 96))])):
        target = Unseen(HELD_OUT)
        unlearn(trained(), forget, target, retain, max_steps=1)
        read.append(target.objective.calibration.state_dict())
    kept, gone = (torch.bincount(data[:][1], minlength=3).double() for data in (RETAIN, SAMPLES))
    for state in read:
        assert torch.equal(state["share"], kept / (kept + gone))
        assert all(torch.equal(state[n], read[0][n]) for n in ("aims", "log_odds", "keys"))
    said = Unseen(HELD_OUT, counts={c: int(n) for c, n in enumerate(kept)})
    unlearn(trained(), forget, said, listed, max_steps=1)
    assert torch.equal(said.objective.calibration.state_dict()["share"], kept / (kept + gone))


def test_labels_of_loaders() -> None:
    data = TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 1, 2]))
    assert read_labels(DataLoader(data, sampler=torch.utils.data.SubsetRandomSampler([3, 1]))).tolist() == [2, 1]  # type: ignore[union-attr]
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 4, 4)
    for unknown in ([(1, 2)], DataLoader(data, sampler=weighted), DataLoader([(1, 2)] * 3)):
        assert read_labels(unknown) is None


def test_held_out_data_are_those_of_validation_by_default() -> None:
    given, found = Unseen(HELD_OUT), Unseen()
    unlearn(trained(), SAMPLES, given, max_steps=1)
    hamu = HAMUCallback(SAMPLES, target=found)
    module = trained()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign, assignment]
    from lightning.pytorch import Trainer

    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, callbacks=[hamu], enable_model_summary=False, accelerator="cpu", **options)
    trainer.fit(module, DataLoader(RETAIN, batch_size=32), DataLoader(HELD_OUT, batch_size=40))
    states = [target.objective.calibration.state_dict() for target in (given, found)]
    assert torch.equal(states[0]["aims"], states[1]["aims"])
    with pytest.raises(HAMUError, match="Expected one validation loader for Unseen\\(\\) without data"):
        unlearn(trained(), SAMPLES, Unseen())


class Steps(FineTune):
    """Plain steps on the retain data, with a target that is followed beside them."""

    target: Any = None

    @property
    @override
    def target_quotas(self) -> Any:
        return {"forget": TargetQuota(self.target)}


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, WithDropout])
def test_calibration_and_passes_leave_no_trace(kind: type[Base]) -> None:
    """I1."""
    plain, paired = trained(kind), trained(kind)
    _, expected = fit(plain)
    rule = Steps()
    object.__setattr__(rule, "target", Unseen(HELD_OUT))
    hamu = HAMUCallback(DataLoader(SAMPLES, batch_size=8, shuffle=True), rule, passes=PassOptions(batchnorm="retain"))
    _, found = fit(paired, hamu)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, paired.state_dict()[name]), name
    assert found.values == expected.values
    assert hamu.combined_steps == len(expected.values)
    assert paired.__dict__.keys() == plain.__dict__.keys()


class OnRetain(UnseenAnswer):
    is_forget_only = False
    evaluates = False  # under the same dropout as on the retain stream


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, WithDropout])
def test_gradients_cancel_on_the_same_batch(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    """I2, with the same objective on both streams, off its start, where there is a gradient."""
    monkeypatch.setattr("hamu_lightning.callbacks._group.RandomStream", SameRandomState)
    calibration = Calibration()
    x, y = torch.linspace(-2, 2, 90).double(), torch.arange(90) % 3
    calibration.fit((x + 1, y), (x, y), torch.tensor([0.5, 0.9, 0.0]))
    answers = [OnRetain(copy.deepcopy(calibration), reference=FrozenCopy(build(kind, seed=6))) for _ in range(2)]
    check, same = GradientsAreEqual(), list(DataLoader(RETAIN, batch_size=16))
    hamu = HAMUCallback(same, FineTune(), objective=answers[0], retain_objective=answers[1])
    for part in answers:  # a fit begins with an empty state
        monkeypatch.setattr(part.calibration, "load_state_dict", lambda state: None)
    fit(build(kind), hamu, check, loader=DataLoader(RETAIN, batch_size=16))
    assert check.steps == hamu.combined_steps > 0


TARGETS: dict[str, Any] = {
    "samples": lambda: (SAMPLES, RETAIN, Unseen(HELD_OUT)),
    "class": lambda: (WHOLE, OTHERS, Unseen()),
    "second choice": lambda: (SAMPLES, RETAIN, SecondChoice()),
    "teacher": lambda: (SAMPLES, RETAIN, Unseen(HELD_OUT, teacher=build(Base, seed=7))),
}


def run_some(name: str, steps: int, ckpt: Any = None, **options: Any) -> tuple[Base, HAMUCallback, Any]:
    forget, retain, target = TARGETS[name]()
    module = trained()
    hamu = HAMUCallback(forget, HAMUQ(TargetQuota(target, steps=8), radius=FixedRadius(0.05)))
    loader = DataLoader(retain, batch_size=len(retain))  # one batch: epochs are steps
    trainer, _ = fit(module, hamu, loader=loader, max_epochs=steps, ckpt_path=ckpt, **options)
    return module, hamu, trainer


@pytest.mark.parametrize("name", TARGETS)
def test_a_resumed_run_ends_where_the_whole_one_ends(name: str, tmp_path: Path) -> None:
    whole, expected, _ = run_some(name, 6)
    from lightning.pytorch.callbacks import ModelCheckpoint

    forget, retain, target = TARGETS[name]()
    module, saving = trained(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    hamu = HAMUCallback(forget, HAMUQ(TargetQuota(target, steps=8), radius=FixedRadius(0.05)))
    fit(
        module, hamu, saving, loader=DataLoader(retain, batch_size=len(retain)), max_epochs=6, enable_checkpointing=True
    )
    resumed, found, _ = run_some(name, 6, tmp_path / "epoch=2.ckpt")
    assert found.combined_steps == expected.combined_steps == 6
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [h.state_dict() for h in (expected, found)]
    assert states[0]["optimizer"]["aims"]["forget"]["target"] == states[1]["optimizer"]["aims"]["forget"]["target"]


def run_on_ranks(rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {name: run_joint(name, 2) for name in TARGETS}


def run_joint(name: str, processes: int) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    forget, retain, target = TARGETS[name]()
    if isinstance(target, Unseen) and target.teacher is not None:
        target.teacher.double()
    options: dict[str, Any] = {}
    if processes > 1:
        options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": processes}
    forget = Subset(forget.dataset, list(forget.indices)[:24])
    kept = Subset(retain.dataset, list(retain.indices)[:72])
    hamu = HAMUCallback(forget, HAMUQ(TargetQuota(target, steps=8), radius=FixedRadius(0.05)))
    sampler = torch.utils.data.DistributedSampler(kept, shuffle=False) if processes > 1 else None
    loader = DataLoader(kept, batch_size=72 // processes, sampler=sampler)
    module = trained()
    fit(module, hamu, loader=loader, max_epochs=6, precision="64-true", **options)
    state = hamu.state_dict()["optimizer"]["aims"]["forget"]
    return [p.detach().tolist() for p in module.parameters()], float(state["target"]), hamu.combined_steps


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
def test_two_processes_are_one() -> None:
    first, second = run_ranks(run_on_ranks, 2, timeout=300)
    for name in TARGETS:
        weights, target, steps = run_joint(name, 1)
        assert first[name] == second[name]
        assert first[name][2] == steps == 6
        # Losses are measured in float32, whatever the weights are in.
        assert first[name][1] == pytest.approx(target, rel=1e-6)
        torch.testing.assert_close(to_tensor(first[name][0]), to_tensor(weights), rtol=0, atol=1e-6)


def test_stored_logits_are_a_reference_too(tmp_path: Path) -> None:
    copied, stored = trained(), trained()
    unlearn(copied, SAMPLES, Unseen(HELD_OUT), max_steps=4)
    cache = CachedLogits(tmp_path)
    for data in (SAMPLES, HELD_OUT):
        cache.fill(trained(), DataLoader(data, batch_size=32))
    unlearn(stored, SAMPLES, Unseen(HELD_OUT, reference=cache), max_steps=4)
    for a, b in zip(copied.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # other batches round otherwise
