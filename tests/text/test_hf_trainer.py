"""Unlearning in the Trainer of transformers, and with Accelerate, against plain loops."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hamu_lightning import HAMUQ, HAMUOptimizer
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import NPO, BatchPass
from hamu_lightning.rules import FineTune, FixedRadius, TargetQuota
from hamu_lightning.text import HAMUTrainerMixin, PadCollator, QAData
from tests.text.world import make_model

RULE = HAMUQ(quota=1e-2, radius=FixedRadius(0.05))


class Unlearner(HAMUTrainerMixin, Trainer):
    pass


def make_args(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    sizes = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    return TrainingArguments(output_dir=str(folder), **{**quiet, **sizes, "optim": "sgd", **options})


def make_trainer(kind: type, model: nn.Module, data: QAData, folder: Path, options: Any = None, **ours: Any) -> Trainer:
    args = make_args(folder, **(options or {}))
    collate = PadCollator(data.forget.encoder.pad_id)
    return kind(model, args, train_dataset=data.retain, data_collator=collate, **ours)


def weights_of(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return make_model(len(tokenizer))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_a_plain_rule_leaves_the_run_as_it_was(model: Any, data: QAData, tmp_path: Path, options: Any) -> None:
    twin = copy.deepcopy(model)
    make_trainer(Trainer, twin, data, tmp_path, options).train()
    make_trainer(Unlearner, model, data, tmp_path, options, forget_dataset=data.forget, rule=FineTune()).train()
    assert torch.equal(weights_of(model), weights_of(twin))


class Recorded(Unlearner):
    """Keeps the batches of both streams."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.batches: dict[bool, list[Any]] = {True: [], False: []}
        super().__init__(*args, **options)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        self.batches[self._is_forgetting].append({name: x.clone() for name, x in inputs.items()})
        return super().compute_loss(model, inputs, *args, **options)


def accumulate(module: nn.Module, batches: list[Any], objective: Any) -> list[Any]:
    """The clipped gradient of the mean over all tokens of some batches, or of the mean of an objective."""
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    module.zero_grad()
    for batch, count in zip(batches, counts, strict=True):
        if objective is None:
            (module(**batch).loss * count / sum(counts)).backward()
        else:
            (objective(BatchPass(module, batch)) / len(batches)).backward()
    nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    return [weight.grad for weight in module.parameters()]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("make_objective", [lambda: None, lambda: NPO(0.1)], ids=["own loss", "NPO"])
def test_steps_are_those_of_a_loop(
    model: Any, data: QAData, tmp_path: Path, accumulated: int, make_objective: Any
) -> None:
    for part in model.modules():  # two streams draw different numbers
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    twin, objective = copy.deepcopy(model), make_objective()
    options = {"gradient_accumulation_steps": accumulated, "max_grad_norm": 0.5}
    ours = {"forget_dataset": data.forget, "rule": RULE, "objective": make_objective()}
    trainer: Any = make_trainer(Recorded, model, data, tmp_path, options, **ours)
    trainer.train()
    optimizer = HAMUOptimizer(torch.optim.SGD(twin.parameters(), lr=1e-2), RULE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=3)
    for step in range(3):
        window = slice(step * accumulated, (step + 1) * accumulated)
        forget = accumulate(twin, trainer.batches[True][window], objective)
        retain = accumulate(twin, trainer.batches[False][window], None)
        optimizer.zero_grad()
        for where, gradients in ((optimizer.forget(), forget), (optimizer.retain(), retain)):
            with where:
                for weight, gradient in zip(twin.parameters(), gradients, strict=True):
                    weight.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    # float32: the Trainer sums losses and divides in another order.
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-5, atol=1e-6)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3
    assert all({"forget_loss", "hamu/kappa", "hamu/cosine", "hamu/forget_improvement"} <= set(log) for log in logs)


@pytest.mark.parametrize("none", [0.0, -1.0])
def test_no_clipping(model: Any, data: QAData, tmp_path: Path, none: float) -> None:
    """0 and below mean none to the Trainer: clipped to -1 the forget gradient would point the other way."""
    twin = copy.deepcopy(model)
    for module, most in ((model, none), (twin, 1e6)):
        options = {"max_grad_norm": most, "max_steps": 1}
        make_trainer(Unlearner, module, data, tmp_path, options, forget_dataset=data.forget, rule=RULE).train()
    assert torch.equal(weights_of(model), weights_of(twin))


