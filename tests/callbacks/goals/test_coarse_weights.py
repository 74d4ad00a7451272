"""Weights of 16 bits: steps that their rounding swallows keep no promise."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from hamu_lightning import HAMUQ, HAMUCallback, VerifySteps
from hamu_lightning.callbacks import StopReason
from hamu_lightning.callbacks.goals._promises import GroupOutcome
from hamu_lightning.rules import RelativeQuota, RelativeRadius
from tests.callbacks.modules import Base, build, fit, make_data

FORGET = make_data(40, seed=9)


def test_weights_too_coarse_for_a_step_keep_no_promise() -> None:
    """In bfloat16 steps of a thousandth are rounded away: that is said before the first one, and ends the fit."""
    outcome = GroupOutcome(True, loss=1.0, promised=1e-5, due=0.0, measured=0.0, follow=True)
    assert not outcome.is_kept(0.5, slack=1e-4)
    assert GroupOutcome(True, loss=1.0, promised=1e-5, due=0.0, measured=0.0).is_kept(0.5, slack=1e-4)
    module = build(Base)
    before = [p.detach().clone() for p in module.parameters()]
    rule = HAMUQ(RelativeQuota(0.1), radius=RelativeRadius(1e-4))
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), rule, verify=VerifySteps(shrink=1e-2))
    with pytest.warns(UserWarning, match="The weights are bfloat16: .* Trainer\\(precision='bf16-mixed'\\)"):
        fit(module, hamu, precision="bf16-true")
    assert hamu.stop_reason is StopReason.PROMISES_BROKEN
    assert hamu.combined_steps == 0 and hamu.left_out_steps > 0
    assert all(
        torch.equal(a, b.float())
        for a, b in zip([p.bfloat16().float() for p in before], module.parameters(), strict=True)
    )
