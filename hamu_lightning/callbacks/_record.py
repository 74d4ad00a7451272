"""What a callback has done so far, in numbers and words, in a fit and after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hamu_lightning.callbacks._settings import FitSettings
from hamu_lightning.callbacks.goals import ForgottenSamples, StopReason


class Record:
    """What unlearning has done, of all fits with the same data to forget."""

    settings: FitSettings

    def __init__(self) -> None:
        super().__init__()
        self._summary: str | None = None
        self._forgotten_samples: dict[str, ForgottenSamples] = {}
        self._costs: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is read here."""
        raise NotImplementedError

    @property
    def forget_passes(self) -> int:
        """How many forget batches have gone through the module."""
        return int(self.state_dict().get("forget_passes", 0))

    @property
    def combined_steps(self) -> int:
        """How many optimizer steps have combined the two gradients and moved the weights."""
        return int(self.state_dict().get("combined_steps", 0))

    @property
    def left_out_steps(self) -> int:
        """How many combined steps were left out: non-finite numbers, overflow, learning rate 0, no retain loss."""
        return int(self.state_dict().get("left_out_steps", 0))

    @property
    def turns(self) -> dict[str, int]:
        """With a `schedule`: how many steps each of its rules was asked for, by the rule in words; else empty."""
        if self.settings.schedule is None:
            return {}
        counts = self.state_dict().get("turns", {}).get("counts", ())
        return dict(zip(map(str, self.settings.schedule.rules), counts, strict=False))

    @property
    def stop_reason(self) -> StopReason | None:
        """Why unlearning ended by itself; None if it did not."""
        reason = self.state_dict().get("stop", {}).get("reason")
        return None if reason is None else StopReason(reason)

    @property
    def stop_message(self) -> str | None:
        """The same in words, with numbers."""
        message: str | None = self.state_dict().get("stop", {}).get("message")
        return message

    @property
    def summary(self) -> str | None:
        """What the last fit did, in words: counts, the way of each loss, and a table where there are several groups."""
        return self._summary

    @property
    def forgotten_samples(self) -> dict[str, ForgottenSamples]:
        """After a fit with a target, for each group (`"forget"` where there is one): what became of each sample.

        `forgotten_samples["forget"].to_csv(path)` writes it. Of more than 50,000 samples a part is measured; there is
        no table where samples come in no order that is known, as in streams.
        """
        return self._forgotten_samples

    @property
    def mean_costs(self) -> Tensor | None:
        """`[n_protected, n_forget]`, means of `GroupCoefficients.costs` over the steps of the last fit."""
        return self._costs
