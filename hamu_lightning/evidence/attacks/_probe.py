"""What a linear classifier finds in the features of a model, whatever its own head says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.evidence.attacks._subject import Subject, Unfit, run
from hamu_lightning.metrics.functional import Estimate, match_classes, membership_auc, rate_estimate, undefined

Measured = dict[str, tuple[Estimate, str]]

# With many samples of a class a probe learns it from any features.
_SHOWN = 3


class _Samples(NamedTuple):
    features: np.ndarray[Any, Any]  # [N, D]
    labels: Tensor  # [N]

    def select(self, index: Tensor) -> _Samples:
        return _Samples(self.features[index.numpy()], self.labels[index])


def probe(subject: Subject) -> Measured:
    """Learn the classes from features of retain samples and a few held-out ones; judge that on forgotten samples.

    Three held-out samples are taken of each class that the retain data have not: nothing else says what it looks like.
    """
    if subject.scores("forget").labels is None:
        raise Unfit("a probe is for a classifier")
    samples = _read_features(subject)
    known, others = _split(subject, samples)
    if not bool(torch.isin(samples["forget"].labels, known.labels).all()):
        raise Unfit("no held-out sample is of the forgotten classes, so that a probe cannot learn them")
    head = make_head(known.features, known.labels.numpy())
    found = samples["forget"]
    right = int((head.predict(found.features) == found.labels.numpy()).sum())
    chance = 1 / len(torch.unique(known.labels))
    note = f"share of forgotten samples that a linear probe on the features puts into their class (chance {chance:.2g})"
    attacked = "AUC of a membership attack by the probe's loss; good: near 0.5, as the control's."
    return {
        "probe": (rate_estimate(right, len(found.labels)), f"{note}; good: no more than in the control."),
        "probe_auc": (_attack(head, found, others), attacked),
    }


def make_head(features: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Any:
    """Return a fitted logistic regression on standardised features.

    Raises:
        HAMUStateError: If scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise HAMUStateError(
            "Expected scikit-learn to be installed, but it is not. Install it: pip install scikit-learn"
        ) from error
    head = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    return head.fit(features, labels)


def _read_features(subject: Subject) -> dict[str, _Samples]:
    module = subject.module
    layer = _find_layer(module, subject.plan.batches("forget"), subject.plan.layer)
    names = [name for name in ("retain", "forget", subject.plan.held_out) if name is not None]
    return {name: _capture(module, layer, subject.plan.batches(name)) for name in names}


def _split(subject: Subject, samples: dict[str, _Samples]) -> tuple[_Samples, _Samples | None]:
    """What the probe learns from, and held-out samples that it does not see."""
    retain = samples["retain"]
    order = torch.randperm(len(retain.labels), generator=torch.Generator().manual_seed(subject.plan.seed % 2**63))
    known = retain.select(order[: subject.plan.samples])
    name = subject.plan.held_out
    if name is None:
        return known, None
    held_out = samples[name]
    is_shown = torch.zeros(len(held_out.labels), dtype=torch.bool)
    for label in subject.evaluation.gone:
        places = (held_out.labels == label).nonzero()[:, 0]
        is_shown[places[: min(_SHOWN, (len(places) + 1) // 2)]] = True
    shown, others = held_out.select(is_shown.nonzero()[:, 0]), held_out.select((~is_shown).nonzero()[:, 0])
    together = np.concatenate([known.features, shown.features]), torch.cat([known.labels, shown.labels])
    return _Samples(*together), others


def _attack(head: Any, forget: _Samples, held_out: _Samples | None) -> Estimate:
    n = len(forget.labels)
    if held_out is None:
        return undefined("no held-out data was given", (n, 0), 0.5)
    others = held_out.select(match_classes(held_out.labels, like=forget.labels))
    if not len(others.labels):
        return undefined("no held-out sample is of the forgotten classes", (n, 0), 0.5)
    return membership_auc(_losses(head, forget), _losses(head, others))


def _losses(head: Any, samples: _Samples) -> Tensor:
    places = torch.searchsorted(torch.as_tensor(head.classes_), samples.labels)
    return -torch.as_tensor(head.predict_log_proba(samples.features)).gather(1, places[:, None])[:, 0]


def _find_layer(module: LightningModule, batches: Iterable[Any], name: str | None) -> nn.Module:
    if name is not None:
        layers: dict[str, nn.Module] = dict(module.named_modules())
        if name not in layers:
            raise HAMUValueError(
                f"Expected `layer` to name a part of the module, but got {name!r}. See named_modules()."
            )
        return layers[name]
    called: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: called.append(m)) for m in module.modules() if _is_linear(m)]
    try:
        next(run(module, batches))
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise Unfit("the module has no Linear layer; name the layer whose inputs are the features, `layer`")
    return called[-1]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _capture(module: LightningModule, layer: nn.Module, batches: Iterable[Any]) -> _Samples:
    """What goes into a layer, `[N, D]`, in float64."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found, labels = [], []
    try:
        for y in run(module, batches):
            inputs = seen[-1] if seen else None
            seen.clear()
            if inputs is None or len(inputs) != len(y):
                raise Unfit("the layer does not see one row for each sample; name another one, `layer`")
            found.append(inputs.flatten(1).double().cpu())
            labels.append(y.cpu())
    finally:
        hook.remove()
    features = torch.cat(found)
    if not features.isfinite().all():
        raise Unfit("features are not finite")
    return _Samples(features.numpy(), torch.cat(labels))
