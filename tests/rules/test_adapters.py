"""Radii of low-rank adapters, against the dense weights W + s B A."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.optim._layout import make_layout
from hamu_lightning.rules import (
    HAMUQ,
    Adapter,
    AdapterRadius,
    FixedRadius,
    RelativeRadius,
    ScaledRadius,
    find_adapters,
    pair_adapters,
)
from hamu_lightning.rules._adapters import bound_spectral_norms

DOUBLE = torch.float64


def draw(out: int, into: int, rank: int, scaling: float, *, fresh: bool = False, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    down, up, base = (
        nn.Parameter(torch.randn(*shape, dtype=DOUBLE, generator=generator))
        for shape in ((rank, into), (out, rank), (out, into))
    )
    if fresh:
        nn.init.zeros_(up)
    return Adapter(down, up, base.requires_grad_(False), scaling)


def weight(adapter: Adapter) -> Tensor:
    return adapter.base.detach() + adapter.scaling * adapter.up.detach() @ adapter.down.detach()


def radii(
    tensors: list[Tensor], adapters: list[Adapter], radius: Any, blocks: Any = "global", **options: Any
) -> Tensor:
    names = {tensor: f"{i}.x" for i, tensor in enumerate(tensors)}
    layout = make_layout([{"params": tensors, "lr": 1.0}], names, blocks, adapters=adapters, **options)
    free = torch.ones(len(layout.labels), dtype=DOUBLE)
    with torch.no_grad():
        return radius.compute(free, free, **radius.measure(layout))


def change(adapters: list[Adapter], moves: dict[Tensor, Tensor]) -> float:
    """The norm of what a step changes in all adapted weights together, from dense weights."""
    before = [weight(a) for a in adapters]
    with torch.no_grad():
        for tensor, move in moves.items():
            tensor += move
        after = [weight(a) for a in adapters]
        for tensor, move in moves.items():
            tensor -= move
    return math.sqrt(sum(float((y - x).square().sum()) for x, y in zip(before, after, strict=True)))


def worst(adapter: Adapter, length: float) -> dict[Tensor, Tensor]:
    """The step of a length that changes the weight most to first order, from the largest singular vectors."""
    u, s, _ = torch.linalg.svd(adapter.up.detach())
    _, t, vh = torch.linalg.svd(adapter.down.detach())
    left, right = u[:, 0], vh[0]
    move = torch.outer(left, right)
    d_up, d_down = move @ adapter.down.detach().T, adapter.up.detach().T @ move
    scale = length / math.sqrt(float(d_up.square().sum() + d_down.square().sum()))
    return {adapter.up: scale * d_up, adapter.down: scale * d_down}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("scaling", [0.25, 4.0])
def test_no_step_changes_the_weight_by_more(fresh: bool, scaling: float) -> None:
    """Over random directions, and the worst one: there small radii are the largest that hold."""
    adapter = draw(7, 5, 2, scaling, fresh=fresh)
    tensors = [adapter.down, adapter.up]
    for fraction in (1e-6, 1e-2, 1.0, 30.0):
        [length] = radii(tensors, [adapter], AdapterRadius(fraction)).tolist()
        budget = fraction * float(adapter.base.norm())
        for seed in range(50):
            flat = torch.randn(24, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
            flat *= length / flat.norm()
            moves = {adapter.down: flat[:10].view(2, 5), adapter.up: flat[10:].view(7, 2)}
            assert change([adapter], moves) <= budget * (1 + 1e-9)
        most = change([adapter], worst(adapter, length))
        assert most <= budget * (1 + 1e-9)
        if fraction == 1e-6:
            assert most >= budget * (1 - 1e-2)  # 2^(1/128) of the spectral norm's bound, and rounding of W + s B A


def test_the_scaling_does_not_matter_to_what_is_changed() -> None:
    """Two adapters of the same product: the radii differ as the units of the factors do."""
    one, other = draw(4, 3, 2, 1.0, fresh=True), draw(4, 3, 2, 10.0, fresh=True)
    first, second = (float(radii([a.down, a.up], [a], AdapterRadius(1e-5))) for a in (one, other))
    assert first / second == pytest.approx(10.0, rel=1e-3)  # the square of the step is there too


@pytest.mark.parametrize("blocks", ["global", "tensor", lambda name: "even" if int(name[0]) % 2 == 0 else "odd"])
def test_several_adapters_together(blocks: Any) -> None:
    """One bound for all of them; also where the factors of a pair are in different blocks, each at its radius."""
    adapters = [draw(6, 4, 2, 0.5, seed=1), draw(3, 8, 3, 2.0, seed=2), draw(5, 5, 1, 1.0, fresh=True, seed=3)]
    tensors = [t for a in adapters for t in (a.down, a.up)]
    found = radii(tensors, adapters, AdapterRadius(0.05), blocks).tolist()
    n = len(tensors)
    place = (
        {"global": [0] * n, "tensor": list(range(n))}.get(blocks, [0, 1] * 3) if isinstance(blocks, str) else [0, 1] * 3
    )
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(n, generator=generator, dtype=DOUBLE) ** 4  # some steps sit in one tensor alone
        moves = {
            t: w * torch.randn(t.shape, dtype=DOUBLE, generator=generator)
            for t, w in zip(tensors, weights, strict=True)
        }
        for block, length in enumerate(found):
            inside = [t for t, b in zip(tensors, place, strict=True) if b == block]
            norm = math.sqrt(sum(float(moves[t].square().sum()) for t in inside))
            for tensor in inside:
                moves[tensor] = moves[tensor] * (length / norm)
        groups = [[a] for a in adapters] if blocks == "tensor" else [adapters]
        for together in groups:
            budget = 0.05 * math.sqrt(sum(float(a.base.square().sum()) for a in together))
            assert change(together, moves) <= budget * (1 + 1e-9)


def test_one_factor_that_rests() -> None:
    """Where A is frozen, the length of B does not matter."""
    adapter = draw(7, 5, 2, 2.0)
    [length] = radii([adapter.up], [adapter], AdapterRadius(1e-6)).tolist()
    expected = 1e-6 * float(adapter.base.norm()) / (2.0 * float(torch.linalg.matrix_norm(adapter.down.detach(), 2)))
    assert length == pytest.approx(expected, rel=1e-2)
    assert length <= expected


def test_other_weights_are_as_with_a_relative_radius() -> None:
    adapter = draw(4, 3, 2, 1.0)
    head, bias = nn.Parameter(torch.randn(6, 2, dtype=DOUBLE)), nn.Parameter(torch.zeros(5, dtype=DOUBLE))
    tensors = [adapter.down, adapter.up, head, bias]
    found = radii(tensors, [adapter], AdapterRadius(0.1), "tensor")
    # The floor is a share of the root mean square of the weights that matter: the base, not its factors.
    expected = radii([head, bias, adapter.base.requires_grad_()], [], RelativeRadius(0.1), "tensor")
    torch.testing.assert_close(found[2:], expected[:2], rtol=1e-12, atol=0)
    # In one block with an adapter they have a gain of 1, and their length counts.
    [both] = radii([*tensors], [adapter], AdapterRadius(1e-6)).tolist()
    sides = [torch.linalg.matrix_norm(f.detach(), 2) ** 2 for f in (adapter.down, adapter.up)]
    gain = max(1.0, math.sqrt(float(sum(sides))))
    total = math.hypot(float(adapter.base.norm().detach()), float(head.detach().norm()))
    assert both == pytest.approx(1e-6 * total / gain, rel=1e-2)


def test_a_region_and_a_step_of_the_optimizer() -> None:
    """The whole way: no step changes the weight by more than its share; the region makes it so much shorter."""
    adapter = draw(7, 5, 2, 4.0, fresh=True)
    x = torch.randn(16, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(7))
    optimizer = HAMUOptimizer(
        torch.optim.SGD([adapter.down, adapter.up], lr=0.1),
        HAMUQ(1e3, radius=ScaledRadius(AdapterRadius(0.02), 0.5), blocks="global"),
        adapters=[adapter],
    )
    for _ in range(5):
        before = weight(adapter)
        outputs = x @ (adapter.base + adapter.scaling * adapter.up @ adapter.down).T
        with optimizer.retain():
            outputs.square().mean().backward(retain_graph=True)
        with optimizer.forget():
            outputs.sin().mean().backward()
        optimizer.step()
        moved = float((weight(adapter) - before).norm() / adapter.base.norm())
        assert 1e-3 < moved <= 0.01 * (1 + 1e-9)


def test_spectral_norms() -> None:
    factors = [
        torch.randn(r, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(r))
        for r, n in ((1, 5), (8, 30), (8, 9), (64, 64))
    ]
    factors += [torch.eye(8, dtype=DOUBLE), 1e-30 * factors[1], 1e30 * factors[1], torch.zeros(8, 4, dtype=DOUBLE)]
    exact = torch.stack([torch.linalg.matrix_norm(f, 2) for f in factors])
    found = bound_spectral_norms(factors)
    assert (found >= exact * (1 - 1e-12)).all()
    assert (found <= exact * 64 ** (1 / 128)).all()
    assert bound_spectral_norms([torch.full((2, 2), torch.nan)]).isnan().all()


class Handmade(nn.Module):
    """As loralib and PEFT have them: the base is the layer's own weight, or that of `base_layer`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.scaling: Any = 0.5
        if form == "own":
            self.weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
            self.lora_A, self.lora_B = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.zeros(2, 1))
            return
        self.base_layer = nn.Linear(3, 2)
        self.scaling = {"default": 0.5, "second": 3.0}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(1, 2, bias=False)})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()


