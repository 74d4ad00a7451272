"""The reference's logits, computed once and kept on disk: the memory of one model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives._base import BatchPass
from hamu_lightning.objectives._keys import Key, as_key, mix
from hamu_lightning.objectives._outputs import Outputs, as_outputs
from hamu_lightning.objectives._reference import Reference, evaluating


class CachedLogits(Reference):
    """The reference's logits of each sample, from files: no second model, and no second forward pass.

        cache = CachedLogits("reference")
        cache.fill(module, forget_loader).fill(module, retain_loader)     # before the fit
        HAMUCallback(objective=NPO(reference=cache), retain_objective=ReferenceKL(cache), ...)

    A sample is found by what its tensors hold, or by the number that `key` gives it. Random augmentation and other
    padding make other samples; those that are not there are an error. With the batches, the device and the precision of
    the fit the logits are those of a `FrozenCopy` bit for bit; in other batches of the same samples, up to the rounding
    of the forward pass. Files are mapped into memory, and read as they are needed.

    Args:
        folder: Where the files are; one for each batch.
        key: A function of the batch that returns a number for each sample, int64 `[N]`, such as the index in the data
            set. One folder then belongs to one data set.
    """

    def __init__(self, folder: str | Path, *, key: Key | None = None) -> None:
        self._folder, self._key = Path(folder), as_key(key)
        self._rows: dict[int, Tensor] = {}

    def fill(self, module: nn.Module, batches: Iterable[Any], *, outputs: Outputs | None = None) -> CachedLogits:
        """Compute what is not there yet, with the module as it is, in evaluation mode.

        Args:
            module: The module before unlearning.
            batches: A loader; its batches go to the module's device.
            outputs: As for the objective.
        """
        outputs = as_outputs(outputs)
        device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open()
        with torch.no_grad(), evaluating(module):
            for batch in batches:
                moved = _move(batch, device)
                keys = self._key(moved)
                if not self._rows.keys() >= set(keys.tolist()):
                    self._write(keys.cpu(), outputs(module, moved)[0].cpu())
        return self

    @override
    def using(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        raise HAMUStateError(
            "Expected a reference that is a model, but CachedLogits holds logits only. Use FrozenCopy() or "
            "AdaptersDisabled()."
        )

    @override
    def logits(self, batch: BatchPass, outputs: Outputs) -> Tensor:
        keys = self._key(batch.batch)
        if not self._rows:
            self._open()
        rows = [self._rows.get(key) for key in keys.tolist()]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            raise HAMUStateError(
                f"Expected the reference's logits of all {len(rows)} samples in {str(self._folder)!r}, but "
                f"{len(rows) - len(found)} are not there. Call `fill` with the same data before the fit; with random "
                "augmentation or padding use `key=`, or FrozenCopy()."
            )
        if len({row.shape for row in found}) > 1:
            raise HAMUValueError(
                "Expected stored logits of one shape in a batch, but got "
                f"{sorted({tuple(row.shape) for row in found})}. Pad all samples to the same length."
            )
        return torch.stack(found).to(keys.device)

    def __getstate__(self) -> dict[str, Any]:
        """The files stay where they are."""
        return {**self.__dict__, "_rows": {}}

    def _open(self) -> None:
        for path in sorted(self._folder.glob("*.pt")):
            self._read(path)

    def _read(self, path: Path) -> None:
        stored = torch.load(path, mmap=True, weights_only=True)
        self._rows.update(zip(stored["keys"].tolist(), stored["logits"], strict=True))

    def _write(self, keys: Tensor, logits: Tensor) -> None:
        path = self._folder / f"{int(mix(keys).sum()) % 2**64:016x}.pt"
        part = path.with_suffix(f".{os.getpid()}")  # several processes may fill one folder
        torch.save({"keys": keys, "logits": logits.contiguous()}, part)
        part.replace(path)
        self._read(path)


def _move(batch: Any, device: torch.device) -> Any:
    """The batch on a device; what is neither a tensor nor a plain container stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _move(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_move(value, device) for value in batch]
    return batch