def test_it_trains_again(model: Any, data: QAData, tmp_path: Path) -> None:
    trainer: Any = make_trainer(Unlearner, model, data, tmp_path, forget_dataset=data.forget, rule=RULE)
    trainer.train()
    first = trainer.hamu
    trainer.train()
    assert trainer.hamu is first and first.steps == 6


@pytest.mark.parametrize("is_named", [True, False])
def test_a_resumed_run_goes_on(model: Any, data: QAData, tmp_path: Path, is_named: bool) -> None:
    """With a shuffled second pass over the forget data, and the reference of before the first step."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    ours = {"forget_dataset": data.forget, "rule": RULE, "forget_batch_size": len(data.forget)}
    runs = []
    for start in (copy.deepcopy(model), None):
        again: Any = copy.deepcopy(model) if start is None else start
        trainer: Any = make_trainer(Unlearner, again, data, tmp_path, options, objective=NPO(0.1), **ours)
        checkpoint = str(tmp_path / "checkpoint-3") if is_named else True
        if start is None and not is_named:
            shutil.rmtree(tmp_path / "checkpoint-4", ignore_errors=True)
        trainer.train(resume_from_checkpoint=checkpoint if start is None else None)
        runs.append((weights_of(again), trainer.hamu.steps, trainer.hamu.applied_steps.item()))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:] == (4, 4)


def test_a_checkpoint_without_our_state_is_told(model: Any, data: QAData, tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(Trainer, copy.deepcopy(model), data, tmp_path, {**options, "max_steps": 1}).train()
    trainer = make_trainer(Unlearner, model, data, tmp_path, options, forget_dataset=data.forget, rule=RULE)
    with pytest.warns(UserWarning, match=r"has no hamu_state.pt: the forget data, .* begin anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_it_forgets(model: Any, data: QAData, tmp_path: Path) -> None:
    make_trainer(Trainer, model, data, tmp_path, {"max_steps": 20, "learning_rate": 0.1}).train()
    ours = {"forget_dataset": data.forget, "rule": HAMUQ(0.05, radius=FixedRadius(0.05))}
    trainer = make_trainer(Unlearner, model, data, tmp_path, {"max_steps": 20}, **ours)
    trainer.train()
    losses = [log["forget_loss"] for log in trainer.state.log_history if "forget_loss" in log]
    assert losses[-1] > losses[0] + 0.3


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({"rule": HAMUQ(TargetQuota(1.0, steps=3))}, "with a quota for each step"),
        ({"rule": "HAMUQ"}, "a rule such as"),
        ({"forget_dataset": []}, "a Dataset with samples"),
        ({"objective": "NPO"}, "one of hamu_lightning.objectives"),
    ],
)
def test_wrong_arguments_are_told(model: Any, data: QAData, tmp_path: Path, ours: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        make_trainer(Unlearner, model, data, tmp_path, **{"forget_dataset": data.forget, "rule": RULE, **ours})


@pytest.mark.parametrize("accumulated", [1, 2])
def test_accelerate_takes_what_was_wrapped_before(model: Any, data: QAData, accumulated: int) -> None:
    twin = copy.deepcopy(model).eval()
    collate = PadCollator(data.forget.encoder.pad_id)
    loaders = [DataLoader(part, 2, collate_fn=collate) for part in (data.retain, data.forget)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    optimizer = HAMUOptimizer(torch.optim.SGD(model.parameters(), lr=1e-2), RULE)
    prepared, wrapped, loader = accelerator.prepare(model.eval(), optimizer, loaders[0])
    (forget,) = loaders[1]
    for retain in loader:
        with accelerator.accumulate(prepared):
            with optimizer.forget():
                accelerator.backward(prepared(**forget).loss)
            with optimizer.retain():
                accelerator.backward(prepared(**retain).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                with optimizer.forget():
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            wrapped.step()
            wrapped.zero_grad()
    assert not torch.equal(weights_of(model), weights_of(twin))
    assert optimizer.steps == len(loaders[0]) // accumulated


def test_the_wrong_order_is_told(model: Any) -> None:
    base = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=1e-2))
    with pytest.raises(HAMUValueError, match=r"before `accelerator\.prepare`"):
        HAMUOptimizer(base, RULE)
