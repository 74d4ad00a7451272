"""The data that levels are measured on: read beside the passes of the fit, as the training data are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset

from hamu_lightning.callbacks import _compat_loaders
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.goals._targets import Target
from hamu_lightning.callbacks.goals._transforms import explain_difference, with_transforms_of
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader, count_shared_samples, is_data, read_positions
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import batch_size_of, in_order, load_like
from hamu_lightning.wording import count

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# So many samples are read one for one, or batches of a list whose samples cannot be counted beforehand; and so many in
# batches of one.
_MOST_SAMPLES, _MOST_LIST, _MOST_SINGLES = 50_000, 1000, 1000


class Reader:
    """Opens data, each once, and lets their workers go at the end.

    Args:
        trainer: The trainer, with its loaders set up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._open: dict[int, tuple[Any, Iterable[Any]]] = {}
        self._like: dict[int, Any] = {}

    def open(self, data: Any) -> Iterable[Any]:
        """The batches of a loader, of a Dataset (in those of the training data), or (None) of the validation data.

        Raises:
            HAMUMisconfigurationError: If there are no validation data, or nothing says how large a batch is.
        """
        if id(data) not in self._open:
            loader = self.find(data)
            try:
                batches: Iterable[Any] = MeasuringLoader(loader)
            except HAMUValueError:
                batches = loader  # nobody else reads it
            self._open[id(data)] = data, batches
        return self._open[id(data)][1]

    def find(self, data: Any, target: str = "Holdout") -> Any:
        """The loader that is read, where there is one for the data; `target` is named in errors."""
        like = self._like.get(id(data))
        if data is None:
            loader = self._validation_loader(target)
        else:
            loader = self._load_as_in_training(data) if is_data(data) else data
        return loader if like is None else with_transforms_of(loader, like)

    def find_undivided(self, data: Any, target: str = "Holdout") -> Any:
        """The same, of all of the data where each process has a part."""
        return undivided(self.find(data, target))

    def find_retain(self) -> Any:
        """The loader of the retain data; where not one alone gives them, the batches of the training loop."""
        train = _compat_loaders.train_loader_parts(self._trainer)
        if isinstance(train, Mapping):
            train = train.get("retain")
        is_one = train is not None and not isinstance(train, list | tuple)
        return train if is_one else _compat_loaders.train_batches(self._trainer)

    def take_held_out(self, data: Any, forget: Any, transform_like: str | None) -> str:
        """Take held-out data in, and warn where its losses do not compare with those of what is to be forgotten.

        Args:
            data: The data, as for `open`; read under the transforms of the forget set from now on where that is asked.
            forget: The loader of what is to be forgotten.
            transform_like: "forget"; for anything else they keep their own.

        Returns:
            The warning, or "".
        """
        self.warn_about_shared_samples(data, forget)
        if transform_like == "forget":
            with_transforms_of(self.find(data), forget)  # what cannot be done is refused at once
            self._like[id(data)] = forget
        difference = explain_difference(forget, self.find(data))
        if difference:
            rank_zero_warn(difference)
        return difference

    def close(self) -> None:
        """Let all workers go."""
        for _, batches in self._open.values():
            if isinstance(batches, MeasuringLoader):
                batches.close()

    def _validation_loader(self, target: str) -> Any:
        held_out = _compat_loaders.held_out_loader(self._trainer)
        if held_out is not None:
            return held_out
        loaders = self._trainer.val_dataloaders
        if isinstance(loaders, list | tuple) and len(loaders) == 1:
            loaders = loaders[0]
        if loaders is None or isinstance(loaders, list | tuple | Mapping):
            found = "has none" if loaders is None else f"has {len(loaders)} validation loaders"
            raise HAMUMisconfigurationError(
                f"Expected one validation loader for {target}() without data, but the Trainer {found} in this fit. "
                f"Pass trainer.fit(..., val_dataloaders=loader), or {target}(data)."
            )
        return loaders

    def warn_about_shared_samples(self, data: Any, forget: Any) -> None:
        """Warn where held-out data is trained on or to be forgotten as well, as far as it can be seen.

        Args:
            data: The held-out data, as for `open`.
            forget: The loader of what is to be forgotten.
        """
        for name, other, effect in (
            ("forget set", forget, "the target will run away as the model forgets"),
            ("training data", self.find_retain(), "the target is lower than the loss of samples never seen"),
        ):
            shared = count_shared_samples(self.find(data), other)
            if shared:
                rank_zero_warn(
                    f"The held-out data of the target and the {name} share {count(shared, 'sample')} of one Dataset: "
                    f"{effect}. Hold other samples out."
                )

    def _load_as_in_training(self, data: Any) -> DataLoader[Any]:
        like = self.find_retain()
        size = batch_size_of(like)
        if size is None:
            raise HAMUMisconfigurationError(
                "Expected to load held-out data in batches of the training loader's size, on which a loss may depend, "
                "but it has none to follow. Pass Holdout(DataLoader(data, batch_size=...))."
            )
        return load_like(data, like, batch_size=size)


