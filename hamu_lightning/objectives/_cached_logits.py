"""The reference's logits, computed once and kept on disk: the memory of one model."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.checks import check_choice, check_type
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.files import UNFINISHED, hash_weights, read_tensors, write_new, write_whole
from hamu_lightning.objectives._base import BatchPass
from hamu_lightning.objectives._keys import Key, as_key, mix
from hamu_lightning.objectives._outputs import Outputs, as_outputs
from hamu_lightning.objectives._packed import check_padded
from hamu_lightning.objectives._prediction import Prediction, make_prediction
from hamu_lightning.objectives._reference import Reference, evaluating

Kept: TypeAlias = Literal["logits", "likelihoods"]
_HEADER = "cached_logits.json"
_OURS = re.compile(r"[0-9a-f]{16}\.pt")
_CURE = "Delete the logits, CachedLogits(folder).delete(), and `fill` again with the model before unlearning."


class CachedLogits(Reference):
    """The reference's logits of each sample, from files: no second model, and no second forward pass.

        cache = CachedLogits("reference")
        cache.fill(module, forget_loader).fill(module, retain_loader)     # before the fit
        HAMUCallback(objective=NPO(reference=cache), retain_objective=ReferenceKL(cache), ...)

    Of texts only the rows that predict a label are kept; `keep="likelihoods"` keeps one number for each sample, which
    is all that `NPO`, `DPO`, `AltPO` and `IdkDPO` ask for.

    A sample is found by what its tensors hold, or by the number that `key` gives it. Padding on either side, which an
    `attention_mask` tells, makes no other sample, but random augmentation does; those that are not there are an error.
    Packed sequences are refused. With the batches, the device and the precision of
    the fit the logits are those of a `FrozenCopy` bit for bit; in other batches of the same samples, up to the rounding
    of the forward pass. Files are mapped into memory, and read as they are needed.

    A folder belongs to one model, whose weights are hashed. Several processes may fill it at once. It holds no samples,
    but what the model that remembers said about them, and who has the folder can tell whether a sample is in it:
    `delete()` it when unlearning is done. The numbers by which samples are found are salted, with a salt drawn for the
    folder, so that nothing outside of it can be matched with them.

    Args:
        folder: Where the files are; one for each batch.
        key: A function of the batch that returns a number for each sample, int64 `[N]`, such as the index in the data
            set. One folder then belongs to one data set.
        keep: What `fill` writes: "logits", or "likelihoods", the log-likelihood of each sample's labels.

    Raises:
        HAMUValueError: If an argument is of another kind.
    """

    is_start = None
    _cure = "Another augmentation, or another precision than that of `fill`, can do that."

    def __init__(self, folder: str | Path, *, key: Key | None = None, keep: Kept = "logits") -> None:
        check_choice("keep", keep, get_args(Kept))
        self._keep: Kept = keep
        self._folder = Path(check_type("folder", folder, str | PathLike, "a folder"))
        self._key = as_key(key)
        self._rows: dict[int, Tensor] = {}
        self._header: dict[str, Any] = {}

    def fill(self, module: nn.Module, batches: Iterable[Any], *, outputs: Outputs | None = None) -> CachedLogits:
        """Compute what is not there yet, with the module as it is, in evaluation mode.

        Args:
            module: The module before unlearning.
            batches: A loader; its batches go to the module's device.
            outputs: As for the objective.

        Raises:
            HAMUValueError: If the folder holds the logits of another model, or something else than `keep`, if logits
                are NaN, or sequences are packed.
            HAMUStateError: If a file in the folder is broken or not ours, or cannot be written.
        """
        outputs = as_outputs(outputs)
        device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
        check_type("batches", batches, Iterable, "a loader")
        self._begin(hash_weights(module.state_dict()))
        self._open()
        with torch.no_grad(), evaluating(module):
            for batch in batches:
                moved = _move(batch, device)
                keys = self._salted(moved)
                if not self._rows.keys() >= set(keys.tolist()):
                    self._write(keys.cpu(), self._read_model(module, moved, outputs))
        return self

    def delete(self) -> None:
        """Delete all files of the cache, those of interrupted writers too, and the folder if nothing else is in it."""
        self._rows, self._header = {}, {}
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path.name == _HEADER or _OURS.fullmatch(path.name) or path.name.endswith(UNFINISHED):
                path.unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    @override
    def using(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        raise HAMUStateError(
            "Expected a reference that is a model, but CachedLogits holds logits only. Use FrozenCopy() or "
            "AdaptersDisabled()."
        )

    @override
    def logits_for(self, prediction: Prediction, batch: BatchPass, outputs: Outputs) -> Tensor:
        rows = self._find(batch)
        if self._header["keep"] != "logits":
            raise HAMUStateError(
                f"Expected logits in {str(self._folder)!r}, but it holds one number for each sample. Fill a folder of "
                "CachedLogits(folder, keep='logits') for this objective; NPO and DPO can do with the numbers."
            )
        counts, expected = [len(row) for row in rows], prediction.count_places().tolist()
        if counts != expected or rows[0].shape[1] != prediction.logits.shape[-1]:
            raise HAMUValueError(
                f"Expected stored logits of as many places as there are labels, {expected}, and "
                f"{prediction.logits.shape[-1]} classes, but got {counts} and {rows[0].shape[1]}. Call `fill` with the "
                "labels and the `outputs` of the fit."
            )
        found = rows[0].new_zeros(prediction.logits.shape, device=prediction.mask.device)
        found[prediction.mask] = self._checked(torch.cat(rows)).to(found)
        return found

    @override
    def likelihoods_for(self, prediction: Prediction, batch: BatchPass, outputs: Outputs) -> Tensor:
        rows = self._find(batch)
        if self._header["keep"] == "logits":
            return super().likelihoods_for(prediction, batch, outputs)
        return self._checked(torch.stack(rows)).to(prediction.mask.device)

    def _read_model(self, module: nn.Module, batch: Any, outputs: Outputs) -> dict[str, Tensor]:
        """What a file holds of a batch."""
        logits, labels = outputs(module, batch)
        check_padded(batch, labels.shape, "CachedLogits, which finds samples by their rows")
        prediction = make_prediction(logits, labels)
        kept = prediction.logits[prediction.mask]
        if bool(kept.isnan().any()):
            raise HAMUValueError("Expected the module's logits to be numbers, but some are NaN. Check its weights.")
        if self._keep == "likelihoods":
            return {"likelihoods": prediction.sum_over_places(prediction.log_likelihoods()).cpu()}
        return {"logits": kept.cpu(), "counts": prediction.count_places().cpu()}

    def _find(self, batch: BatchPass) -> list[Tensor]:
        """What is stored of each sample of a batch."""
        if not self._rows:
            self._open()
        keys = self._salted(batch.batch)
        rows = [self._rows.get(key) for key in keys.tolist()]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            raise HAMUStateError(
                f"Expected the reference's logits of all {len(rows)} samples in {str(self._folder)!r}, but "
                f"{len(rows) - len(found)} are not there. Call `fill` with the same data before the fit; with random "
                "augmentation or padding use `key=`, or FrozenCopy()."
            )
        return found

    def _checked(self, numbers: Tensor) -> Tensor:
        if bool(numbers.isnan().any()):
            raise HAMUStateError(
                f"Expected the logits in {str(self._folder)!r} to be numbers, but some are NaN. {_CURE}"
            )
        return numbers

    def __getstate__(self) -> dict[str, Any]:
        """The files stay where they are."""
        return {**self.__dict__, "_rows": {}, "_header": {}}

    def _begin(self, model: str) -> None:
        """Take the folder for a model, unless it is another one's."""
        text = json.dumps({"salt": secrets.randbits(63), "model": model, "keep": self._keep}).encode()
        is_empty = not any(self._folder.glob("*.pt"))
        if is_empty:
            write_new(self._folder / _HEADER, lambda file: file.write(text))
        self._read_header()
        if is_empty and (self._header["model"], self._header["keep"]) != (model, self._keep):  # nothing was written
            write_whole(self._folder / _HEADER, lambda file: file.write(text))
            self._read_header()
        if self._header["model"] != model:
            raise HAMUValueError(
                f"Expected {str(self._folder)!r} to be for the logits of this module, but it holds those of one with "
                "other weights. Give it a folder of its own, or delete the old logits, CachedLogits(folder).delete()."
            )
        if self._header["keep"] != self._keep:
            raise HAMUValueError(
                f"Expected {str(self._folder)!r} to be for {self._keep}, but it holds {self._header['keep']}. Give "
                "them a folder of their own."
            )

    def _read_header(self) -> None:
        path = self._folder / _HEADER
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            self._header = {"salt": int(header["salt"]), "model": str(header["model"]), "keep": str(header["keep"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HAMUStateError(
                f"Expected {str(path)!r} to say whose logits these are, but it cannot be read. {_CURE}"
            ) from error

    def _open(self) -> None:
        for path in sorted(self._folder.glob("*.pt")):
            if not self._header:
                self._read_header()
            self._read(path)

    def _read(self, path: Path) -> None:
        kind = "logits that CachedLogits wrote"
        stored = read_tensors(path, kind, _CURE)
        match stored:
            case {"keys": Tensor() as keys, "logits": Tensor() as logits, "counts": Tensor() as counts, **rest} if (
                rest == {"model": self._header["model"]}
                and (logits.dim(), keys.shape, int(counts.sum())) == (2, counts.shape, len(logits))
            ):
                self._rows.update(zip(keys.tolist(), torch.split(logits, counts.tolist()), strict=True))
            case {"keys": Tensor() as keys, "likelihoods": Tensor() as likelihoods, **rest} if (
                rest == {"model": self._header["model"]} and keys.shape == likelihoods.shape
            ):
                self._rows.update(zip(keys.tolist(), likelihoods, strict=True))
            case _:
                raise HAMUStateError(f"Expected {str(path)!r} to be {kind} for this folder, but it is not. {_CURE}")

    def _write(self, keys: Tensor, found: dict[str, Tensor]) -> None:
        path = self._folder / f"{int(mix(keys).sum()) % 2**64:016x}.pt"
        content = {"keys": keys, **found, "model": self._header["model"]}
        write_whole(path, lambda file: torch.save(content, file))
        self._read(path)

    def _salted(self, batch: Any) -> Tensor:
        """The numbers by which the samples of a batch are found here."""
        return mix(self._key(batch) ^ self._header.get("salt", 0))


def _move(batch: Any, device: torch.device) -> Any:
    """The batch on a device; what is neither a tensor nor a plain container stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _move(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_move(value, device) for value in batch]
    return batch
