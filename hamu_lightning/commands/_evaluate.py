"""`hamu-lightning evaluate`: numbers of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from hamu_lightning.commands._weights import load_weights
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import evaluate as measure

if TYPE_CHECKING:
    from hamu_lightning.commands._project import Project


def evaluate(
    project: Project,
    weights: str,
    forget_ids: str | None = None,
    by: str | None = None,
    missing: Literal["raise", "warn"] = "raise",
    before: str | None = None,
) -> int:
    """Measure what a model says of retained, forgotten and held-out samples.

    In evaluation mode. Model and data are said as to the command unlearn. Example: hamu-lightning evaluate
    --config config.yaml --weights unlearned.ckpt --before best.ckpt --forget-ids ids.csv --by customer_id

    Args:
        project: Module, data and Trainer.
        weights: Checkpoint or state dict of the model; weights alone are read.
        forget_ids: Text or CSV file of ids. Default: those of an UnlearnData in --data.
        by: Column or attribute that holds the ids. Default: ids are positions.
        missing: What to do about ids that no sample has.
        before: The model before unlearning, to say what has changed.

    Returns:
        0.
    """
    data: Any = project.load_data(forget_ids, by, missing)
    if not hasattr(data, "parts"):
        raise HAMUValueError(
            "Expected to know what is forgotten, but got no ids. Give --forget-ids, or UnlearnData as --data."
        )
    project.introduce(data)
    parts = data.parts()
    load_weights(project.module, weights)
    after = measure(project.module, parts, datamodule=data)
    numbers = after.numbers()
    if before is not None:
        load_weights(project.module, before)
        numbers |= after.since(measure(project.module, parts, datamodule=data))
    for name, number in numbers.items():
        print(f"{name:16} {number}")
    return 0
