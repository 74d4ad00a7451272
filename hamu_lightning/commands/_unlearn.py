"""`hamu-lightning unlearn`: from weights and a file of ids to weights without them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from hamu_lightning.callbacks import StopReason
from hamu_lightning.commands._weights import load_weights
from hamu_lightning.evidence import EvaluateUnlearning
from hamu_lightning.evidence import report as write_report

if TYPE_CHECKING:
    from hamu_lightning.commands._project import Project


def unlearn(
    project: Project,
    weights: str,
    forget_ids: str | None = None,
    by: str | None = None,
    missing: Literal["raise", "warn"] = "raise",
    out: str = "unlearned.ckpt",
    report: str | None = None,
) -> int:
    """Make a trained model forget samples, and save what it is then.

    Model, data and Trainer are said as to LightningCLI: --config, --model, --data, --trainer, in YAML or as options;
    what HAMUCallback takes is --hamu, such as --hamu.target. The exit code is 0 where the fit has done what was asked,
    1 where it ended before the target. Example: hamu-lightning unlearn --config config.yaml --weights best.ckpt
    --forget-ids ids.csv --by customer_id --report out

    Args:
        project: Module, data and Trainer.
        weights: Checkpoint or state dict of the trained model; weights alone are read.
        forget_ids: Text or CSV file of ids. Default: what the data themselves forget.
        by: Column or attribute that holds the ids. Default: ids are positions.
        missing: What to do about ids that no sample has.
        out: Where the weights go.
        report: Folder for a report.

    Returns:
        The exit code.
    """
    load_weights(project.module, weights)
    before = copy.deepcopy(project.module.state_dict())
    data, callback = project.load_data(forget_ids, by, missing), project.find_callback()
    numbers = EvaluateUnlearning()
    if report is not None:
        project.trainer.callbacks.append(numbers)  # type: ignore[attr-defined]
    project.trainer.fit(project.module, datamodule=data)
    project.trainer.save_checkpoint(out, weights_only=True)  # without what the optimizer and callbacks remember
    print(out)
    if report is not None and project.trainer.is_global_zero:
        page = write_report(
            callback,
            report,
            evaluation=numbers,
            weights_before=before,
            weights_after=project.module,
            logs=project.trainer.log_dir,
            names=getattr(data, "names", None),
        )
        print(page)
    return 0 if callback.stop_reason is StopReason.TARGET_REACHED or not callback.settings.has_target else 1