@dataclass(frozen=True)
class Excerpt:
    """Some batches of a loader, anew at each `iter()`.

    Args:
        loader: The loader.
        numbers: Of the batches, ascending; None for all.
    """

    loader: MeasuringLoader
    numbers: Sequence[int] | None

    @property
    def samples(self) -> float:
        """How many samples the last batch had; NaN where that cannot be told."""
        return self.loader.samples

    def __iter__(self) -> Iterator[Any]:
        return self.loader.batches(numbers=self.numbers)


@dataclass(frozen=True)
class InOrder:
    """The samples behind a loader, in the same order at each reading where that is known.

    Attributes:
        batches: Their batches.
        positions: Where each stands in its Dataset; empty for a list of batches, whose samples are counted; None where
            no order is known.
        singles: Each in a batch of its own, where they are few; else None.
        is_excerpt: Whether they are a part of too many.
    """

    batches: MeasuringLoader
    positions: list[int] | None
    singles: Iterable[Any] | None = None
    is_excerpt: bool = False


def read_as_held_out(trainer: Trainer, target: object, forget: Any) -> Any:
    """The loader of what is to be forgotten, under the transforms of held-out data where the target asks for it.

    Args:
        trainer: The trainer, with its loaders set up.
        target: The target of what is to be forgotten; anything else leaves the loader as it is.
        forget: Its loader; None where the training loader brings its batches.

    Raises:
        HAMUValueError: If the Datasets have no attribute `transform`.
        HAMUMisconfigurationError: If the training loader brings the batches.
    """
    if not isinstance(target, Target) or target.transform_like != "holdout":
        return forget
    if forget is None:
        raise HAMUMisconfigurationError(
            'Expected a loader or Dataset to forget for transform_like="holdout", but the training loader brings its '
            "batches. Pass HAMUCallback(forget=loader_or_dataset, ...)."
        )
    return with_transforms_of(forget, Reader(trainer).find(target.data), "forget set")


def read_in_order(loader: Any) -> InOrder | None:
    """The samples behind a loader, 50,000 at most, spread over them; None where they cannot be read beside the fit."""
    positions = read_positions(loader)
    batches = read_beside(loader)
    if isinstance(batches, HAMUValueError):
        return None
    if positions is None:
        is_long = batches.length is None or batches.length > _MOST_LIST
        batches = MeasuringLoader(loader, most=_MOST_LIST) if is_long else batches
        return InOrder(batches, [] if isinstance(loader, list | tuple) else None, None, is_long)
    n = len(positions)
    chosen = positions if n <= _MOST_SAMPLES else [positions[i * n // _MOST_SAMPLES] for i in range(_MOST_SAMPLES)]
    data = loader.dataset if chosen == [*range(len(loader.dataset))] else Subset(loader.dataset, chosen)
    singles = one_by_one(loader, chosen) if n <= _MOST_SINGLES else None
    ordered = MeasuringLoader(load_like(data, loader, batch_size=loader.batch_size))
    return InOrder(ordered, chosen, singles, len(chosen) < n)


def undivided(loader: Any) -> Any:
    """All of the data of a loader of which each process has a part."""
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, DistributedSampler):
        if not isinstance(loader.dataset, IterableDataset):
            return load_like(loader.dataset, loader, batch_size=loader.batch_size)
    return loader


def read_beside(loader: Any) -> MeasuringLoader | HAMUValueError:
    """A second reader of a loader that others read as well; the reason where there can be none."""
    try:
        return MeasuringLoader(loader)
    except HAMUValueError as error:
        return error


def find_not_finite(forget_pass: ForgetPass, loader: Any, step: tuple[Any, ...]) -> str:
    """Which samples of a Dataset, or which batches, give no finite loss, in words; empty where it is not known.

    Args:
        forget_pass: What runs batches without a trace.
        loader: Their loader.
        step: What runs a batch, and the arguments of the retain batch.
    """

    def find(batches: Any) -> list[int]:
        forget_pass.measure(lambda module, mean_loss, batch: mean_loss(batches), *step)
        return forget_pass.not_finite

    is_loader = isinstance(loader, DataLoader)
    if not is_loader or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        is_list = isinstance(loader, list | tuple) and loader
        return f"; not finite in the batches at {shorten(find(MeasuringLoader(loader)))}" if is_list else ""
    n, size = len(loader.dataset), loader.batch_size
    batches = find(in_order(loader, num_workers=0))
    found = [i for b in batches for i in range(b * size, min((b + 1) * size, n))]
    if len(found) == n:
        return "; in no batch it is finite"
    try:
        single = find(one_by_one(loader, found))
    except Exception:  # some modules take no batch of one sample
        return f"; not finite in batches with the samples at {shorten(found)} of the Dataset"
    return f"; not finite in the samples at {shorten([found[i] for i in single] or found)} of the Dataset"


def one_by_one(loader: DataLoader[Any], positions: Iterable[int]) -> Iterable[Any]:
    """These samples of the Dataset behind a loader, each in a batch of its own."""
    return load_like(Subset(loader.dataset, [*positions]), loader, batch_size=1, num_workers=0)


def shorten(positions: list[int]) -> str:
    """A list of positions in words, the first ones of many."""
    more = f" and {len(positions) - 10} more" if len(positions) > 10 else ""
    return ", ".join(map(str, islice(positions, 10))) + more
