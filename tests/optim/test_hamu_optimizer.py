"""The contract of the wrapper: it is an optimizer, and it applies the rule's step, the whole step, and nothing else."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import HAMUQ, HAMUU, Branch, FineTune, FixedRadius, LearningRateRadius, RelativeRadius, Rule

RULE = HAMUQ(0.05, radius=FixedRadius(0.1))
BASES: dict[str, Callable[[object], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),  # type: ignore[arg-type]
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),  # type: ignore[arg-type]
    "adam": lambda p: Adam(p, lr=0.1),  # type: ignore[arg-type]
    "adamw": lambda p: AdamW(p, lr=0.1, foreach=True),  # type: ignore[arg-type]
}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def make_losses(model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(2, 16, 4, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(3, (16,), generator=generator)
    return nn.functional.cross_entropy(model(x), targets), nn.functional.cross_entropy(model(y), targets)


def wrap_directly(model: nn.Module, rule: Rule = RULE, base: str = "sgd", **options: bool) -> HAMUOptimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HAMUOptimizer(BASES[base](model.parameters()), rule, **options)


def through_lightning(optimizer: HAMUOptimizer) -> Any:
    """What `self.optimizers()` hands out in a LightningModule."""
    module, trainer = LightningModule(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.automatic_optimization = False
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.strategy.optimizers = [optimizer]
    door: Any = module.optimizers()
    door.trainer = trainer  # it holds the strategy by a weak reference only
    return door


DOORS: dict[str, Callable[[HAMUOptimizer], Any]] = {
    "plain": lambda optimizer: optimizer,
    "lightning": through_lightning,
    "fabric": lambda optimizer: Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer),
}
Wrap: TypeAlias = Callable[..., HAMUOptimizer]


@pytest.fixture(params=DOORS)
def wrap(request: pytest.FixtureRequest) -> Wrap:
    """Makes a HAMUOptimizer as the user holds it: the same contract in a plain loop, in Lightning and in Fabric."""
    return lambda *args, **kwargs: DOORS[request.param](wrap_directly(*args, **kwargs))


def take_step(optimizer: Optimizer, model: nn.Module, seed: int = 0) -> None:
    retain, forget = make_losses(model, seed)
    with optimizer.retain():  # type: ignore[attr-defined]
        retain.backward(retain_graph=True)
    with optimizer.forget():  # type: ignore[attr-defined]
        forget.backward()
    optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def expected_step(model: nn.Module, rule: Rule, lr: float, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """`d` from autograd and the rule, tensor by tensor, and the size of what is added up to it."""
    parameters = list(model.parameters())
    losses = make_losses(model, seed)
    grads = [[g.double() for g in torch.autograd.grad(loss, parameters, retain_graph=True)] for loss in losses]
    rows = [torch.stack((r.flatten(), f.flatten())) for r, f in zip(*grads, strict=True)]
    values = rule.coefficients(
        torch.stack([row @ row.T for row in rows]),
        lr=lr,
        weight_norms=torch.tensor([float(p.detach().norm()) for p in parameters]),
        sizes=torch.tensor([p.numel() for p in parameters]),
    ).values
    terms = [(c[0] * r, c[1] * f) for c, r, f in zip(values, *grads, strict=True)]
    return [(a + b, a.abs() + b.abs()) for a, b in terms]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        HAMUQ(1e-3),
        HAMUU(1e-3, radius=LearningRateRadius()),
        HAMUQ(0.01, radius=RelativeRadius(0.01), allocation="optimal"),
        FineTune(),
    ],
    ids=repr,
)
def test_plain_sgd_moves_the_weights_by_d(wrap: Wrap, rule: Rule, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    before, asked = weights(model), expected_step(model, rule, 0.1)
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in make_losses(model)]
    optimizer = wrap(model, rule)
    take_step(optimizer, model)
    assert optimizer.last_step is not None
    values = optimizer.last_step.coefficients.values
    for old, c, r, f, new, (step, _) in zip(before, values, *grads, model.parameters(), asked, strict=True):
        terms = c[0] * r.double(), c[1] * f.double()
        # One unit in the last place of the weight; and the step itself is a sum of two terms in the weights' dtype.
        eps, moved = torch.finfo(dtype).eps, new.detach().double() - old.double()
        tolerance = eps * torch.maximum(old.abs(), new.detach().abs()) + 4 * eps * (terms[0].abs() + terms[1].abs())
        assert ((moved - terms[0] - terms[1]).abs() <= tolerance).all()
        # The wrapper asked the rule the right question: Gramians summed in another order, some of them nearly parallel.
        torch.testing.assert_close(moved, step, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_fine_tuning_is_the_base_optimizer_bit_for_bit(wrap: Wrap, base: str) -> None:
    plain, wrapped = make_model(), make_model()
    optimizer, wrapper = BASES[base](plain.parameters()), wrap(wrapped, FineTune(), base)
    for seed in range(4):
        optimizer.zero_grad()
        make_losses(plain, seed)[0].backward()
        optimizer.step()
        take_step(wrapper, wrapped, seed)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


def test_fine_tuning_does_not_read_a_forget_gradient_of_nan(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model, FineTune())
    plain = make_model()
    make_losses(plain)[0].backward()
    BASES["sgd"](plain.parameters()).step()
    retain, forget = make_losses(model)
    with optimizer.retain():
        retain.backward(retain_graph=True)
    with optimizer.forget():
        (forget * torch.nan).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("which", ["retain", "forget", "neither"])
def test_one_objective_alone_is_never_applied(wrap: Wrap, which: str) -> None:
    model = make_model()
    optimizer, before = wrap(model), weights(model)
    retain, forget = make_losses(model)
    if which == "retain":
        with optimizer.retain():
            retain.backward()
    if which == "forget":
        with optimizer.forget():
            forget.backward()
    with pytest.raises(HAMUStateError, match="gradients? (is|are) missing. Run each objective's backward"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_gradients_of_the_last_step_are_not_used_again(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    take_step(optimizer, model)
    with optimizer.forget():
        make_losses(model)[1].backward()
    with pytest.raises(HAMUStateError, match="the retain gradient is missing"):
        optimizer.step()
    # Without zero_grad(), a second step accumulates nothing from the first.
    expected = [p + d for p, (d, _) in zip(weights(model), expected_step(model, RULE, 0.1, seed=5), strict=True)]
    optimizer.release_forget()
    take_step(optimizer, model, seed=5)
    for a, b in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(b.detach().double(), a, rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_in_both_slots(wrap: Wrap) -> None:
    model, twice = make_model(torch.float64), make_model(torch.float64)
    optimizer = wrap(model)
    for _ in range(3):
        retain, forget = make_losses(model)
        with optimizer.forget():
            (forget / 3).backward(retain_graph=True)
        with optimizer.retain():
            (retain / 3).backward()
    optimizer.step()
    take_step(wrap(twice), twice)
    for a, b in zip(model.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)  # float64 rounding of thirds


def test_short_window_scales_to_the_mean(wrap: Wrap) -> None:
    """Two retain and one forget loss of three came, and losses were divided by three: the step is that of the means."""
    model, reference = make_model(torch.float64), make_model(torch.float64)
    optimizer, other = wrap(model, track_actual=True), wrap(reference)
    retain, forget = make_losses(model)
    with optimizer.retain():
        (retain * 2 / 3).backward(retain_graph=True)
    with optimizer.forget():
        (forget / 3).backward()
    optimizer.plan_step(window_shares=(2 / 3, 1 / 3))
    optimizer.step()
    step = optimizer.last_step
    assert step is not None and step.actual_improvements is not None
    predicted = torch.stack((step.coefficients.retain_improvement, step.coefficients.forget_improvement))
    torch.testing.assert_close(step.actual_improvements, predicted)
    take_step(other, reference)
    for seed in (1, 2):  # windows are full again
        take_step(optimizer, model, seed)
        take_step(other, reference, seed)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_zero_grad_keeps_the_forget_gradient(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    with optimizer.forget():
        make_losses(model)[1].backward()
    optimizer.zero_grad()
    assert optimizer.has_forget_gradient
    assert all(p.grad is None for p in model.parameters())


def test_exception_in_the_forget_pass_leaves_grad_alone(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    make_losses(model)[0].backward()
    before = [p.grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), optimizer.forget():
        make_losses(model)[1].backward()
        _ = 1 / 0
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert not optimizer.has_forget_gradient


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("stream", ["retain", "forget"])
def test_a_step_that_is_not_finite_is_left_out(wrap: Wrap, base: str, stream: str) -> None:
    model = make_model()
    optimizer = wrap(model, base=base)
    take_step(optimizer, model)
    before = weights(model)
    for name, loss in zip(("retain", "forget"), make_losses(model), strict=True):
        with getattr(optimizer, name)():
            (loss * (torch.nan if name == stream else 1.0)).backward(retain_graph=True)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.not_finite_steps == 1
    assert optimizer.last_step is not None
    assert (optimizer.last_step.coefficients.branch == Branch.NOT_FINITE).all()


@pytest.mark.parametrize("base", BASES)
def test_zero_learning_rate_moves_and_breaks_nothing(wrap: Wrap, base: str) -> None:
    model = make_model()
    optimizer = wrap(model, HAMUQ(1e-3), base)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    take_step(optimizer, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.zero_lr_steps == 1
    optimizer.param_groups[0]["lr"] = 0.1
    take_step(optimizer, model)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(before[0], next(model.parameters()))


def test_each_group_uses_its_own_learning_rate() -> None:
    model = make_model(torch.float64)
    first, second = model[0], model[2]
    base = SGD([{"params": first.parameters(), "lr": 0.0}, {"params": second.parameters(), "lr": 0.3}])
    before = weights(model)
    take_step(HAMUOptimizer(base, HAMUQ(1e-4, blocks="global"), model.named_parameters()), model)
    assert torch.equal(before[0], first.weight)
    assert not torch.equal(before[2], second.weight)


@pytest.mark.parametrize("target", ["wrapper", "base"])
def test_schedules_change_the_radius_not_the_direction(wrap: Wrap, target: str) -> None:
    """PITFALLS 10: the schedule reaches the rule, through the wrapper or the base, also after loading a state."""
    model = make_model()
    optimizer = wrap(model, HAMUQ(0.0))
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if target == "wrapper" else optimizer.base, 1, gamma=0.1)
    take_step(optimizer, model)
    first = optimizer.last_step
    scheduler.step()
    take_step(optimizer, model)
    assert first is not None and optimizer.last_step is not None
    torch.testing.assert_close(optimizer.last_step.lr, first.lr * 0.1)
    assert optimizer.base.param_groups is optimizer.param_groups


def test_plateau_scheduler_and_step_hooks(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.base.register_step_post_hook(lambda *_: calls.append("base"))
    take_step(optimizer, model)
    assert calls == ["pre", "base", "post"]
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.base.param_groups[0]["lr"] < 0.1


def test_step_returns_what_the_closure_returns(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    with optimizer.forget():
        make_losses(model)[1].backward()

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = make_losses(model)[0]
        loss.backward()
        return loss

    assert optimizer.step(closure).detach() == make_losses(make_model())[0].detach()


@pytest.mark.parametrize("base", BASES)
def test_state_dict_is_the_bases_and_loads_both_ways(wrap: Wrap, base: str) -> None:
    model, other = make_model(), make_model()
    optimizer, plain = wrap(model, base=base), BASES[base](other.parameters())
    take_step(optimizer, model)
    plain.load_state_dict(optimizer.state_dict())
    again = wrap(other, base=base)
    again.load_state_dict(plain.state_dict())
    assert str(again.state_dict()) == str(optimizer.state_dict())
    again.load_hamu_state_dict(optimizer.hamu_state_dict())
    assert again.steps == 1


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_independent_and_work(copier: Callable[[object], tuple[nn.Module, HAMUOptimizer]]) -> None:
    model = make_model()
    optimizer = wrap_directly(model, base="momentum")
    take_step(optimizer, model)
    twin, twin_optimizer = copier((model, optimizer))
    take_step(twin_optimizer, twin, seed=3)
    take_step(optimizer, model, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin_optimizer.steps == optimizer.steps == 2


class CountHostReads(TorchDispatchMode):
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "rule", [RULE, HAMUQ(1e-3, radius=RelativeRadius(0.1), allocation="optimal"), FineTune()], ids=repr
)
def test_no_host_reads_in_step(wrap: Wrap, rule: Rule) -> None:
    model = make_model()
    optimizer = wrap(model, rule)
    take_step(optimizer, model)
    retain, forget = make_losses(model)
    with optimizer.retain():
        retain.backward(retain_graph=True)
    with optimizer.forget():
        forget.backward()
    with CountHostReads() as counter:
        optimizer.step()
        assert optimizer.last_step is not None
        optimizer.last_step.summary()
    assert counter.reads == 0


def test_step_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        take_step_on = nn.Linear(4, 3)
        optimizer = HAMUOptimizer(SGD(take_step_on.parameters(), lr=0.1, foreach=False), RULE)
        for context in (optimizer.retain, optimizer.forget):
            with context():
                take_step_on(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert optimizer.last_step is not None


def test_parameters_of_one_stream_only() -> None:
    """PITFALLS 16: a parameter that only one objective uses moves by that objective alone; an unused one rests."""
    used_by_both, retain_only, forget_only, unused = (nn.Parameter(torch.ones(3)) for _ in range(4))
    base = SGD([used_by_both, retain_only, forget_only, unused], lr=0.1)
    optimizer = HAMUOptimizer(base, HAMUQ(0.01, radius=FixedRadius(0.1)))
    with optimizer.retain():
        (used_by_both + retain_only).square().sum().backward()
    with optimizer.forget():
        (used_by_both * forget_only).sum().backward()
    optimizer.step()
    assert (retain_only < 1).all()
    assert (forget_only > 1).all()
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("sparse", [True, False])
def test_sparse_embedding_gradients(sparse: bool) -> None:
    def run(is_sparse: bool) -> Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 3, sparse=is_sparse)
        optimizer = HAMUOptimizer(SGD(embedding.parameters(), lr=0.1), RULE)
        with optimizer.retain():
            embedding(torch.tensor([0, 1, 1])).square().sum().backward()
        with optimizer.forget():
            embedding(torch.tensor([1, 4])).sum().backward()
        optimizer.step()
        return embedding.weight.detach()

    torch.testing.assert_close(run(sparse), run(False))


def test_half_precision_weights(wrap: Wrap) -> None:
    """PITFALLS 4: sums in float32 or wider; the step is right to the resolution of the weights."""
    model = make_model(torch.bfloat16)
    before, expected = weights(model), expected_step(model, RULE, 0.1)
    take_step(wrap(model), model)
    for old, (step, _), new in zip(before, expected, model.parameters(), strict=True):
        resolution = torch.finfo(torch.bfloat16).eps * (old.abs().max() + 2 * step.abs().max())
        assert ((new.detach().double() - old.double() - step).abs() <= resolution).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), "but got LBFGS, which evaluates its closure several times"),
        (lambda p: SGD(p, lr=0.1, maximize=True), "Expected `maximize=False`"),
        (lambda p: HAMUOptimizer(SGD(p, lr=0.1), RULE), "but got a HAMUOptimizer: wrap it once"),
        (lambda p: "sgd", "Expected `base` to be a torch.optim.Optimizer, but got str"),
    ],
)
def test_refused_bases(make: Callable[[Iterator[Tensor]], Optimizer], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        HAMUOptimizer(make(make_model().parameters()), RULE)


def test_refused_groups() -> None:
    optimizer = HAMUOptimizer(SGD(make_model().parameters(), lr=0.1), RULE)
    with pytest.raises(HAMUValueError, match="Expected `maximize=False`"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "maximize": True})
    assert len(optimizer.param_groups) == 1


def test_refused_rules_and_weights() -> None:
    model = make_model()
    with pytest.raises(HAMUValueError, match="Expected `rule` to be a rule such as HAMUQ"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), 0.1)  # type: ignore[arg-type]
    with pytest.raises(HAMUValueError, match="Expected the names of all parameters with `blocks='layer'`"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), HAMUQ(0.1, blocks="layer"))
    layered = HAMUOptimizer(SGD(model.named_parameters(), lr=0.1), HAMUQ(0.1, blocks="layer"))
    take_step(layered, model)
    assert layered.last_step is not None and layered.last_step.labels == ("0", "2")
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(HAMUValueError, match="Expected some weight to differ from zero"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), HAMUQ(0.1, radius=RelativeRadius(0.1)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(HAMUValueError, match="at least one parameter that requires grad"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE)


@pytest.mark.parametrize(
    ("base", "words"),
    [("momentum", r"SGD has momentum=0.9, weight_decay=0.01"), ("adam", "Adam has Adam rescales gradients")],
)
def test_bases_that_move_otherwise_are_named(base: str, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        HAMUOptimizer(BASES[base](make_model().parameters()), RULE)


@pytest.mark.parametrize("base", BASES)
def test_exact_steps_take_only_the_learning_rate_from_the_base(wrap: Wrap, base: str) -> None:
    """PITFALLS 9. `wrap` ignores warnings; that there is none is seen at the scheduler's and the constructor's."""
    model, plain = make_model(), make_model()
    optimizer, reference = wrap(model, base=base, exact=True), wrap(plain)
    assert isinstance(HAMUOptimizer(BASES[base](model.parameters()), RULE, exact=True), HAMUOptimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base, 1, gamma=0.5)
    other = torch.optim.lr_scheduler.StepLR(reference.base, 1, gamma=0.5)
    for seed in range(3):
        take_step(optimizer, model, seed)
        take_step(reference, plain, seed)
        scheduler.step()
        other.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        # float32: d is not divided by lr and multiplied again, in three steps of up to 0.1.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-7)
    assert not optimizer.base.state


def test_exact_steps_follow_a_new_parameter_group() -> None:
    model, late = make_model(), nn.Parameter(torch.ones(3))
    optimizer = wrap_directly(model, base="adam", exact=True)
    take_step(optimizer, model)
    optimizer.add_param_group({"params": [late], "lr": 0.3})
    with optimizer.retain():
        (make_losses(model)[0] + late.sum()).backward()
    with optimizer.forget():
        (make_losses(model)[1] - late.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((3,), 1 - 0.1 / 3**0.5))  # the radius of RULE, as one block


@pytest.mark.parametrize("base", BASES)
def test_actual_improvements_are_those_of_the_weights(wrap: Wrap, base: str) -> None:
    model = make_model()
    optimizer = wrap(model, base=base, track_actual=True)
    for seed in range(2):  # momentum needs a past to differ
        before, losses = weights(model), make_losses(model, seed)
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        take_step(optimizer, model, seed)
        moved = [p.detach().double() - old.double() for p, old in zip(model.parameters(), before, strict=True)]
        retain, forget = (sum((g.double() * m).sum() for g, m in zip(row, moved, strict=True)) for row in grads)
        assert optimizer.last_step is not None and optimizer.last_step.actual_improvements is not None
        # The change is rounded once, to float32.
        torch.testing.assert_close(
            optimizer.last_step.actual_improvements, torch.stack((-retain, forget)), rtol=1e-5, atol=1e-7
        )
    coefficients = optimizer.last_step.coefficients
    predicted = torch.stack((coefficients.retain_improvement, coefficients.forget_improvement))
    is_predicted = torch.allclose(optimizer.last_step.actual_improvements, predicted, rtol=1e-4, atol=1e-6)
    assert is_predicted == (base == "sgd")
    assert "actual_forget_improvement" in optimizer.last_step.summary()


def test_distributed_state_dict_initialises_the_base(wrap: Wrap) -> None:
    """torch.distributed.checkpoint takes one step at lr 0 to make the state; it must be no error and no movement."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = make_model()
    optimizer, before = wrap(model, base="adamw"), weights(model)
    state = get_optimizer_state_dict(model, optimizer)
    assert "0.weight" in state["state"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_grad_scaler_unscales_both_slots(wrap: Wrap) -> None:
    model, reference = make_model(), make_model()
    optimizer, scaler = wrap(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    retain, forget = make_losses(model)
    with optimizer.retain():
        scaler.scale(retain).backward(retain_graph=True)
    with optimizer.forget():
        scaler.scale(forget).backward()
    scaler.unscale_(optimizer)
    optimizer.unscale_forget_(scaler)
    scaler.step(optimizer)
    scaler.update()
    take_step(wrap(reference), reference)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_forget_overflow_backs_off_and_leaves_the_step_out(wrap: Wrap) -> None:
    model = make_model()
    optimizer, scaler, before = wrap(model), torch.amp.GradScaler("cpu", init_scale=1024.0), weights(model)
    retain, forget = make_losses(model)
    with optimizer.retain():
        scaler.scale(retain).backward(retain_graph=True)
    with optimizer.forget():
        scaler.scale(forget * torch.inf).backward()
    optimizer.unscale_forget_(scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_exact_steps_follow_tensors_that_are_replaced() -> None:
    """As many other tensors in the groups of the base: these move from then on."""
    old, new = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    base = torch.optim.SGD([old], lr=0.1, momentum=0.9)
    optimizer = HAMUOptimizer(base, HAMUQ(0.01, radius=FixedRadius(0.1)), exact=True)
    for weight in (old, new):
        base.param_groups[0]["params"] = [weight]
        before = weight.detach().clone()
        with optimizer.retain():
            weight.square().sum().backward()
        with optimizer.forget():
            weight.sum().backward()
        optimizer.step()
        assert not torch.equal(weight, before)
