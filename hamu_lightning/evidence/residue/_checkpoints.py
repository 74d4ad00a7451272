"""What is in a checkpoint, read without running anything of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.evidence import Finding
from hamu_lightning.evidence.residue._state import STATE_KEY, strip
from hamu_lightning.files import read_tensors

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_DELETE = "Delete it, and its copies and backups"
_SCRUB = "`hamu-lightning scrub FOLDER --apply` takes it out"
_MOMENTS = "Save without it (`save_weights_only=True`), or train on with a fresh optimizer."


@dataclass(frozen=True)
class Checkpoint:
    """What there is to know of one file; `content` is None where it could not be read safely."""

    path: Path
    content: Mapping[str, Any] | None
    time: float

    @property
    def is_beside(self) -> bool:
        """Whether it is what `HAMUTrainerMixin` keeps beside a checkpoint of transformers: a state, and no weights."""
        return {*(self.content or {})} == {"optimizer", "objective", "draw", "passes"}

    @property
    def state(self) -> Mapping[str, Any] | None:
        """The state of a HAMUCallback or a HAMUTrainerMixin, if there is one."""
        if self.is_beside:
            return self.content
        callbacks = (self.content or {}).get("callbacks")
        state = callbacks.get(STATE_KEY) if isinstance(callbacks, Mapping) else None
        return state if isinstance(state, Mapping) else None

    @property
    def steps(self) -> int:
        """After how many combined steps it was written; -1 without a state that says so."""
        steps = (self.state or {}).get("combined_steps", -1)
        return steps if isinstance(steps, int) else -1


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a file that `torch.save` wrote, with `weights_only=True`."""
    try:
        content: Mapping[str, Any] | None = read_tensors(path, "a checkpoint", "Look at it where it was made.")
    except (HAMUStateError, OSError):
        content = None
    return Checkpoint(path, content, path.stat().st_mtime)


def judge_checkpoints(found: Sequence[Checkpoint], folder: Path) -> Iterator[Finding]:
    """Say what each checkpoint holds. Those with the most combined steps count as the unlearned model."""
    most = max((checkpoint.steps for checkpoint in found), default=-1)
    began = min((checkpoint.time for checkpoint in found if checkpoint.steps >= 0), default=None)
    for checkpoint in found:
        name = checkpoint.path.relative_to(folder).as_posix()
        if checkpoint.content is None:
            advice = (
                "It cannot be read without running what is pickled in it, which may be data. Delete it, or check it."
            )
            yield Finding(name, "unknown", advice)
            continue
        if not checkpoint.is_beside:
            yield _judge_weights(checkpoint, name, most, began)
        yield from _judge_rest(checkpoint, name)


def _judge_weights(checkpoint: Checkpoint, name: str, most: int, began: float | None) -> Finding:
    place = f"{name}: weights"
    if checkpoint.steps >= 0:
        if checkpoint.steps == most:
            return Finding(place, "no", f"The most unlearning steps of this folder, {most}: the metrics judge it.")
        return Finding(place, "yes", f"It is from the midst of unlearning. {_DELETE}.")
    if began is not None and checkpoint.time < began:
        return Finding(place, "yes", f"It was written before unlearning, and has no state of it. {_DELETE}.")
    return Finding(place, "unknown", f"It does not say whether unlearning came before it. If not: {_DELETE.lower()}.")


def _judge_rest(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    content = checkpoint.content or {}
    if checkpoint.state is not None:
        _, kinds = strip(checkpoint.state)
        for kind in kinds:
            yield Finding(f"{name}: {kind}", "yes", f"{_SCRUB}.")
        if not kinds:
            of = "HAMUTrainerMixin" if checkpoint.is_beside else "HAMUCallback"
            what = "Counts." if checkpoint.is_beside else "Counts, and a salted hash of the data to forget."
            yield Finding(f"{name}: state of the {of}", "no", what)
    if has_moments(content.get("optimizer_states")):
        yield Finding(f"{name}: optimizer moments", "yes", f"They average gradients of past batches. {_MOMENTS}")
    if "averaging_state" in content or _has_average(content.get("callbacks")):
        advice = (
            f"An average of weights reaches back before unlearning unless it began after it. If so: {_DELETE.lower()}."
        )
        yield Finding(f"{name}: averaged weights", "unknown", advice)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if any(isinstance(leaf, Tensor) for leaf in leaves(content.get(key))):
            yield Finding(f"{name}: {key}", "yes", f"Tensors are saved there, which may be data. {_DELETE}.")


def has_moments(states: Any) -> bool:
    """Whether optimizer states hold tensors of a weight's shape."""
    return any(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves(states))


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested containers."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def _has_average(callbacks: Any) -> bool:
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    return any(isinstance(state, Mapping) and state.get("average_model_state") is not None for state in states)
