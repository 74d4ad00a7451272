"""The report of a fit: what the callback knows, and what was measured besides."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hamu_lightning.callbacks import HAMUCallback
from hamu_lightning.checks import check_type
from hamu_lightning.evidence._logs import draw_logs
from hamu_lightning.evidence._page import Drawable, write_report
from hamu_lightning.evidence._record import hash_id, make_record
from hamu_lightning.evidence._rows import AttackRow, Finding
from hamu_lightning.evidence._scores import FORGET, Evaluation
from hamu_lightning.evidence._signature import sign
from hamu_lightning.evidence._weights import Weights


class Measured(Protocol):
    """What was measured before and after a fit, as by `EvaluateUnlearning`."""

    @property
    def before(self) -> Evaluation | None:
        """What the original said."""

    @property
    def after(self) -> Evaluation | None:
        """What the unlearned model says."""


_SETTINGS = ("rule", "schedule", "objective", "retain_objective", "stop_on", "verify", "guard", "passes", "steps")
_COUNTS = ("combined_steps", "left_out_steps", "forget_passes")


def report(
    callback: HAMUCallback,
    folder: str | Path,
    *,
    evaluation: Measured | None = None,
    before: Evaluation | None = None,
    after: Evaluation | None = None,
    references: Sequence[Evaluation] = (),
    attacks: Sequence[AttackRow] = (),
    audit: Sequence[Finding] = (),
    weights_before: Weights | None = None,
    weights_after: Weights | None = None,
    logs: str | Path | None = None,
    figures: Mapping[str, Drawable] | None = None,
    names: Mapping[Any, Any] | None = None,
    private_key: Any = None,
) -> Path:
    """Write the report of a fit: the record as JSON, one HTML page, and a section for a model card.

    Call it after `Trainer.fit`, in the main process. What is not given is said to be missing; without `before` and
    `after` the verdict is that nobody can tell.

    Args:
        callback: After its fit.
        folder: Where `hamu_record.json`, `report.html` and `model_card.md` go; files of these names are replaced.
        evaluation: The `EvaluateUnlearning` of the same fit, in place of the next two.
        before: What the original says of the data.
        after: What the unlearned model says.
        references: What models say that were trained without the forgotten data; three are enough.
        attacks: What attacks found.
        audit: Where forgotten data may still sit.
        weights_before: The original, a module or state dict, for hashes.
        weights_after: The unlearned model.
        logs: The folder of the Trainer's logger, `trainer.log_dir`: its files give pictures of the way.
        figures: More pictures for the page by title, such as those of `hamu_lightning.report`.
        names: For the place of a forgotten sample in its Dataset, or for request and place, what the page calls it, as
            `UnlearnData.names` has it. The record holds how many names there are, and none of them.
        private_key: Signs the record, see `sign`.

    Returns:
        The path of the page.

    Example:
        >>> import tempfile
        >>> from hamu_lightning import HAMUCallback, HAMUQ
        >>> callback = HAMUCallback(forget=[...], rule=HAMUQ(1e-3))
        >>> report(callback, tempfile.mkdtemp()).name  # after a fit
        'report.html'
    """
    check_type("callback", callback, HAMUCallback, "the HAMUCallback of a fit")
    if evaluation is not None:
        before, after = before or evaluation.before, after or evaluation.after
    called = _names(_requests(callback, after), names or {})
    record = make_record(
        requests={name: [*places] for name, places in called.items()},
        before=before,
        after=after,
        references=references,
        attacks=attacks,
        audit=audit,
        weights_before=weights_before,
        weights_after=weights_after,
        samples=callback.forgotten_samples,
        seeds=_seeds(callback),
        configuration={name: getattr(callback.settings, name) for name in _SETTINGS},
        run=_run(callback),
        n_ids={name: len({*places.values()}) for name, places in called.items() if names and places},
    )
    if private_key is not None:
        record = sign(record, private_key)
    pictures = {**({} if logs is None else draw_logs(logs)), **(figures or {})}
    return write_report(folder, record, figures=pictures, names=_by_hash(called, record))


def _requests(callback: HAMUCallback, after: Evaluation | None) -> dict[str, list[int]]:
    """The places of the forgotten samples by request, as far as they are known."""
    known = {name: table.position.tolist() for name, table in callback.forgotten_samples.items()}
    return known or ({} if after is None else {FORGET: after.parts[FORGET].ids.tolist()})


def _seeds(callback: HAMUCallback) -> dict[str, int]:
    everything = os.environ.get("PL_GLOBAL_SEED", "")  # where `seed_everything` keeps it
    return {"forget_stream": callback.settings.seed} | ({"everything": int(everything)} if everything else {})


def _run(callback: HAMUCallback) -> dict[str, Any]:
    reason = callback.stop_reason
    return {
        **{name: getattr(callback, name) for name in _COUNTS},
        "stop_reason": None if reason is None else reason.value,
        "stop_message": callback.stop_message,
        "summary": callback.summary,
    }


def _names(requests: Mapping[str, Sequence[int]], names: Mapping[Any, Any]) -> dict[str, dict[int, str]]:
    """For each request and the place of each of its samples what it is called: by default the place."""
    return {
        request: {place: str(names.get((request, place), names.get(place, place))) for place in places}
        for request, places in requests.items()
    }


def _by_hash(called: Mapping[str, Mapping[int, str]], record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What the page calls a sample by the hash of its place; of samples that share a name also the place."""
    salt, found = bytes.fromhex(record["salt"]), {}
    for request, names in called.items():
        often = Counter(names.values())
        found[request] = {
            hash_id(place, salt): name if often[name] == 1 else f"{name}, sample {place}"
            for place, name in names.items()
        }
    return found