@pytest.mark.parametrize("form", ["own", "peft"])
def test_adapters_are_found_by_structure(form: str) -> None:
    module = nn.Sequential(Handmade(form), nn.Linear(2, 2))
    [adapter] = find_adapters(module)
    names = {id(p): name for name, p in module.named_parameters()}
    found = [names[id(t)] for t in (adapter.down, adapter.up, adapter.base)]
    expected = ["0.lora_A", "0.lora_B", "0.weight"]
    if form == "peft":
        expected = ["0.lora_A.default.weight", "0.lora_B.default.weight", "0.base_layer.weight"]
        [by_name] = pair_adapters(module.named_parameters(), 0.5)
        assert (by_name.down is adapter.down, by_name.base is adapter.base) == (True, True)
    assert (found, adapter.scaling) == (expected, 0.5)


def test_a_base_that_is_written_to() -> None:
    adapter = draw(2, 2, 1, 1.0)
    before = adapter.base_norm()
    with torch.no_grad():
        adapter.base.mul_(2)
    torch.testing.assert_close(adapter.base_norm(), 2 * before)


def test_refusals() -> None:
    tensor = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(HAMUValueError, match=r"Expected adapters among the weights with AdapterRadius\(.*but got none"):
        HAMUOptimizer(torch.optim.SGD([tensor], lr=0.1), HAMUQ(1.0, radius=AdapterRadius(0.1)))
    with pytest.raises(HAMUValueError, match="Expected `adapters` to be what `find_adapters"):
        HAMUOptimizer(torch.optim.SGD([tensor], lr=0.1), HAMUQ(1.0, radius=FixedRadius(0.1)), adapters=[tensor])  # type: ignore[list-item]
    with pytest.raises(HAMUValueError, match="Expected `up` and `down` to have a product"):
        Adapter(torch.ones(3, 1), torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(HAMUValueError, match="Expected names that hold 'lora_A'"):
        pair_adapters([("weight", tensor)], 1.0)
    with pytest.raises(HAMUValueError, match=r"Expected 'x.lora_B' beside 'x.lora_A'"):
        pair_adapters([("x.lora_A", tensor)], 1.0)
    with pytest.raises(HAMUValueError, match="Expected `weight_norms`"):
        AdapterRadius(0.1).compute(torch.ones(1), torch.ones(1))
    with pytest.raises(HAMUValueError, match="`fraction`"):
        AdapterRadius(0.0)


class SharesInPlace(nn.Module):
    """Reading its weight changes it, as in the shared embeddings of a project."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Parameter(torch.ones(2, 2))
        self.scaling = 2.0

    @property
    def weight(self) -> torch.Tensor:
        weight = self.held.detach()
        weight[:, 0] = 0
        return weight


def test_properties_of_other_modules_are_not_read() -> None:
    part = SharesInPlace()
    assert find_adapters(nn.Sequential(part)) == ()
    assert torch.equal(part.held.detach(), torch.ones(2, 2))
