"""Gramians against plain inner products, in every dtype and layout, and the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import assign_blocks, compute_gramian

SHAPES = ((3, 5), (1,), (7,), (2, 3, 4), (0,), (300_000,))


def random_lists(n: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(n)
    return [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES] for _ in range(n)]


def by_hand(grads: list[list[Tensor]]) -> Tensor:
    rows = [torch.stack([g.double().flatten() for g in tensors]) for tensors in zip(*grads, strict=True)]
    return torch.stack([row @ row.T for row in rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_inner_products(dtype: torch.dtype, n: int) -> None:
    grads = random_lists(n, dtype)
    gramian = compute_gramian(*grads)
    assert gramian.dtype == torch.float64
    # Sums of 300,000 float64 products in another order.
    torch.testing.assert_close(gramian, by_hand(grads), rtol=1e-11, atol=1e-9)


def test_sums_over_blocks() -> None:
    grads = random_lists(2)
    expected = by_hand(grads)
    gramian = compute_gramian(*grads, blocks=[0, 1, 0, 2, 2, 1])
    torch.testing.assert_close(gramian[0], expected[0] + expected[2])
    torch.testing.assert_close(gramian[1], expected[1] + expected[5])


def test_missing_gradients_are_zero() -> None:
    retain, forget = ([torch.ones(2), None, None], [None, torch.ones(3), None])
    assert compute_gramian(retain, forget).tolist() == [[[2, 0], [0, 0]], [[0, 0], [0, 3]], [[0, 0], [0, 0]]]
    assert compute_gramian([], []).shape == (0, 2, 2)


def test_complex_gradients_are_pairs_of_real_ones() -> None:
    a, b = torch.tensor([1 + 2j, 3j]), torch.tensor([2 - 1j, 1 + 1j])
    assert compute_gramian([a], [b]).tolist() == [[[14.0, 3.0], [3.0, 7.0]]]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("dense", [(False, False), (True, False), (False, True)])
def test_sparse_gradients(dense: tuple[bool, bool]) -> None:
    """Embeddings: repeated indices count with their sum."""
    grads = [
        torch.sparse_coo_tensor(torch.tensor([indices]), torch.randn(3, 4), (6, 4))
        for indices in ([0, 2, 2], [2, 5, 0])
    ]
    plain = [g.to_dense() for g in grads]
    given = [p if is_dense else g for g, p, is_dense in zip(grads, plain, dense, strict=True)]
    torch.testing.assert_close(compute_gramian([given[0]], [given[1]]), by_hand([[plain[0]], [plain[1]]]))
    assert compute_gramian([given[0]], [None])[0, 1].tolist() == [0, 0]


def test_transposed_gradients_match_by_position() -> None:
    a, b = torch.randn(4, 6), torch.randn(6, 4).t()
    torch.testing.assert_close(compute_gramian([a], [b]), compute_gramian([a], [b.contiguous()]))


def test_nothing_is_read_on_the_host() -> None:
    with FakeTensorMode():
        grads = [[torch.randn(s) for s in SHAPES] for _ in range(3)]
        assert compute_gramian(*grads, blocks=[0, 0, 1, 1, 2, 2]).shape == (3, 3, 3)


def test_bad_lists() -> None:
    with pytest.raises(HAMUValueError, match=r"lists of equal length, but got lengths \[1, 2\]"):
        compute_gramian([torch.ones(1)], [torch.ones(1), torch.ones(1)])
    with pytest.raises(HAMUValueError, match="one index per tensor"):
        compute_gramian([torch.ones(1)], [torch.ones(1)], blocks=[0, 1])


def test_blocks() -> None:
    names, groups = ["net.0.weight", "net.0.bias", "net.1.weight", "scale"], [0, 0, 1, 1]
    assert assign_blocks(names, groups, "tensor") == ([0, 1, 2, 3], names)
    assert assign_blocks(names, groups, "layer") == ([0, 0, 1, 2], ["net.0", "net.1", "scale"])
    assert assign_blocks(names, groups, "global") == ([0, 0, 1, 1], ["global/group0", "global/group1"])
    assert assign_blocks(names, [0] * 4, lambda name: name[:3]) == ([0, 0, 0, 1], ["net", "sca"])
