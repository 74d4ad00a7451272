"""What cannot work is refused at the start of the fit, as the trainer's own package would refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException

from hamu_lightning.callbacks import _compat
from hamu_lightning.errors import HAMUError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class HAMUMisconfigurationError(HAMUError, MisconfigurationException):
    """A setting of the Trainer, the module or the callback does not go together with unlearning."""


@contextmanager
def refusing(trainer: Trainer) -> Iterator[None]:
    """Let a refusal also be the MisconfigurationException of the trainer's own package, for who catches that one."""
    try:
        yield
    except HAMUMisconfigurationError as error:
        own = _compat.misconfiguration_exception(trainer)
        if isinstance(error, own):
            raise
        kind = type("HAMUMisconfigurationError", (HAMUMisconfigurationError, own), {"__module__": __name__})
        raise kind(str(error)).with_traceback(error.__traceback__) from error.__cause__
