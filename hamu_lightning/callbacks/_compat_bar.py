"""What of Lightning's progress bars we have to know. Found on Lightning 2.6."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class BarPatch:
    """Puts entries before the others in the progress bar, of whatever kind that is.

    lightning/pytorch/callbacks/progress: all bars ask `get_metrics` of the object for what they show.
    """

    def __init__(self, trainer: Trainer, entries: Callable[[], dict[str, str]]) -> None:
        bar: Any = trainer.progress_bar_callback
        self._bar = bar
        if bar is not None:
            self._before, original = vars(bar).get("get_metrics"), bar.get_metrics
            bar.get_metrics = lambda *args: {**entries(), **original(*args)}

    def remove(self) -> None:
        """Take them away again."""
        if self._bar is not None:
            vars(self._bar).pop("get_metrics", None)
            vars(self._bar).update({} if self._before is None else {"get_metrics": self._before})


def when_bar_is_closed(trainer: Trainer, say: Callable[[], None]) -> None:
    """Call a function at the end of the fit, once nothing is drawn over what it prints; at once without a bar.

    RichProgressBar closes in its `teardown`, which comes after ours, TQDMProgressBar before.
    """
    bar: Any = trainer.progress_bar_callback
    if bar is None:
        say()
        return
    original = bar.teardown

    def teardown(*args: Any, **kwargs: Any) -> None:
        vars(bar).pop("teardown", None)
        original(*args, **kwargs)
        say()

    bar.teardown = teardown
