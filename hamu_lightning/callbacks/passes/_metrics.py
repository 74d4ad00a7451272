"""The module's own metrics over the batches of one group: what they are logged with as `forget/<name>`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

_Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class StreamMetrics:
    """Twins of the metrics that the module logs, which see the batches of one group alone.

    What a pass does to a metric is put back, so that no metric of the module ever holds a whole epoch of the group. The
    calls of a pass are noted, and made again on the twins: `self.log(name, metric)` then reduces as the metric does.
    """

    def __init__(self) -> None:
        self._calls: dict[int, list[_Call]] = {}
        # With each twin its metric, whose identity no other one can take then.
        self._twins: dict[int, tuple[Metric, Metric]] = {}

    @contextmanager
    def noting(self, module: nn.Module) -> Iterator[None]:
        """Note how the metrics of a module are called, but not how they call themselves."""
        self._calls = {}
        with ExitStack() as stack:
            for metric in module.modules():
                if isinstance(metric, Metric):
                    stack.enter_context(self._noting_one(metric))
            yield

    @contextmanager
    def _noting_one(self, metric: Metric) -> Iterator[None]:
        before = {name: vars(metric).get(name) for name in ("forward", "update")}
        calls: list[_Call] = self._calls.setdefault(id(metric), [])
        methods: dict[str, Callable[..., Any]] = {name: getattr(metric, name) for name in before}
        depth = 0

        def noted(name: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                calls.append((name, _detached(args), dict(zip(kwargs, _detached(kwargs.values()), strict=True))))
            depth += 1
            try:
                return methods[name](*args, **kwargs)
            finally:
                depth -= 1

        vars(metric).update({name: partial(noted, name) for name in before})
        try:
            yield
        finally:
            for name, method in before.items():
                vars(metric).pop(name, None)
                if method is not None:
                    vars(metric)[name] = method

    def twin(self, metric: Metric, is_sample: bool) -> Metric | None:
        """The twin of a metric that was logged, after the calls of this pass; None where it was not called itself.

        Args:
            metric: The metric.
            is_sample: Whether the pass had samples; one without them only takes part.
        """
        calls = self._calls.pop(id(metric), [])
        if id(metric) not in self._twins:
            if not calls:
                return None
            with suppress(Exception):  # of a metric that cannot be copied
                self._twins[id(metric)] = metric, copy.deepcopy(metric)
                self._twins[id(metric)][1].reset()
        _, twin = self._twins.get(id(metric), (None, None))
        for name, args, kwargs in calls if twin is not None and is_sample else ():
            getattr(twin, name)(*args, **kwargs)
        return twin


def _detached(values: Any) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
