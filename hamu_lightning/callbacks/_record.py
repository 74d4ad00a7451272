"""What a callback has done so far, in numbers and words: read from its state, in a fit and after it."""

from __future__ import annotations

from typing import Any

from hamu_lightning.callbacks._settings import FitSettings
from hamu_lightning.callbacks.goals import StopReason


class Record:
    """What unlearning has done, of all fits with the same data to forget."""

    settings: FitSettings

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
