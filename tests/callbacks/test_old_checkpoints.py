"""Checkpoints that version 0.1.0 wrote in the middle of fits go on to where its own resumed fits ended.

`tests/data/checkpoints_0_1_0.pt` holds for each case the checkpoint after 8 of 12 steps, and the weights and the counts
of the run that version 0.1.0 resumed from it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.objectives import NPO
from hamu_lightning.rules import Alternate, RelativeQuota, RelativeRadius, TargetQuota
from hamu_lightning.solvers import FeasibleDirection
from tests.callbacks.modules import Base, WithBatchNorm, WithDropout, build, fit, make_data

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of a resume in the middle of an epoch

FILE = Path(__file__).parents[1] / "data" / "checkpoints_0_1_0.pt"
RADIUS = RelativeRadius(1e-2)
AIM = HAMUQ(TargetQuota(9.0), radius=RelativeRadius(1e-3))


def loader(seed: int = 9, n: int = 24) -> DataLoader[Any]:
    return DataLoader(make_data(n, seed=seed), batch_size=8, shuffle=True)


CASES: dict[str, tuple[type[Base], Callable[[], HAMUCallback]]] = {
    "quota": (WithDropout, lambda: HAMUCallback(loader(), HAMUQ(1e-2, radius=RADIUS), stop_on=["infeasible"])),
    # What `target=9.0` meant then.
    "target": (WithBatchNorm, lambda: HAMUCallback(loader(), AIM, verify=True)),
    "groups": (
        Base,
        lambda: HAMUCallback(
            {"a": loader(), "b": loader(10)},
            FeasibleDirection({"a": 1e-3, "b": RelativeQuota(0.01)}, floor={"p": 0.0}, radius=RADIUS),
            protect={"p": loader(11)},
        ),
    ),
    "schedule": (Base, lambda: HAMUCallback(loader(), schedule=Alternate(max_epochs=1, max_steps=2))),
    "objective": (Base, lambda: HAMUCallback(loader(), HAMUQ(1e-2, radius=RADIUS), objective=NPO(beta=0.1))),
}


def run(name: str, **settings: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Fit, and return the weights and the counts at the end."""
    kind, make = CASES[name]
    module, hamu = build(kind), make()
    fit(module, hamu, *settings.pop("more", ()), max_epochs=2, **settings)
    counts = {n: getattr(hamu, n) for n in ("forget_passes", "combined_steps", "left_out_steps")}
    return module.state_dict(), counts


@pytest.mark.parametrize("name", CASES)
def test_they_go_on(name: str, tmp_path: Path) -> None:
    saved = torch.load(FILE, weights_only=True)[name]
    torch.save(saved["checkpoint"], tmp_path / "old.ckpt")
    weights, counts = run(name, ckpt_path=tmp_path / "old.ckpt")
    assert counts == saved["counts"]
    # Written on another machine: sums in float32 may be taken in another order there.
    assert_close(weights, saved["weights"], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(weights[key], saved["checkpoint"]["state_dict"][key]) for key in weights)
