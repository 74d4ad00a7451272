"""What loggers get beside scalars: pictures, a layout, settings with final numbers."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from typing_extensions import override

from hamu_lightning import HAMUCallback, Holdout
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import EvaluateUnlearning
from hamu_lightning.evidence._publish import lay_out
from tests.callbacks.modules import fit, trained_on
from tests.evidence.test_callback import HOLDOUT, PARTS, TRAIN, make_loader


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_tensorboard_gets_pictures_layout_and_settings(tmp_path: Path) -> None:
    evaluation = EvaluateUnlearning(max_batches=2, references=[trained_on(HOLDOUT, 30)])
    hamu = HAMUCallback(PARTS["forget"], target=Holdout(HOLDOUT))
    with pytest.warns(UserWarning, match="ended before the target"):
        trainer, _ = fit(
            trained_on(TRAIN, 60), hamu, evaluation, loader=make_loader(), logger=TensorBoardLogger(tmp_path)
        )
    folder = Path(str(trainer.log_dir))
    events = read(folder)
    assert {*events.Tags()["images"]} == {"eval/losses", "eval/ranks", "eval/tradeoff"}
    (picture,) = events.Images("eval/losses")
    assert picture.step == trainer.global_step and picture.width > 2 * picture.height
    scores = [(point.step, point.value) for point in events.Scalars("eval/score")]
    assert scores == [(step, pytest.approx(numbers["score"], abs=1e-6)) for step, numbers in evaluation.history]
    layout = Layout.FromString(events.SummaryMetadata("custom_scalars__config__").plugin_data.content)
    if not layout.category:  # the newer place is the value itself
        (event,) = events.Tensors("custom_scalars__config__")
        layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: [*chart.multiline.tag] for chart in layout.category[0].chart}
    assert {"^retain/loss$", "^forget/loss$", "^hamu/target$"} <= {*charts["losses and target"]}
    assert charts["margin"] == ["^hamu/margin$"]
    own = read(folder / "unlearning")
    data = own.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(data).session_start_info.hparams
    assert settings["rule"].string_value == "HAMUQ" and settings["target"].string_value == "Holdout"
    assert settings["steps"].number_value == trainer.global_step and "0.002" in settings["radius"].string_value
    final = evaluation.history[-1][1]
    assert own.Scalars("eval/auc")[0].value == pytest.approx(final["auc"], abs=1e-6)


class WithImages(CSVLogger):
    """Takes images as W&B's logger does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: dict[str, Any] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        (self.images[key],) = images


class WithExperiment(Logger):
    """Takes images by its experiment."""

    name = version = "fake"

    def __init__(self, folder: Path) -> None:
        self.images: dict[str, Any] = {}

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class MLFlowLogger(WithExperiment):
    """Its experiment is as MLflow's client."""

    run_id = "run"

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_image=self._take)

    def _take(self, run_id: str, image: Any, artifact_file: str) -> None:
        assert run_id == "run"
        self.images[artifact_file.removesuffix(".png")] = image


class CometLogger(WithExperiment):
    """Its experiment is as Comet's."""

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_image=self._take)

    def _take(self, image_data: Any, name: str, *, step: int) -> None:
        assert step > 0
        self.images[name] = image_data


@pytest.mark.parametrize("make", [WithImages, MLFlowLogger, CometLogger])
def test_other_loggers_get_pictures(make: Any, tmp_path: Path) -> None:
    logger = make(tmp_path)
    fit(trained_on(TRAIN, 60), EvaluateUnlearning(**PARTS), loader=make_loader(), logger=logger)
    assert {*logger.images} == {"eval/losses", "eval/ranks", "eval/tradeoff"}
    image = logger.images["eval/losses"]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and len(np.unique(image)) > 10


def test_without_matplotlib_there_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    logger = WithImages(tmp_path)
    evaluation = EvaluateUnlearning(**PARTS)
    fit(trained_on(TRAIN, 60), evaluation, loader=make_loader(), logger=logger)
    assert not logger.images and evaluation.after is not None


class Copies(Callback):
    """Copies the others in a fit, as a tuner does."""

    @override
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        (found,) = (x for x in trainer.callbacks if isinstance(x, EvaluateUnlearning))
        self.made = [copy.deepcopy(found), pickle.loads(pickle.dumps(found))]


def test_the_layout_has_all_requests() -> None:
    hamu = HAMUCallback({"request-17": PARTS["forget"], "b": PARTS["retain"]}, target={"request-17": 1.0, "b": 2.0})
    _, tags = lay_out(hamu)["losses and target"]
    wanted = {"retain/loss", "request-17/loss", "b/loss", "hamu/request-17_forget_level", "hamu/b_target"}
    assert all(any(re.search(tag, name) for tag in tags) for name in wanted)
    assert not any(re.search(tag, "train/loss") for tag in tags)


def test_pickles_hold_no_data() -> None:
    evaluation, copies = EvaluateUnlearning(**PARTS), Copies()
    fit(trained_on(TRAIN, 60), evaluation, copies, loader=make_loader())
    for made in (*copies.made, copy.deepcopy(evaluation), pickle.loads(pickle.dumps(evaluation))):
        assert isinstance(made, EvaluateUnlearning) and made.before is not None and evaluation.before is not None
        assert torch.equal(made.before.parts["forget"].losses, evaluation.before.parts["forget"].losses)
    secret = PARTS["forget"][3][0].numpy().tobytes()
    assert secret not in pickle.dumps(evaluation)
    fit(trained_on(TRAIN, 60), copies.made[0], loader=make_loader())  # a copy holds its data
    with pytest.raises(HAMUValueError, match="AbsentData"):
        fit(trained_on(TRAIN, 60), copies.made[1], loader=make_loader())
