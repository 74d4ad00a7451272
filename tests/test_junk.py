"""Every public class and function, each argument replaced by junk: it is taken, or refused by an error of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

from hamu_lightning import callbacks, compute_gramian, methods, metrics, objectives, preflight, rules, solvers
from hamu_lightning.errors import HAMUError
from hamu_lightning.optim import HAMUOptimizer

JUNK: dict[str, Any] = {
    "None": None,
    "text": "x",
    "text of a number": "1e-3",
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "True": True,
    "np.float32": np.float32(0.5),
    "np.int64": np.int64(2),
    "np.bool": np.bool_(True),
    "0-d tensor": torch.tensor(0.5),
    "1-d tensor": torch.ones(3),
    "[]": [],
    "{}": {},
    "object": object(),
    "function": lambda *_: 1,
    "class": int,
    "10**400": 10**400,
    "complex": 1j,
}
LOADER = [torch.ones(2, 32)]
ONE, TWO = torch.arange(3.0), torch.arange(6.0).reshape(3, 2)
RULE = rules.HAMUQ(1e-3, radius=rules.FixedRadius(0.1))


def optimizer(**options: Any) -> HAMUOptimizer:
    return HAMUOptimizer(**{"base": torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), **options})


def ask(rule: Any, **arguments: Any) -> Any:
    return rule.coefficients(**{"gramian": torch.eye(2).expand(2, 2, 2), "lr": 0.1, **arguments})


DOORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "HAMUQ": (rules.HAMUQ, {"quota": 1e-3, "radius": RULE.radius, "allocation": "uniform", "blocks": "tensor"}),
    "HAMUU": (rules.HAMUU, {"quota": 1e-3, "on_infeasible": "skip"}),
    "FineTune": (rules.FineTune, {"blocks": "tensor"}),
    "GradAscent": (rules.GradAscent, {"blocks": "tensor"}),
    "GradDiff": (rules.GradDiff, {"weight": 1.0}),
    "RelativeQuota": (rules.RelativeQuota, {"fraction": 0.1}),
    "TargetQuota": (rules.TargetQuota, {"target": 1.0, "steps": 3}),
    "RelativeRadius": (rules.RelativeRadius, {"fraction": 0.1, "floor": 0.1}),
    "ScaledRadius": (rules.ScaledRadius, {"radius": RULE.radius, "scale": 0.1}),
    "Alternate": (
        rules.Alternate,
        {"max_epochs": 1, "max_steps": 1, "forget": rules.GradAscent(), "retain": rules.FineTune()},
    ),
    "HAMUQ.coefficients": (lambda **a: ask(RULE, **a), {"gramian": torch.eye(2)[None], "lr": 0.1, "quota": None}),
    "GRU.coefficients": (lambda **a: ask(rules.GRU(), **a), {"gramian": torch.eye(2)[None], "lr": 0.1}),
    "RelativeRadius.compute": (
        lambda **a: ask(rules.HAMUQ(1e-3, radius=rules.RelativeRadius(0.1)), **a),
        {"weight_norms": torch.ones(2), "sizes": torch.ones(2)},
    ),
    "FeasibleDirection": (
        solvers.FeasibleDirection,
        {"quota": {"a": 1e-3}, "floor": {"b": 0.0}, "radius": RULE.radius, "blocks": "global", "solver": "osqp"},
    ),
    "FeasibleDirection, names": (
        lambda **a: solvers.FeasibleDirection({"a": a["q"]}, {"b": a["u"]}),
        {"q": 1.0, "u": 1.0},
    ),
    "compute_gramian": (
        lambda retain, forget, blocks: compute_gramian(retain, forget, blocks=blocks),
        {"retain": [torch.ones(2)], "forget": [torch.ones(2)], "blocks": [0]},
    ),
    "compute_gramian, tensors": (lambda grad: compute_gramian([torch.ones(2)], [grad]), {"grad": torch.ones(2)}),
    "HAMUOptimizer": (
        optimizer,
        {"rule": RULE, "named_parameters": None, "exact": False, "track_actual": False, "reuse_groups": False}
        | {"sketch": None, "mask": None},
    ),
    "HAMUOptimizer, base": (
        lambda base: HAMUOptimizer(base, RULE),
        {"base": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)},
    ),
    "PassOptions": (
        callbacks.PassOptions,
        {"batch_size": 1, "batchnorm": "freeze", "every_n_steps": 1, "groups_per_step": 1},
    ),
    "StepOptions": (callbacks.StepOptions, {"exact": True, "track_actual": True, "sketch": 8, "mask": {}}),
    "VerifySteps": (
        callbacks.VerifySteps,
        {"every": 1, "tolerance": 0.5, "shrink": 0.5, "grow": 1.5, "max_tries": 3, "ledger": False},
    ),
    "Holdout": (callbacks.Holdout, {"data": LOADER, "every": 1}),
    "Chance": (callbacks.Chance, {"num_classes": 3}),
    "CollateralDamage": (callbacks.CollateralDamage, {"patience": 1, "epsilon": 0.1}),
    "RetainAbove": (callbacks.RetainAbove, {"loss": 1.0, "patience": 1}),
    "NotFinite": (callbacks.NotFinite, {"patience": 1}),
    "HAMUCallback": (
        callbacks.HAMUCallback,
        {"forget": LOADER, "rule": RULE, "protect": None, "seed": 0, "stop_on": (), "progress_bar": False}
        | {"preflight": False, "verify": None, "objective": None, "retain_objective": None}
        | {"passes": callbacks.PassOptions(), "steps": callbacks.StepOptions()},
    ),
    "HAMUCallback, target": (lambda target: callbacks.HAMUCallback(LOADER, target=target), {"target": 1.0}),
    "HAMUCallback, schedule": (
        lambda schedule: callbacks.HAMUCallback(LOADER, schedule=schedule),
        {"schedule": rules.Alternate(1)},
    ),
    "preflight": (
        lambda **a: preflight(BoringModel(), LOADER, LOADER, **a),
        {"rule": RULE, "batches": 1, "target": None, "lr": 0.1, "batchnorm": "freeze", "seed": 0, "mask": None},
    ),
    "compute_saliency_mask": (
        lambda **a: callbacks.compute_saliency_mask(BoringModel(), LOADER, **a),
        {"keep": 0.5, "batchnorm": "freeze", "seed": 0},
    ),
    "NPO": (objectives.NPO, {"beta": 0.1, "reference": None, "outputs": None}),
    "SimNPO": (objectives.SimNPO, {"beta": 0.1, "gamma": 0.0}),
    "DPO": (objectives.DPO, {"preferred": None, "beta": 0.1}),
    "IdkDPO": (objectives.IdkDPO, {"answers": [[1, 2]], "seed": 0, "key": None}),
    "DELETE": (objectives.DELETE, {"reference": None, "outputs": None}),
    "UNDIAL": (objectives.UNDIAL, {"strength": 1.0}),
    "WGA": (objectives.WGA, {"alpha": 1.0, "outputs": None}),
    "SatImp": (objectives.SatImp, {"saturation": 5.0, "importance": 0.1}),
    "TokenCap": (objectives.TokenCap, {"level": 1.0}),
    "EntropyWeighted": (objectives.EntropyWeighted, {"level": None}),
    "TokenMean": (objectives.TokenMean, {"objective": objectives.CrossEntropy(), "tokens_per_batch": 8.0}),
    "ReferenceKL": (objectives.ReferenceKL, {"direction": "forward", "temperature": 1.0}),
    "BadTeacher": (objectives.BadTeacher, {"teacher": None, "temperature": 1.0, "seed": 0}),
    "RandomLabels": (objectives.RandomLabels, {"seed": 0, "key": None}),
    "LossCap": (objectives.LossCap, {"objective": objectives.CrossEntropy(), "level": 1.0}),
    "WeightedSum": (lambda w, o: objectives.WeightedSum((w, o)), {"w": 1.0, "o": objectives.ModuleLoss()}),
    "WeightedSum, terms": (lambda term: objectives.WeightedSum(term), {"term": (1.0, objectives.ModuleLoss())}),
    "RMU": (objectives.RMU, {"layer": "layer", "coefficient": 1.0, "seed": 0}),
    "FrozenCopy": (objectives.FrozenCopy, {"module": None}),
    "ModuleOutputs": (objectives.ModuleOutputs, {"shift": None}),
    "CachedLogits": (objectives.CachedLogits, {"folder": "x", "key": None, "keep": "logits"}),
    "SSD": (methods.SSD, {"alpha": 1.0, "lambda_": 1.0, "losses": methods.classifier_losses}),
    "FisherForgetting": (methods.FisherForgetting, {"alpha": 1e-9, "damping": 1e-4, "seed": 0}),
    "Retrain": (methods.Retrain, {"module_factory": BoringModel, "options": {}, "seed": 0, "cache": None}),
    "Search": (methods.Search, {"make": methods.SSD, "low": 1.0, "high": 2.0}),
    "TrainingRun": (methods.TrainingRun, {"callback_factory": print, "options": {}, "seed": 0, "observers": ()}),
    "RunningObjective": (metrics.RunningObjective, {"start": 0.0, "sync_on_compute": True}),
    "RunningObjective.update": (
        lambda **a: metrics.RunningObjective().update(**a),
        {"loss": torch.tensor(1.0), "batch_size": 1},
    ),
    "Hardness": (metrics.Hardness, {"of": None, "compute_on_cpu": False}),
    "Hardness.update": (lambda gramian: metrics.Hardness().update(gramian), {"gramian": torch.eye(2)[None]}),
    "MembershipAUC.update": (
        lambda **a: metrics.MembershipAUC().update(**a),
        {"losses": torch.ones(3), "is_member": True, "ids": None},
    ),
    "MembershipAUC.interval": (
        lambda **a: metrics.MembershipAUC().interval(**a),
        {"confidence": 0.9, "samples": 10, "seed": 0, "method": "bootstrap"},
    ),
    **{
        name: (getattr(metrics.functional, name), arguments)
        for name, arguments in {
            "js_divergence": {"p": TWO, "q": TWO},
            "js_to_references": {"scores": TWO, "references": [TWO], "unit": "nats"},
            "kl_to_references": {"scores": TWO, "references": TWO, "direction": "reverse"},
            "agreement": {"scores": TWO, "references": TWO},
            "log_odds_distance": {"scores": TWO, "references": TWO, "labels": [0, 1, 1]},
            "auc": {"members": ONE, "others": ONE, "interval": "delong", "confidence": 0.9, "samples": 10, "seed": 0},
            "tpr_at_fpr": {"members": ONE, "others": ONE, "fpr": 0.1},
            "balanced_accuracy": {"members": ONE, "others": ONE, "threshold": 0.5},
            "ks_test": {"losses": ONE, "other_losses": ONE},
            "lira_scores": {"scores": ONE, "out_scores": TWO.T, "in_scores": TWO.T, "spread": "all"},
            "u_lira": {"unlearned": TWO, "retrained": TWO, "spread": "all"},
            "klom": {"unlearned": TWO, "retrained": TWO, "bins": 3, "clip": 1.0, "eps": 1e-5},
            "average_gap": {"numbers": {"RA": 0.5}, "retrained": {"RA": 0.5}, "names": ["RA"]},
            "tow": {"accuracies": {"FA": 0.5, "RA": 1.0, "TA": 1.0}, "retrained": {"FA": 0.5, "RA": 1.0, "TA": 1.0}},
            "relearn_steps": {"accuracies": [0.5], "original": 0.5, "alpha": 0.1},
            "anamnesis_index": {"steps": 1, "retrained": 2},
            "calibration_error": {"scores": TWO, "labels": [0, 1, 1], "bins": 3, "norm": "l1"},
            "mean_estimate": {"values": ONE, "confidence": 0.9},
            "rate_estimate": {"hits": 1, "n": 2, "confidence": 0.9},
        }.items()
    },
    "JSToReference.update": (
        lambda **a: metrics.JSToReference().update(**a),
        {"scores": TWO, "references": TWO, "ids": None},
    ),
    "KSOfLosses.update": (
        lambda **a: metrics.KSOfLosses().update(**a),
        {"losses": ONE, "reference_losses": ONE, "ids": None},
    ),
    "KLOM.update": (lambda **a: metrics.KLOM().update(**a), {"unlearned": TWO, "retrained": TWO, "ids": None}),
    "ULiRA": (metrics.ULiRA, {"of": "auc", "spread": "all"}),
}


@pytest.mark.parametrize("name", DOORS)
def test_junk_is_taken_or_refused_in_words(name: str) -> None:
    door, good = DOORS[name]
    raw = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        door(**good)
        for argument in good:
            for what, junk in JUNK.items():
                try:
                    door(**{**good, argument: junk})
                except HAMUError as error:
                    assert str(error).startswith("Expected "), error
                    assert "object at 0x" not in str(error) and "tensor(" not in str(error), error
                except Exception as error:
                    raw.append(f"{argument}={what}: {type(error).__name__}: {error}"[:150])
    assert raw == []


def test_loaders_are_no_settings() -> None:
    """What is a loader by mistake is told by its type."""
    loader = DataLoader(torch.ones(4, 2), batch_size=2)
    for argument in ("rule", "target", "verify", "schedule", "objective"):
        with pytest.raises(HAMUError, match=rf"Expected `{argument}` .*but got a DataLoader"):
            callbacks.HAMUCallback(LOADER, **{argument: loader})
