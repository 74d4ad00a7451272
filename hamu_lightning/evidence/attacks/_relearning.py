"""Whether little information brings the forgotten data back."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import ConcatDataset, Dataset, Subset

from hamu_lightning.evidence import PartScores
from hamu_lightning.evidence.attacks._subject import Subject, Unfit
from hamu_lightning.methods import teach
from hamu_lightning.metrics.functional import Estimate, mean_estimate
from hamu_lightning.wording import count

Measured = dict[str, tuple[Estimate, str]]


def relearn(subject: Subject) -> Measured:
    """Show a share of the forget set among the same share of the retain set, and ask for the rest.

    Samples of a forgotten class alone would teach any model to answer with that class always.
    """
    plan = subject.plan
    subject.scores("forget")  # says why, where nothing can be read
    forget, retain = plan.dataset("forget"), plan.dataset("retain")
    total: int = len(forget)  # type: ignore[arg-type]
    taken = max(1, round(plan.share * total))
    if taken >= total:
        raise Unfit("there are too few forgotten samples to show a part of them")
    order = torch.randperm(total, generator=_generator(plan.seed)).tolist()
    shown, rest = Subset(forget, order[:taken]), Subset(forget, sorted(order[taken:]))
    taught = _teach(subject, ConcatDataset([shown, _draw(retain, plan.share, plan.seed)]), "forget")
    what = (
        f"of the {count(total - taken, 'forgotten sample that was', 'forgotten samples that were')} not shown, after "
        f"{count(plan.steps, 'step')} on the {count(taken, 'other')} and the same share of the retain samples"
    )
    return _tell(subject, "relearn", taught, subject.read_samples(taught, rest, "forget"), what)


def relearn_retain(subject: Subject) -> Measured:
    """Go on training with retain data alone, and ask for the forget set."""
    subject.scores("forget")
    taught = _teach(subject, subject.plan.dataset("retain"), "retain")
    what = f"of the forgotten samples, after {count(subject.plan.steps, 'step')} on retain samples alone"
    return _tell(subject, "relearn_retain", taught, subject.read(taught, "forget"), what)


def _teach(subject: Subject, data: Dataset[Any], like: str) -> LightningModule:
    plan = subject.plan
    if subject.scores("forget").log_probs is None:
        raise Unfit("relearning is by the cross-entropy of a classifier")
    options = {"steps": plan.steps, "lr": plan.lr, "batch_size": plan.batch_size, "seed": plan.seed}
    return teach(subject.module, plan.loader(data, like), **options)  # type: ignore[arg-type]


def _tell(subject: Subject, name: str, taught: LightningModule, after: PartScores, what: str) -> Measured:
    good = "good: no more than in the control"
    return {
        name: (after.accuracy, f"share recognised {what}; {good}."),
        f"{name}_loss": (
            mean_estimate(after.losses, "losses"),
            f"mean loss {what}, in its unit; good: no less than in the control.",
        ),
        f"{name}_auc": (
            subject.membership(taught, after),
            f"AUC of the membership attack by loss {what}; good: near 0.5, as the control's.",
        ),
    }


def _draw(data: Dataset[Any], share: float, seed: int) -> Dataset[Any]:
    total: int = len(data)  # type: ignore[arg-type]
    return Subset(data, torch.randperm(total, generator=_generator(seed))[: max(1, round(share * total))].tolist())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)
