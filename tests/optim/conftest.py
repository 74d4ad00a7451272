"""What the tests of the wrapper share."""

from __future__ import annotations

import pytest

from tests.optim.doors import DOORS, Wrap, wrap_directly


@pytest.fixture(params=DOORS)
def wrap(request: pytest.FixtureRequest) -> Wrap:
    """Makes a HAMUOptimizer as the user holds it: the same contract in a plain loop, in Lightning and in Fabric."""
    return lambda *args, **kwargs: DOORS[request.param](wrap_directly(*args, **kwargs))
