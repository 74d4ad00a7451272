"""What loggers get of an evaluation: scalars, pictures, a layout, and settings with what came of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from hamu_lightning.callbacks import HAMUCallback, find_hamu
from hamu_lightning.evidence._scores import FORGET, RETAIN, Evaluation
from hamu_lightning.metrics.functional import ranks_among
from hamu_lightning.report import MissingMatplotlibError, plot_losses, plot_ranks, plot_tradeoff, render

_RUN = "unlearning"


def publish(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Put `eval/<name>` into `trainer.callback_metrics`, where `ModelCheckpoint` and others look."""
    trainer.callback_metrics.update({f"eval/{name}": torch.tensor(value) for name, value in numbers.items()})


def log_numbers(trainer: Trainer, numbers: Mapping[str, float], step: int) -> None:
    """Publish the numbers, and hand those that are not NaN to all loggers."""
    publish(trainer, numbers)
    known = {f"eval/{name}": value for name, value in numbers.items() if not math.isnan(value)}
    for logger in trainer.loggers:
        logger.log_metrics(known, step=step)


def log_layout(trainer: Trainer) -> None:
    """Let TensorBoard's custom scalars show what belongs together on one chart."""
    for experiment in _tensorboards(trainer):
        experiment.add_custom_scalars({"Unlearning": lay_out(find_hamu(trainer))})


def lay_out(hamu: HAMUCallback | None) -> dict[str, Any]:
    """What is on each chart: losses, levels and targets of all groups on one, the margin on another."""
    rule = None if hamu is None else hamu.settings.schedule or hamu.settings.rule
    groups = [re.escape(name) for name in getattr(rule, "groups", (RETAIN, FORGET))]
    levels = ["", *(f"{name}_" for name in groups)]
    charts = {  # TensorBoard reads tags as regular expressions
        "losses and target": [
            *(f"^{name}/loss$" for name in groups),
            *(f"^hamu/{prefix}{what}$" for what in ("forget_level", "target") for prefix in levels),
        ],
        "margin": ["^hamu/margin$"],
        "evaluated losses": ["^eval/(retain|forget|holdout|test)_loss$"],
        "evaluated accuracy": ["^eval/(RA|FA|TA)$"],
        "attack and score": ["^eval/(auc|score)$"],
    }
    return {title: ["Multiline", tags] for title, tags in charts.items()}


def log_settings(trainer: Trainer, hamu: HAMUCallback | None, numbers: Mapping[str, float]) -> None:
    """Let TensorBoard's table of hyper-parameters show settings with the numbers at the end, as a run of its own."""
    settings = {"steps": trainer.global_step, **describe_settings(hamu)}
    final = {f"eval/{name}": value for name, value in numbers.items() if not math.isnan(value)}
    for experiment in _tensorboards(trainer):
        is_torch = type(experiment).__module__.startswith("torch.")
        experiment.add_hparams(settings, final, **{"run_name" if is_torch else "name": _RUN})


def describe_settings(hamu: HAMUCallback | None) -> dict[str, Any]:
    """The settings of unlearning in single words and numbers; empty without it."""
    if hamu is None:
        return {}
    rule = hamu.settings.schedule or hamu.settings.rule
    targets = {name: _describe(quota.target) for name, quota in getattr(rule, "target_quotas", {}).items()}
    found = {"rule": type(rule).__name__, "target": ", ".join(targets.values()) or "none", "seed": hamu.settings.seed}
    radius = getattr(rule, "radius", None)
    return found if radius is None else {**found, "radius": str(radius)}


def _describe(target: Any) -> str:
    return f"{target:.4g}" if isinstance(target, float | int) else type(target).__name__


