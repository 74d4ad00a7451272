"""All attacks on a model and on its control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def attack(
    module: LightningModule,
    parts: Mapping[str, Part],
    *,
    control: LightningModule | None = None,
    attacks: Sequence[str] | None = None,
    losses: SampleLosses | None = None,
    layer: str | None = None,
    steps: int = 10,
    lr: float = 0.01,
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

    - "relearn": a share of the forget set is shown for a few steps, with as many retain samples; the rest of it is
      asked for (arXiv 2506.00688). "relearn_retain": steps on retain samples alone.
    - "quantize_int8", "round_4bit": what comes back when weights are rounded (arXiv 2410.16454).
    - "probe": a linear classifier on the features, whatever the module's own head says.
    - "logit_shift": a constant is added to the logit of a class that is forgotten as a whole.
    - "neighbours": samples of such a class are told from others by what the model says of the other classes
      (arXiv 2506.20893).

    Args:
        module: The unlearned model: a classifier of `x` into logits `[N, K]`. Of another model give `losses`; what
            makes no sense then is NaN with the reason.
        parts: For "forget", "retain", "holdout" and "test" the samples `(x, y)`: a Dataset, a DataLoader over one (its
            order is left out), or other batches. Held-out samples are those of "holdout", else of "test".
        control: A model that was retrained without the forgotten data.
        attacks: Names of attacks. Default: all.
        losses: For what is no classifier: `losses(forward, batch) -> [N]`, one loss per sample.
        layer: The name of the layer whose inputs the probe looks at. Default: the last Linear that is called.
        steps: Of relearning.
        lr: Learning rate of relearning; SGD with momentum 0.9.
        batch_size: Of relearning.
        share: Which share of the forget set is shown.
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
    check_type("control", control, LightningModule | None, "a LightningModule that was retrained, or None")
    for name in check_type("parts", parts, Mapping, "a mapping from the names of parts to their samples"):
        check_choice("a name in `parts`", name, ("retain", "forget", "holdout", "test"))
    if "forget" not in parts:
        raise HAMUValueError("Expected the data to forget among `parts`, but got none. Give it as 'forget'.")
    for name in attacks if attacks is not None else ():
        check_choice("a name in `attacks`", name, ATTACKS)
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
        subjects = [Subject(model, plan) for model in (module, control) if model is not None]
        return [row for name in attacks or ATTACKS for row in _rows(name, subjects)]


def _rows(name: str, subjects: Sequence[Subject]) -> list[AttackRow]:
    found, control = _try(name, subjects[0]), _try(name, subjects[1]) if len(subjects) > 1 else {}
    return [AttackRow(row, value, control.get(row, (None, ""))[0], note) for row, (value, note) in found.items()]


def _try(name: str, subject: Subject) -> dict[str, tuple[Estimate, str]]:
    try:
        return _ATTACKS[name](subject)
    except Unfit as reason:
        return {name: (undefined(str(reason)), f"{name} says nothing here: {reason}.")}
