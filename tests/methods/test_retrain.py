"""Training from scratch, the cache, and training steps behind one call."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from hamu_lightning.callbacks import HAMUCallback, PassOptions
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.methods import SSD, Method, Retrain, TrainingRun, _storage
from hamu_lightning.rules import HAMUQ, FineTune
from tests.methods.setups import OPTIONS, Classifier, Source, build, make_samples, make_split, untouched, weights_of


class StopAfter(Callback):
    """Stops a fit after so many batches, of all fits that it has seen."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.left -= 1
        trainer.should_stop = self.left <= 0


class CountFits(Callback):
    fits = 0

    def on_fit_start(self, *_: Any) -> None:
        CountFits.fits += 1

    def __repr__(self) -> str:
        return "CountFits()"


@pytest.fixture
def counted() -> dict[str, Any]:
    CountFits.fits = 0
    return {**OPTIONS, "callbacks": CountFits()}


def test_it_is_plain_training_on_the_retain_data() -> None:
    source, forget = make_split()
    retrain = Retrain(Classifier, OPTIONS, seed=7)
    module = build()
    with untouched(module):
        first = retrain(module, source, forget)
    assert isinstance(retrain, Method)
    assert torch.equal(weights_of(first), weights_of(retrain(None, source)))
    assert not torch.equal(weights_of(first), weights_of(Retrain(Classifier, OPTIONS, seed=8)(None, source)))
    # The forget samples take no part: others in their place change nothing, other retain samples do.
    assert not torch.equal(weights_of(first), weights_of(retrain(None, Source(make_samples(60, seed=9)))))


def test_the_seed_is_that_of_the_first_weights_too() -> None:
    source, _ = make_split()
    still = [weights_of(Retrain(lambda: Classifier(lr=0.0), OPTIONS, seed)(None, source)) for seed in (1, 1, 2)]
    assert torch.equal(still[0], still[1])
    assert not torch.equal(still[0], still[2])


def test_the_cache_saves_a_training(tmp_path: Path, counted: dict[str, Any]) -> None:
    source, _ = make_split()
    retrain = Retrain(lambda: Classifier(batchnorm=True), counted, cache=tmp_path)
    first, second = retrain(None, source), retrain(None, source)
    assert CountFits.fits == 1
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_callbacks_among_the_options_are_fresh_in_each_fit(tmp_path: Path) -> None:
    source, _ = make_split()
    retrain = Retrain(Classifier, {**OPTIONS, "callbacks": StopAfter(6)}, cache=tmp_path)
    first = weights_of(retrain(None, source))
    assert retrain.load(source) is not None
    assert torch.equal(first, weights_of(Retrain(Classifier, retrain.options)(None, source)))


@pytest.mark.parametrize("change", ["seed", "options", "data", "factory", "attribute", "batch size", "drop_last"])
def test_what_changes_the_result_trains_anew(change: str, tmp_path: Path, counted: dict[str, Any]) -> None:
    source, _ = make_split()
    lr = 0.2
    settings: dict[str, Any] = {"module_factory": lambda: Classifier(lr=lr), "options": counted, "cache": tmp_path}
    Retrain(**settings)(None, source)
    if change == "seed":
        settings["seed"] = 1
    if change == "options":
        settings["options"] = {**counted, "max_epochs": 1}
    if change == "data":
        source.retain.dataset.tensors[0][-1, 0] += 1e-3
    if change == "factory":
        settings["module_factory"] = lambda: Classifier(True)
    if change == "attribute":
        lr = 0.1
    if change == "batch size":
        source.train_dataloader = lambda: DataLoader(source.retain, batch_size=8, shuffle=True)  # type: ignore[method-assign]
    if change == "drop_last":
        source.train_dataloader = lambda: DataLoader(source.retain, 16, shuffle=True, drop_last=True)  # type: ignore[method-assign]
    Retrain(**settings)(None, source)
    assert CountFits.fits == 2


