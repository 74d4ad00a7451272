"""All groups of a fit besides retain: which of them take part in a step, and how far each is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hamu_lightning.callbacks import _compat_loaders
from hamu_lightning.callbacks._group import Group, take_turns
from hamu_lightning.callbacks._identity import identify
from hamu_lightning.callbacks.goals import Approach, ForgottenSamples, read_as_held_out
from hamu_lightning.callbacks.passes import ModuleGuard, Recording, check_disjoint, find_loader, name_sources, wrap_step

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.callbacks._settings import FitSettings
    from hamu_lightning.objectives import Objective
    from hamu_lightning.optim import HAMUOptimizer


class Groups:
    """The groups of a fit.

    Args:
        trainer: The trainer.
        optimizer: Where the gradients go; its rule names the groups.
        settings: What the user asked for.

    Attributes:
        guard: Keeps the module as it was in all passes.
        present: The groups that take part in the present step, in the order of the rule.
    """

    def __init__(self, trainer: Trainer, optimizer: HAMUOptimizer, settings: FitSettings) -> None:
        self._trainer, self._optimizer, self._settings = trainer, optimizer, settings
        self.guard = ModuleGuard(trainer.lightning_module)
        self._sources = name_sources(optimizer.rule, settings.forget, settings.protect)
        self._groups = {name: self._make(name) for name in self._sources}
        self._loaders: dict[str, Any] = {}
        self._state: Mapping[str, Any] = {}
        self._turn, self._has_begun = 0, False
        self.present: list[Group] = []

    def _make(self, name: str) -> Group:
        settings, rule = self._settings, self._optimizer.rule
        objective = settings.retain_objective if name in settings.protect else settings.objective_of(name, rule)
        return Group(name, self._trainer, self._optimizer, settings.seed, self.guard, objective)

    @property
    def _is_single(self) -> bool:
        """Whether there is one group, as in the rules for two gradients."""
        return len(self._groups) == 1

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives of what is to be forgotten, each once, that are not the module's own loss."""
        own = {group.name: group.objective for group in self._to_forget if group.objective is not None}
        shared = self._settings.objective
        named = {name: objective for name, objective in own.items() if objective is not shared}
        return named if shared is None else {**named, "forget": shared}

    @property
    def given(self) -> dict[str, Objective | None]:
        """What is differentiated in each group; None for the module's own loss."""
        return {name: group.objective for name, group in self._groups.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the groups of the present step, retain first: of those that reuse gradients, all."""
        chosen = self.present if self._settings.passes.groups_per_step is None else self._active
        return ("retain", *(group.name for group in chosen))

    @property
    def are_in_batch(self) -> bool:
        """Whether the training loader brings the batches of all groups."""
        return all(group.run.stream is None for group in self._groups.values())

    @property
    def loader(self) -> Any:
        """The loader of the only group; None where the training loader brings its batches."""
        stream = next(iter(self._groups.values())).run.stream
        return None if stream is None else stream.loader

    @property
    def passes(self) -> int:
        """How many batches have gone through the module."""
        return sum(group.passes for group in self._groups.values())

    def find_loaders(self) -> None:
        """Find the loaders."""
        for name in self._groups:
            self._find_loader(name)
        self._check_disjoint()

    def start(self) -> None:
        """Begin to read them, from where `load_state_dict` left off."""
        for name in self._groups:
            self._start_group(name)

    def add(self, settings: FitSettings, name: str) -> None:
        """Take one more group in; `settings` and the optimizer's rule know of it already."""
        self._settings = settings
        self._sources = name_sources(self._optimizer.rule, settings.forget, settings.protect)
        self._groups = {known: self._groups.get(known) or self._make(known) for known in self._sources}
        self._find_loader(name)
        self._check_disjoint()
        self._start_group(name)
        self.take_all_next()

    def take_all_next(self) -> None:
        """Let every group take part in the next step: some have no gradient that could be reused."""
        self._has_begun = False

    def _check_disjoint(self) -> None:
        forgotten = {n: loader for n, loader in self._loaders.items() if n not in self._settings.protect}
        check_disjoint(forgotten, {n: self._loaders[n] for n in self._settings.protect if n in self._loaders})

    def _find_loader(self, name: str) -> None:
        quota, is_forgotten = self._optimizer.rule.target_quotas.get(name), name not in self._settings.protect
        options = {"is_forgotten": is_forgotten, "leads_to_target": quota is not None}
        loader = find_loader(self._trainer, name, self._sources[name], self._settings.passes.batch_size, **options)
        loader = read_as_held_out(self._trainer, getattr(quota, "target", None), loader)
        if loader is not None:
            self._loaders[name] = loader

    def identify(self, salt: str | None = None) -> dict[str, Any]:
        """Describe the data of the groups without holding it, see `identify`; all processes alike."""
        found = identify(self._find_given(), self._settings.protect, salt) if self._trainer.is_global_zero else {}
        return self._trainer.strategy.broadcast(found)

    def _find_given(self) -> dict[str, Any]:
        train = _compat_loaders.train_loader_parts(self._trainer)
        return {name: self._loaders[name] if name in self._loaders else train[name] for name in self._groups}

    def _start_group(self, name: str) -> None:
        settings, group, state = self._settings, self._groups[name], self._state.get(name, {})
        loader = self._loaders.get(name)
        if loader is not None:
            group.read(_compat_loaders.prepare_loader(self._trainer, loader), state)
        if name in self._optimizer.rule.target_quotas:
            protected = [data for other, data in self._find_given().items() if other in settings.protect]
            how = settings.passes.every_n_steps, settings.confirm_of(name), state.get("approach")
            group.approach = Approach(self._trainer, self._optimizer, name, group.run, loader, protected, *how)
        group.heed(() if name in settings.protect else settings.stop_on)

    def wrap_step(self, step: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """For each group what runs a batch, if the strategy's `training_step` is to return what it differentiates."""
        return {name: wrap_step(step, group.objective, self._trainer) for name, group in self._groups.items()}

    def open_window(self, steps: Mapping[str, Callable[..., Any]], *args: Any) -> list[Group]:
        """Measure what has to be measured before a step, and choose its groups; return those that leave or return.

        Args:
            steps: For each group what runs a batch.
            args: The arguments of the retain batch, and those by name.
        """
        for group in self._active:
            if group.approach is not None:
                group.approach.look(steps[group.name], *args, lands=self._is_single)
        reached = [group for group in self._active if group.approach is not None and group.approach.is_reached]
        leaving = [group for group in reached if not group.stays]
        back = self._look_after_done(steps, *args) if self.are_all_reached else []
        if self.are_all_reached:
            leaving = []  # the fit ends before the step
        for group in leaving:
            group.is_done = True
        # Each group needs a gradient of its own before an earlier one can be reused.
        per_step = self._settings.passes.groups_per_step if self._has_begun else None
        self.present = take_turns(self._active, per_step, self._turn)
        for group in self.present:
            group.losses.clear()
        return leaving + back

    @property
    def are_due(self) -> bool:
        """Whether a level is to be measured before the next step."""
        return any(group.approach is not None and group.approach.is_due for group in self._active)

    def _look_after_done(self, steps: Mapping[str, Callable[..., Any]] | None = None, *args: Any) -> list[Group]:
        """Measure the groups again that have left; return those whose loss has fallen since, to be forgotten again."""
        done = [group for group in self._groups.values() if group.is_done and group.approach is not None]
        for group in done:
            group.look_after(*(() if steps is None else (steps[group.name], *args)))
        back = [group for group in done if not group.is_done]
        if back:
            self.take_all_next()
        return back

    def start_over(self) -> None:
        """The weights went back to an earlier step: levels are measured again."""
        for approach in self._approaches.values():
            approach.start_over()

    def record(self, steps: Mapping[str, Callable[..., Any]]) -> Callable[[str], None]:
        """Keep the batches of the present window; return what runs those of a group again with their backward passes.

        Args:
            steps: For each group what runs a batch.
        """
        runs = {group.name: group.run for group in self.present}
        kept: dict[str, list[Recording]] = {name: [] for name in runs}
        for name, run in runs.items():
            run.records = kept[name].append

        def repeat(name: str) -> None:
            for recording in kept[name]:
                runs[name].repeat(steps[name], recording)

        return repeat

    def close_window(self) -> None:
        """End it."""
        self._turn, self._has_begun = self._turn + 1, True

    def conclude(self) -> None:
        """Measure, at the end of the fit, how far the losses came."""
        self._look_after_done()
        for group in self._active:
            if group.approach is not None:
                group.approach.conclude()

    def find_data(self) -> tuple[dict[str, Any], Any]:
        """The loaders of what is to be forgotten, by name, and that of the held-out data of a target, if any."""
        forget = {name: loader for name, loader in self._find_given().items() if name not in self._settings.protect}
        held_out = (approach.evidence.find_held_out() for approach in self._approaches.values())
        return forget, next((loader for loader in held_out if loader is not None), None)

    def conclude_evidence(self) -> None:
        """Read all samples with a target once more, at the weights that the fit leaves."""
        for approach in self._approaches.values():
            approach.conclude_evidence()

    def tables(self) -> dict[str, ForgottenSamples]:
        """What became of each sample, for each group with a target where it can be told."""
        tables = {name: approach.evidence.table for name, approach in self._approaches.items()}
        return {name: table for name, table in tables.items() if table is not None}

    def means(self) -> dict[str, tuple[float, float]]:
        """The loss of each group before and after the fit: of the whole set, in evaluation mode, where it is known."""
        means = {name: approach.evidence.means() for name, approach in self._approaches.items()}
        return {name: pair for name, pair in means.items() if pair is not None}

    def evidence_numbers(self) -> dict[str, Tensor]:
        """What single samples show at the end, in numbers for the log."""
        return self._name_numbers({name: approach.evidence.numbers() for name, approach in self._approaches.items()})

    def describe_evidence(self) -> list[str]:
        """The same in lines."""
        return self._name_lines({name: approach.describe_evidence() for name, approach in self._approaches.items()})

    def describe_levels(self) -> list[str]:
        """How far the losses came on the way to their targets, in lines."""
        return self._name_lines({name: [f"{a.describe_level()}."] for name, a in self._approaches.items()})

    def _name_lines(self, told: Mapping[str, list[str]]) -> list[str]:
        return [line if self._is_single else f"{name}: {line}" for name, lines in told.items() for line in lines]

    @property
    def _active(self) -> list[Group]:
        return [group for group in self._groups.values() if not group.is_done]

    @property
    def _approaches(self) -> dict[str, Approach]:
        return {g.name: g.approach for g in self._groups.values() if g.approach is not None}

    @property
    def _to_forget(self) -> list[Group]:
        return [group for group in self._groups.values() if group.name not in self._settings.protect]

    @property
    def are_all_reached(self) -> bool:
        """Whether every group to forget has a target, and has reached it."""
        return all(g.is_done or (g.approach is not None and g.approach.is_reached) for g in self._to_forget)

    @property
    def are_lost(self) -> bool:
        """Whether the model gives no finite loss any more."""
        return any(approach.is_lost for approach in self._approaches.values())

    @property
    def forget_losses(self) -> list[Tensor]:
        """The losses of the present window on what is to be forgotten, 0-d each."""
        return [loss for group in self._to_forget if not group.is_done for loss in group.losses]

    @property
    def target(self) -> Tensor | None:
        """Where the loss of the only group should end, 0-d; None where there are several."""
        return self._optimizer.aim_of(next(iter(self._groups))).goal if self._is_single else None

    @property
    def level(self) -> Tensor | None:
        """Where the loss of the only group is, as it is followed to its target; None without one."""
        return self._optimizer.aim_of(next(iter(self._groups))).level if self.target is not None else None

    def levels(self) -> dict[str, Tensor]:
        """The losses as they are followed, and their targets, for the log."""
        return self._name_numbers({name: approach.levels() for name, approach in self._approaches.items()})

    def _name_numbers(self, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Numbers by name, with the name of their group before it where there are several."""
        return {
            name if self._is_single else f"{group}_{name}": number
            for group, numbers in found.items()
            for name, number in numbers.items()
        }

    def names_by_role(self) -> tuple[list[str], list[str]]:
        """The names of the protected groups, and of those to forget."""
        protected = [name for name in self._groups if name in self._settings.protect]
        return protected, [name for name in self._groups if name not in protected]

    def describe(self) -> str:
        """How far the losses came, in words; reads the host."""
        return "; ".join(self._name_lines({name: [approach.describe()] for name, approach in self._approaches.items()}))

    def describe_short(self) -> str:
        """The same of what has not reached its target, with the cure; empty where all have."""
        short = {n: a for n, a in self._approaches.items() if not self._groups[n].is_done and a.is_short}
        return " ".join(self._name_lines({name: [approach.describe_short()] for name, approach in short.items()}))

    @property
    def without_target(self) -> list[str]:
        """The names of the groups to forget that no target leads."""
        return [group.name for group in self._to_forget if group.approach is None]

    def describe_unseen(self) -> str:
        """Which batches have never gone through the module, in words."""
        told = [found for group in self._groups.values() if (found := group.describe_unseen())]
        return f"{'; '.join(told)}." if told else ""

    def close(self) -> None:
        """Let the workers of the loaders go, and those that read for measurements."""
        for approach in self._approaches.values():
            approach.close()
        for group in self._groups.values():
            if group.run.stream is not None:
                group.run.stream.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the positions and counts of all groups."""
        return {name: group.state_dict() for name, group in self._groups.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self._state = state
        for name, group in self._groups.items():
            group.load_state_dict(state.get(name, {}))
