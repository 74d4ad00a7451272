"""All attacks on a model and on its control."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule

from hamu_lightning.checks import check_choice, check_count, check_number, check_positive, check_seed, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import AttackRow
from hamu_lightning.evidence.attacks._outputs import logit_shift, neighbours
from hamu_lightning.evidence.attacks._probe import probe
from hamu_lightning.evidence.attacks._relearning import relearn, relearn_retain
from hamu_lightning.evidence.attacks._rounding import quantize_int8, round_4bit
from hamu_lightning.evidence.attacks._subject import Part, Plan, Subject, Unfit
from hamu_lightning.methods import SampleLosses
from hamu_lightning.metrics.functional import Estimate, undefined
from hamu_lightning.randomness import RandomStream

_ATTACKS: Mapping[str, Callable[[Subject], dict[str, tuple[Estimate, str]]]] = {
    "relearn": relearn,
    "relearn_retain": relearn_retain,
    "quantize_int8": quantize_int8,
    "round_4bit": round_4bit,
    "probe": probe,
    "logit_shift": logit_shift,
    "neighbours": neighbours,
}
ATTACKS = tuple(_ATTACKS)
"""The names of the attacks."""
# Retrained models differ by more than the choice of samples explains.
_SPREAD = 0.05


def attack(
    module: LightningModule,
    parts: Mapping[str, Part],
    *,
    control: LightningModule | Sequence[LightningModule] | None = None,
    attacks: Sequence[str] | None = None,
    losses: SampleLosses | None = None,
    layer: str | None = None,
    steps: int = 20,
    lr: float = 0.001,
    batch_size: int = 64,
    share: float = 0.1,
    group: int = 32,
    samples: int = 2000,
    seed: int = 0,
) -> list[AttackRow]:
    """Try to get out of a model what it was made to forget; and out of a model that never saw it, the control.

    Attacks work on copies; models and all random numbers outside are left as they are. Model and control are attacked
    with the same samples, settings and seeds. docs/evidence.md says what each attack finds, and which say nothing
    without a control.

    - "relearn": a share of the forget set is shown for a few steps, with the same share of the retain set; the rest of
      the forget set is asked for (arXiv 2506.00688). "relearn_retain": steps on retain samples alone.
    - "quantize_int8", "round_4bit": what comes back when weights are rounded (arXiv 2410.16454).
    - "probe": a linear classifier on the features, whatever the module's own head says.
    - "logit_shift": a constant is added to the logit of a class that is forgotten as a whole.
    - "neighbours": samples of such a class are told from others by how sure the model is of the nearest other class
      (after arXiv 2506.20893).

    Args:
        module: The unlearned model: a classifier of `x` into logits `[N, K]`. Of another model give `losses`; what
            makes no sense then is NaN with the reason.
        parts: For "forget", "retain", "holdout" and "test" the samples `(x, y)`: a Dataset, a DataLoader over one (its
            order is left out), or other batches. Held-out samples are those of "holdout", else of "test".
        control: A model that was retrained without the forgotten data. Better several, with other seeds: retrained
            models differ, and a row has the one of them whose value is nearest to the model's.
        attacks: Names of attacks. Default: all.
        losses: For what is no classifier: `losses(forward, batch) -> [N]`, one loss per sample.
        layer: The name of the layer whose inputs the probe looks at. Default: the last Linear that is called.
        steps: Of relearning.
        lr: Learning rate of relearning; SGD with momentum 0.9.
        batch_size: Of relearning.
        share: Which share of the forget and of the retain set is shown.
        group: How many weights share a scale under 4 bits.
        samples: How many retain samples the probe learns from, at most.
        seed: Of all draws.

    Returns:
        One row or a few for each attack: "<attack>" is a share of samples, "<attack>_loss" a mean loss, "<attack>_auc"
        a membership attack. NaN with the reason where an attack says nothing.

    Raises:
        HAMUValueError: If an argument is of another kind, or out of range.
        HAMUStateError: If scikit-learn is not installed, for "probe" and "neighbours".

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> samples = TensorDataset(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
        >>> [row.name for row in attack(Line(), {"forget": samples}, attacks=["quantize_int8"])]
        ['quantize_int8_loss', 'quantize_int8', 'quantize_int8_auc']
    """
    check_type("module", module, LightningModule, "a LightningModule")
    controls = [control] if isinstance(control, LightningModule) else list(control or ())
    for model in controls:
        check_type("control", model, LightningModule, "a LightningModule that was retrained, or several")
    for name in check_type("parts", parts, Mapping, "a mapping from the names of parts to their samples"):
        check_choice("parts", name, ("retain", "forget", "holdout", "test"))
        if isinstance(parts[name], Iterator):
            raise HAMUValueError(
                f"Expected the samples of {name!r} to be there for several passes, but got an iterator, which ends. "
                "Give a Dataset, a DataLoader, or a list of batches."
            )
    if "forget" not in parts:
        raise HAMUValueError("Expected the data to forget among `parts`, but got none. Give it as 'forget'.")
    for name in attacks if attacks is not None else ():
        check_choice("attacks", name, ATTACKS)
    settings: dict[str, Any] = {
        "steps": check_count("steps", steps),
        "lr": check_positive("lr", lr),
        "batch_size": check_count("batch_size", batch_size),
        "share": check_number("share", share, above=0, below=1, cure="What is not shown is asked for."),
        "group": check_count("group", group),
        "samples": check_count("samples", samples),
        "seed": check_seed(seed),
    }
    plan = Plan(parts, losses, layer, **settings)
    with RandomStream(plan.seed).active():
        subjects = [Subject(model, plan) for model in (module, *controls)]
        return [row for name in attacks or ATTACKS for row in _rows(name, subjects)]


def _rows(name: str, subjects: Sequence[Subject]) -> list[AttackRow]:
    found, *others = (_try(name, subject) for subject in subjects)
    rows = []
    for row, (value, note) in found.items():
        there = [other[row][0] for other in others if row in other]
        rows.append(AttackRow(row, value, min(there, key=partial(_distance, value), default=None), note))
    return rows


def _distance(value: Estimate, control: Estimate) -> float:
    return abs(value.value - control.value) if value.is_defined and control.is_defined else math.inf


def _try(name: str, subject: Subject) -> dict[str, tuple[Estimate, str]]:
    try:
        return _ATTACKS[name](subject)
    except Unfit as reason:
        return {name: (undefined(str(reason)), f"{name} says nothing here: {reason}.")}


def is_telling(row: AttackRow) -> bool | None:
    """Whether an attack gets more out of the model than out of its control, beyond chance.

    The two intervals are more than 0.05 apart: they cover the choice of the samples, and retrained models differ among
    each other as well. Of "neighbours" the model may be on either side.

    Args:
        row: What `attack` returned.

    Returns:
        None where this cannot be said: there is no control or no number, or it is a mean loss, whose unit is not known.

    Example:
        >>> is_telling(AttackRow("probe", Estimate(0.9, (0.85, 0.93)), Estimate(0.5, (0.4, 0.6)), ""))
        True
    """
    if row.control is None or row.value.interval is None or row.control.interval is None or row.name.endswith("_loss"):
        return None
    (lower, upper), (least, most) = row.value.interval, row.control.interval
    return lower > most + _SPREAD or (row.name == "neighbours" and upper < least - _SPREAD)
