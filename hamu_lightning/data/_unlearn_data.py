"""UnlearnData: a project's own data, without what is to be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import override

from hamu_lightning.callbacks.goals import explain_difference, with_transforms_of
from hamu_lightning.callbacks.passes import count_shared_samples
from hamu_lightning.checks import check_choice, check_count, check_optional, check_type, describe
from hamu_lightning.data._forwarding import Forwarding, find_base
from hamu_lightning.data._ids import Ids, read_ids
from hamu_lightning.data._loaders import check_is_one_loader, load_in_order, load_retained
from hamu_lightning.data._parting import Parting, Wish, count_named, part
from hamu_lightning.errors import HAMUError, HAMUValueError
from hamu_lightning.loaders import even_batch_size, length_of, load_like
from hamu_lightning.wording import count

# The largest batch to forget, as where the callback loads a Dataset for a target.
_LARGE = 256


class UnlearnData(Forwarding):
    """The data of an existing project, parted by ids: what is retained is trained on, the rest is to be forgotten.

    `train_dataloader()` is the project's own without the samples to forget: its batch size, workers, `collate_fn`,
    sampler, `drop_last` and generator. `forget_dataloader()` and `holdout_dataloader()` are found by `HAMUCallback`.
    All else (`prepare_data`, `setup`, `teardown`, the state, other loaders, transfer hooks, attributes) is the
    project's. The module, the Trainer and the callbacks stay as they are:

        Trainer(callbacks=[..., HAMUCallback(target=Unseen())]).fit(module, UnlearnData(data, forget="ids.csv"))

    Args:
        datamodule: The project's DataModule, its training loader, or the Dataset that it trains on.
        forget: Which samples: positions (from 0), a mask with one of True and False for each sample, values of `by`, or
            the path of a text or CSV file with one id in each line or in the column `by`; of a stream, or else, a
            function that is true for a sample to forget. A mapping from names to these means several requests.
        by: What ids are: the name of a column or attribute that has a value for each sample (`"customer_id"`,
            `"targets"`, `"samples"` of an ImageFolder: path or name of the file), the number of a tensor of a
            `TensorDataset`, the values themselves in the order of the Dataset, or a function of the Dataset that
            returns them. It is looked for in tables, lists of records, subsets, unions and wrappers too. All samples
            with the value are forgotten. None for positions.
        holdout: Data that the model was never trained on: a loader, a Dataset, or, said as `forget` says it, samples of
            the training data; these are then not trained on either. Default: the project's validation loader.
        missing: What to do about ids that no sample has: "raise" or "warn".
        batch_size: Of a Dataset that is given in the place of a DataModule.
        forget_batch_size: Of the forget loader; default: all of it in one batch, or in equal ones of at most 256
            samples.
        make_loader: Makes the loader of the retained Dataset, where the project's sampler is of its own kind.

    Attributes:
        datamodule: What was given.

    Raises:
        HAMUValueError: If an argument is of another kind; when the data are first loaded, if an id or column is not
            there, a sample is both forgotten and held out, or the training loader cannot be made for a part of it.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])), batch_size=2)
        >>> data = UnlearnData(loader, forget=[2], by=1)  # the samples whose second tensor is 2
        >>> len(data.train_dataloader()), data.names
        (2, {0: 2, 1: 2})
    """

    def __init__(
        self,
        datamodule: LightningDataModule | DataLoader | Dataset,  # type: ignore[type-arg]  # for LightningCLI
        forget: Any,
        *,
        by: Any = None,
        holdout: Any = None,
        missing: Literal["raise", "warn"] = "raise",
        batch_size: int | None = None,
        forget_batch_size: int | None = None,
        make_loader: Callable[[Any], DataLoader] | None = None,  # type: ignore[type-arg]
    ) -> None:
        super().__init__(datamodule)
        self._by, self._missing, self._make_loader = by, missing, make_loader
        self._batch_size = check_optional(check_count, "batch_size", batch_size)
        self._forget_batch_size = check_optional(check_count, "forget_batch_size", forget_batch_size)
        check_choice("missing", missing, ("raise", "warn"))
        check_type("make_loader", make_loader, Callable | None, "a function of the retained Dataset")
        self._check_source()
        self._requests = {name: self._read(name, ids) for name, ids in _named(forget).items()}
        self._holdout = holdout if holdout is None or _is_data(holdout) else None
        is_chosen = holdout is not None and self._holdout is None
        self._holdout_wish = self._read("holdout", holdout) if is_chosen else None
        if holdout is not None and find_base(datamodule) is None:
            self.__dict__["val_dataloader"] = self.holdout_dataloader
        # The training loader as the project made it last, what nobody has taken yet of that, and its parts.
        self._loader: DataLoader[Any] | None = None
        self._ready: DataLoader[Any] | None = None
        self._parting: Parting | None = None

    @override
    def setup(self, stage: str) -> None:
        """Set the project's data up, and find the ids in them: what is wrong is said before a fit says anything."""
        if find_base(self.datamodule) is not None:
            self.datamodule.setup(stage)
        if stage == "fit":
            try:
                self._ready = self._load()[0]
            except HAMUError:
                raise
            except Exception:  # of a loader that cannot be made yet; the Trainer asks again
                self._ready = None

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return the project's training loader, of what is retained."""
        loader, parting = self._load()
        if self._make_loader is not None:
            return self._make_loader(parting.retain)
        if isinstance(parting.retain, IterableDataset):
            return load_in_order(parting.retain, loader, drop_last=loader.drop_last, generator=loader.generator)
        return load_retained(loader, parting.retain)

    def forget_dataloader(self) -> DataLoader[Any]:
        """Return a shuffled loader of what is to be forgotten, of all requests together.

        Where the Datasets have an attribute `transform`, it has that of the held-out data: augmentation makes losses
        higher, and a target is reached before anything is forgotten.
        """
        return self._load_forgotten(self._parted.forget, self._find_held_out())

    def forget_dataloaders(self) -> dict[str, DataLoader[Any]]:
        """Return one for each request, by name."""
        held_out = self._find_held_out()
        return {name: self._load_forgotten(data, held_out) for name, data in self._parted.requests.items()}

    def holdout_dataloader(self) -> Any:
        """Return a loader of what was never trained on; None where only the Trainer knows the validation loader."""
        if isinstance(self._holdout, DataLoader):
            return self._holdout
        held = self._parted.holdout if self._holdout is None else self._holdout
        if held is None:
            return None
        assert self._loader is not None or self._holdout is not None
        return load_in_order(held, self._load()[0] if self._loader is None else self._loader)

    @property
    def names(self) -> dict[Any, Hashable]:
        """For the place of each sample in the data to forget the id that it was found by; for `evidence.report`.

        Of several requests also for the name of the request and the place in its own data.
        """
        return dict(self._parted.names)

    def parts(self) -> dict[str, Any]:
        """Return the data for `evidence.evaluate` and `evidence.attack`: "retain", "forget", "holdout" and "test".

        The retained samples, too, have the `transform` of the held-out ones, where there is one. Of several validation
        or test loaders none is taken. Before any fit the project's `prepare_data` and `setup("fit")` are called.
        """
        if self._loader is None and find_base(self.datamodule) is not None:
            self.prepare_data()
            self.setup("fit")
        retain, held_out = self.train_dataloader(), self._find_held_out()
        forget = self._load_forgotten(self._parted.forget, held_out)
        parts = {"retain": _as_held_out(retain, held_out), "forget": forget}
        more = {"holdout": held_out, "test": self._only("test_dataloader")}
        return parts | {name: loader for name, loader in more.items() if loader is not None}

    @property
    def _parted(self) -> Parting:
        return self._load()[1] if self._parting is None else self._parting

    def _load(self) -> tuple[DataLoader[Any], Parting]:
        """Ask the project for its training loader, and part its data."""
        loader, self._ready = self._ask() if self._ready is None else self._ready, None
        is_known = self._loader is not None and self._loader.dataset is loader.dataset
        self._loader = loader
        if not is_known or self._parting is None:
            strict = self._missing == "raise"
            self._parting = part(loader.dataset, self._requests, self._holdout_wish, self._by, strict)
            self._tell_overlap(self._parting)
        return loader, self._parting

    def _ask(self) -> DataLoader[Any]:
        source = self.datamodule
        if find_base(source) is not None:
            source = source.train_dataloader()
        elif not isinstance(source, DataLoader):
            is_stream = isinstance(source, IterableDataset)
            return DataLoader(source, batch_size=self._batch_size, shuffle=not is_stream)
        check_is_one_loader(source)
        return source  # type: ignore[no-any-return]

    def _load_forgotten(self, data: Dataset[Any], held_out: Any) -> DataLoader[Any]:
        loader, size = self._loader, length_of(data)
        assert loader is not None
        data = _as_held_out(data, held_out)
        if loader.batch_size is None and loader.batch_sampler is None:  # samples are ready batches
            return load_like(data, loader, batch_size=None, shuffle=size is not None)
        if size is None:
            return load_in_order(data, loader, **_given(batch_size=self._forget_batch_size))
        processes = 1 if self.trainer is None else self.trainer.world_size
        batch_size = self._forget_batch_size or even_batch_size(size, _LARGE, processes)
        return load_like(data, loader, batch_size=batch_size, shuffle=True)

    def _read(self, name: str, given: Any) -> Wish:
        if callable(given) and not hasattr(given, "__len__"):
            return given  # type: ignore[no-any-return]
        return read_ids(name, given, self._by if isinstance(self._by, str) else None)

    def _check_source(self) -> None:
        source, kinds = self.datamodule, LightningDataModule | DataLoader | Dataset
        is_datamodule = find_base(source) is not None
        if not (is_datamodule or isinstance(source, kinds) or hasattr(source, "column_names")):
            check_type("datamodule", source, kinds, "a DataModule, the training loader, or its Dataset")
        is_dataset = not (is_datamodule or isinstance(source, DataLoader))
        if is_dataset and self._batch_size is None:
            raise HAMUValueError(
                "Expected a size of batches for a Dataset, but got none. Give UnlearnData(dataset, ..., "
                "batch_size=64), or the training loader in its place."
            )
        if not is_dataset and self._batch_size is not None:
            raise HAMUValueError(
                f"Expected `batch_size` to go with a Dataset, but got {describe(type(source).__name__)}, which has its "
                "own. Set it there; that of the forget loader is `forget_batch_size`."
            )

    def _tell_overlap(self, parting: Parting) -> None:
        """Warn where the validation data hold what is to be forgotten, as far as it can be seen."""
        held_out = self._only("val_dataloader")
        if held_out is None:
            return
        shared = count_shared_samples(parting.forget, held_out)
        wishes = [wish for wish in self._requests.values() if isinstance(wish, Ids)]
        named = 0 if self._by is None else count_named(getattr(held_out, "dataset", None), wishes, self._by)
        if shared:
            rank_zero_warn(
                f"The validation data and what is to be forgotten share {count(shared, 'sample')} of one Dataset: they "
                "get worse as it is forgotten, which ends a fit with EarlyStopping. Hold other samples out."
            )
        elif named:
            of = "of the validation data"
            words = count(named, f"sample {of} has an id that is", f"samples {of} have ids that are")
            words += " to be forgotten. They may get worse as these are, which ends a fit with EarlyStopping."
            if self._holdout is None and self._holdout_wish is None:
                words += (
                    " A target that is measured on them comes out too high: UnlearnData(..., holdout=...) has other "
                )
                words += "data."
            rank_zero_warn(f"{words} Take them out.")

    def _find_held_out(self) -> Any:
        held_out = self.holdout_dataloader()
        return self._only("val_dataloader") if held_out is None else held_out

    def _only(self, name: str) -> Any:
        """The one loader of a hook; None where it gives several, or none as yet, as for tests in a fit."""
        try:
            loaders = vars(self)[name]()
        except Exception:  # other people's code may raise anything
            return None
        if isinstance(loaders, list | tuple) and len(loaders) == 1:
            return loaders[0]
        return None if isinstance(loaders, list | tuple | Mapping) else loaders


def _as_held_out(data: Any, held_out: Any) -> Any:
    """Data under the transforms of the held-out ones, if both have an attribute for it."""
    if held_out is not None and explain_difference(data, held_out):
        with suppress(HAMUValueError):
            return with_transforms_of(data, held_out, "forget set")
    return data


def _named(forget: Any) -> Mapping[str, Any]:
    requests = forget if isinstance(forget, Mapping) else {"forget": forget}
    if not requests or not all(isinstance(name, str) and name not in ("", "retain") for name in requests):
        raise HAMUValueError(
            f"Expected names of requests other than 'retain', but got {describe([*requests])}. "
            "Give UnlearnData(data, forget={'request-17': ids, ...})."
        )
    return requests


def _is_data(value: Any) -> bool:
    return isinstance(value, DataLoader | Dataset) or hasattr(value, "column_names")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
