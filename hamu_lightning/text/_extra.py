"""What the extra `text` brings: found out before it is needed, and told in one way."""

from __future__ import annotations

from importlib.util import find_spec

from hamu_lightning.errors import HAMUError


class MissingTextExtraError(HAMUError, ImportError):
    """A package of the extra `text` is not installed."""


def check_installed(package: str, for_what: str) -> None:
    """Raise unless a package is installed.

    Args:
        package: Its name in an import.
        for_what: What needs it.

    Raises:
        MissingTextExtraError: If it is not.

    Example:
        >>> check_installed("torch", "the example")
    """
    if find_spec(package) is None:
        raise MissingTextExtraError(
            f"Expected {package} for {for_what}, but it is not installed. Run: pip install 'hamu_lightning[text]'"
        )
