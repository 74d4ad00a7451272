"""A batch through the module without a trace: where batches come from, and what a pass leaves as it was."""

from hamu_lightning.callbacks.passes._absent import AbsentData, HoldsData
from hamu_lightning.callbacks.passes._bare_pass import BarePass, check_module, without_trainer
from hamu_lightning.callbacks.passes._batches import count_samples, split_batch
from hamu_lightning.callbacks.passes._batchnorm import FrozenBatchNorm, batchnorm_frozen
from hamu_lightning.callbacks.passes._classes import read_labels
from hamu_lightning.callbacks.passes._forget_pass import (
    ForgetPass,
    NoLossError,
    Recording,
    check_loss,
)
from hamu_lightning.callbacks.passes._guard import ModuleGuard
from hamu_lightning.callbacks.passes._isolated_pass import IsolatedPass, detached_loss
from hamu_lightning.callbacks.passes._loaders import MeasuringLoader, copied, spread, twin_loader
from hamu_lightning.callbacks.passes._look import Look
from hamu_lightning.callbacks.passes._objective import is_wrapped, unwrap_step, with_objective, wrap_step
from hamu_lightning.callbacks.passes._overlap import count_shared_samples, read_positions
from hamu_lightning.callbacks.passes._samples import split_forget
from hamu_lightning.callbacks.passes._sources import (
    check_can_be_read,
    check_disjoint,
    find_loader,
    is_data,
    name_sources,
)
from hamu_lightning.callbacks.passes._streams import ForgetStream

__all__ = [
    "AbsentData",
    "BarePass",
    "ForgetPass",
    "ForgetStream",
    "FrozenBatchNorm",
    "MeasuringLoader",
    "HoldsData",
    "IsolatedPass",
    "Look",
    "ModuleGuard",
    "NoLossError",
    "Recording",
    "batchnorm_frozen",
    "check_can_be_read",
    "check_disjoint",
    "check_loss",
    "check_module",
    "copied",
    "count_samples",
    "count_shared_samples",
    "detached_loss",
    "find_loader",
    "is_data",
    "is_wrapped",
    "name_sources",
    "read_labels",
    "read_positions",
    "split_batch",
    "split_forget",
    "spread",
    "twin_loader",
    "unwrap_step",
    "with_objective",
    "without_trainer",
    "wrap_step",
]