def test_an_interrupted_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        _storage.save_weights(tmp_path / "a.pt", {})
    assert list(tmp_path.iterdir()) == []
    assert _storage.load_weights(tmp_path / "a.pt") is None


@pytest.mark.parametrize("harm", ["cut", "empty", "other weights", "NaN", "another file's", "plain weights", "a list"])
def test_weights_that_are_not_those_that_were_written_are_refused(tmp_path: Path, harm: str) -> None:
    path, other = tmp_path / "a.pt", tmp_path / "b.pt"
    _storage.save_weights(path, {"weight": torch.ones(3)})
    _storage.save_weights(other, {"weight": torch.ones(3)})
    kept = torch.load(path)
    if harm in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 200 * (harm == "cut")])
    elif harm == "another file's":
        path.write_bytes(other.read_bytes())
    elif harm in ("other weights", "NaN"):
        torch.save(
            {**kept, "weights": {"weight": torch.full((3,), 2.0 if harm == "other weights" else math.nan)}}, path
        )
    else:
        torch.save(kept["weights"] if harm == "plain weights" else [1], path)
    with pytest.raises(HAMUStateError, match=r"Expected '.*a.pt' to .*Delete it; the model is then trained again"):
        _storage.load_weights(path)


def test_numbers_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"score": 1')
    with pytest.raises(HAMUStateError, match=r"Expected '.*a.json' to be a run .*Delete it; it is then run again"):
        _storage.load_json(tmp_path / "a.json")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(
        HAMUStateError, match=r"Expected to write '.*folder/a.pt', but could not: .* give another folder"
    ):
        _storage.save_weights(tmp_path / "folder" / "a.pt", {})


def hamu(forget: Any, seed: int) -> Callback:
    return HAMUCallback(forget, HAMUQ(quota=1e-2), passes=PassOptions(batch_size=8), seed=seed)


def test_a_training_run_is_the_fit_that_one_would_write() -> None:
    source, forget = make_split()
    module = build(batchnorm=True)
    run = TrainingRun(hamu, OPTIONS, seed=3)
    with untouched(module):
        result = run(module, source, forget)
    assert isinstance(run, Method)
    assert torch.equal(weights_of(result), weights_of(run(module, source, forget)))
    assert not torch.equal(weights_of(result), weights_of(TrainingRun(hamu, OPTIONS, seed=4)(module, source, forget)))
    plain = TrainingRun(lambda forget, seed: HAMUCallback(forget, FineTune(), seed=seed), OPTIONS, seed=3)
    assert not torch.equal(weights_of(result), weights_of(plain(module, source, forget)))


def test_a_module_that_was_fitted_is_copied_without_its_trainer() -> None:
    source, forget = make_split()
    module = build()
    trainer = Trainer(**OPTIONS, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(module, source.train_dataloader())
    for method in (TrainingRun(hamu, OPTIONS), SSD()):
        result = method(module, source, forget)
        assert module.trainer is trainer
        assert result._trainer is None


def test_the_same_batches_from_a_loader_with_a_generator_of_its_own() -> None:
    source, forget = make_split()
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(source.retain, batch_size=16, shuffle=True, generator=generator)
    source.train_dataloader = lambda: loader  # type: ignore[method-assign]
    before = generator.get_state()
    run = TrainingRun(hamu, OPTIONS)
    first, second = (weights_of(run(build(), source, forget)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, generator.get_state())


def test_the_hooks_of_a_datamodule_are_used() -> None:
    source, forget = make_split()

    class Halved(LightningDataModule):
        def train_dataloader(self) -> Any:
            return source.train_dataloader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] / 2, batch[1]

    retrain = Retrain(Classifier, OPTIONS)
    halved = weights_of(retrain(None, Halved()))
    assert not torch.equal(halved, weights_of(retrain(None, source)))


def test_an_observer_sees_the_fit(counted: dict[str, Any]) -> None:
    source, forget = make_split()
    run = TrainingRun(hamu, OPTIONS)
    run.observed_by(CountFits())(build(), source, forget)
    assert CountFits.fits == 1
    assert run.observers == ()
