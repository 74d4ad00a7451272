"""The errors of hamu_lightning: one tree, so that `except HAMUError` catches all that we raise."""


class HAMUError(Exception):
    """Base class of every error that hamu_lightning raises itself."""


class HAMUValueError(HAMUError, ValueError):
    """An argument has a value, shape or type that cannot be used."""


class HAMUStateError(HAMUError, RuntimeError):
    """A call came at a moment when it cannot be answered, for instance `step()` without a forget gradient."""
