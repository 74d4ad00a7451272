"""`hamu-lightning preflight`: what unlearning can expect, before any weight changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from hamu_lightning.commands._weights import load_weights
from hamu_lightning.errors import HAMUValueError

if TYPE_CHECKING:
    from hamu_lightning.commands._project import Project


def preflight(
    project: Project,
    weights: str,
    forget_ids: str | None = None,
    by: str | None = None,
    missing: Literal["raise", "warn"] = "raise",
) -> int:
    """Say what unlearning would cost, and whether it can be had.

    Nothing is changed or written. The words are those of the command unlearn. Example: hamu-lightning preflight
    --config config.yaml --weights best.ckpt --forget-ids ids.csv --by customer_id

    Args:
        project: Module, data and Trainer.
        weights: Checkpoint or state dict of the trained model; weights alone are read.
        forget_ids: Text or CSV file of ids. Default: what the data themselves forget.
        by: Column or attribute that holds the ids. Default: ids are positions.
        missing: What to do about ids that no sample has.

    Returns:
        0.
    """
    load_weights(project.module, weights)
    callback: Any = project.find_callback(preflight=True)
    if not callback.settings.preflight:
        raise HAMUValueError(
            "Expected the HAMUCallback of the Trainer to have preflight=True, but it has not. Set it, or leave the "
            "callback out and give --hamu."
        )
    trainer: Any = project.trainer
    trainer.callbacks = [callback, _End()]
    # Loggers make their folders as a fit begins; what the module asks of one still has an answer.
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    with suppress(PreflightDone), _quiet():
        trainer.fit(project.module, datamodule=project.load_data(forget_ids, by, missing))
    print(callback.preflight_report)
    return 0


class PreflightDone(Exception):
    """Ends the fit before its first step."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of the fit: the table is printed here."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


class _End(Callback):
    @override
    def on_before_optimizer_step(self, *_: Any) -> None:
        raise PreflightDone
