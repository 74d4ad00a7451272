"""Machine unlearning for PyTorch Lightning by HAMU: hardness-aware multi-objective unlearning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hamu_lightning.callbacks import (
        Chance,
        HAMUCallback,
        Holdout,
        RetainGuard,
        SecondChoice,
        Unseen,
        VerifySteps,
        preflight,
        split_forget,
    )
    from hamu_lightning.data import UnlearnData
    from hamu_lightning.evidence import EvaluateUnlearning, attack
    from hamu_lightning.gramian import compute_gramian
    from hamu_lightning.methods import compare
    from hamu_lightning.optim import HAMUOptimizer
    from hamu_lightning.rules import HAMUQ, HAMUU

__version__ = "0.2.0"
__all__ = [
    "HAMUQ",
    "HAMUU",
    "Chance",
    "EvaluateUnlearning",
    "HAMUCallback",
    "HAMUOptimizer",
    "Holdout",
    "SecondChoice",
    "UnlearnData",
    "Unseen",
    "RetainGuard",
    "VerifySteps",
    "attack",
    "compare",
    "compute_gramian",
    "preflight",
    "split_forget",
]

# Resolved on first use (PEP 562): `import hamu_lightning.rules` must load neither Lightning nor a solver.
_HOMES = {
    "HAMUQ": "rules",
    "HAMUU": "rules",
    "Chance": "callbacks",
    "EvaluateUnlearning": "evidence",
    "HAMUCallback": "callbacks",
    "HAMUOptimizer": "optim",
    "Holdout": "callbacks",
    "SecondChoice": "callbacks",
    "UnlearnData": "data",
    "Unseen": "callbacks",
    "RetainGuard": "callbacks",
    "VerifySteps": "callbacks",
    "attack": "evidence",
    "compare": "methods",
    "compute_gramian": "gramian",
    "preflight": "callbacks",
    "split_forget": "callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