def log_pictures(
    trainer: Trainer,
    before: Evaluation,
    after: Evaluation,
    history: Sequence[tuple[int, Mapping[str, float]]],
    references: Sequence[Evaluation] = (),
) -> None:
    """Hand the pictures to the loggers that take any: TensorBoard's, W&B's, MLflow's, Comet's."""
    takers = [*_find_takers(trainer)]
    if not takers:
        return
    try:
        images = {name: render(figure) for name, figure in _draw(before, after, history, references)}
    except MissingMatplotlibError as error:
        rank_zero_info(f"No pictures of the evaluation: {error}")
        return
    for name, image in images.items():
        for take in takers:
            take(f"eval/{name}", image)


def _find_takers(trainer: Trainer) -> Iterator[Callable[[str, Any], None]]:
    """For each logger of this process that takes pictures a function of a name and an image `[H, W, 3]`."""
    step = trainer.global_step
    for writer in _tensorboards(trainer):
        yield partial(_add_image, writer, step)
    for logger in trainer.loggers if trainer.is_global_zero else ():
        kinds = {kind.__name__ for kind in type(logger).__mro__}  # of either name of Lightning
        if callable(getattr(logger, "log_image", None)):
            yield partial(_log_images, logger)
        elif "MLFlowLogger" in kinds:
            yield partial(_log_artifact, logger)
        elif "CometLogger" in kinds:
            yield partial(_log_step, logger, step)


def _add_image(writer: Any, step: int, name: str, image: Any) -> None:
    writer.add_image(name, image, step, dataformats="HWC")


def _log_images(logger: Any, name: str, image: Any) -> None:
    """As `WandbLogger.log_image` takes it."""
    logger.log_image(name, images=[image])


def _log_artifact(logger: Any, name: str, image: Any) -> None:
    """As `mlflow.MlflowClient.log_image` takes it."""
    logger.experiment.log_image(logger.run_id, image, f"{name}.png")


def _log_step(logger: Any, step: int, name: str, image: Any) -> None:
    """As `comet_ml.Experiment.log_image` takes it."""
    logger.experiment.log_image(image, name=name, step=step)


def _draw(
    before: Evaluation,
    after: Evaluation,
    history: Sequence[tuple[int, Mapping[str, float]]],
    references: Sequence[Evaluation],
) -> Iterator[tuple[str, Any]]:
    """The figures by name."""
    first, last = before.comparable(), after.comparable()
    forgotten = before.parts[FORGET].losses, after.parts[FORGET].losses
    if (
        first is not None
        and last is not None
        and all(bool(x.isfinite().any()) for x in (*forgotten, first.losses, last.losses))
    ):
        auc = before.numbers(quick=True)["auc"].value, after.numbers(quick=True)["auc"].value
        yield "losses", plot_losses((forgotten[0], first.losses), (forgotten[1], last.losses), auc=auc)
        ranks = ranks_among(forgotten[1], last.losses)
        yield "ranks", plot_ranks(ranks, before=ranks_among(forgotten[0], first.losses), held_out=len(last))
    path = [(step, numbers) for step, numbers in history if {"retain_change", "forget_change"} <= {*numbers}]
    if path:
        yield (
            "tradeoff",
            plot_tradeoff(
                [-numbers["retain_change"] for _, numbers in path],
                [numbers["forget_change"] for _, numbers in path],
                [float(step) for step, _ in path],
                reference=_improvements(before, references),
            ),
        )


def _improvements(before: Evaluation, references: Sequence[Evaluation]) -> tuple[float, float] | None:
    """Where the references are in the plane of the trade-off, in the mean."""
    if not references or any(RETAIN not in x.parts for x in (before, *references)):
        return None
    since = [reference.since(before) for reference in references]
    retain, forget = (sum(x[f"{name}_change"].value for x in since) / len(since) for name in (RETAIN, FORGET))
    return -retain, forget


def _tensorboards(trainer: Trainer) -> Iterator[Any]:
    """TensorBoard's own writers, of this process's loggers."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        experiment = getattr(logger, "experiment", None)
        if "tensorboard" in type(experiment).__module__.lower():
            yield experiment
