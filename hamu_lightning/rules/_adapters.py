"""Low-rank adapters: which tensors are factors of a change of which weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hamu_lightning.checks import check_positive, check_type, describe, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import compute_gramian, widest_float

# As PEFT and loralib name the factors: of linear and convolutional layers, and of embeddings.
_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
# The bound of a spectral norm is at most so many squarings from sharp: a factor of r^(1 / 2^7) for rank r.
_SQUARINGS = 6


@dataclass(frozen=True, eq=False)
class Adapter:
    """A weight that is the sum of a base and a product of two factors: `W + s B A` (LoRA, Hu et al. 2021).

    Args:
        down: A, `[r, in]`; more dimensions behind the first are one.
        up: B, `[out, r]`; likewise.
        base: W, of any shape: its Frobenius norm is the unit in which changes are measured.
        scaling: s, positive.

    Raises:
        HAMUValueError: If the factors do not fit, or a tensor holds no floating point numbers.

    Example:
        >>> adapter = Adapter(torch.ones(1, 3), torch.zeros(2, 1), torch.ones(2, 3), scaling=2.0)
        >>> adapter.base_norm()
        tensor(2.4495, dtype=torch.float64)
    """

    down: Tensor
    up: Tensor
    base: Tensor
    scaling: float = 1.0
    _norms: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the tensors."""
        for name in ("down", "up", "base"):
            check_type(name, getattr(self, name), Tensor, "a tensor")
        cure = "Give up [out, r] and down [r, in]."
        if min(self.up.dim(), self.down.dim()) < 2 or self.up.shape[1:].numel() != self.down.shape[0]:
            found = f"{list(self.up.shape)} and {list(self.down.shape)}"
            raise HAMUValueError(f"Expected `up` and `down` to have a product, but got shapes {found}. {cure}")
        store(self, scaling=check_positive("scaling", self.scaling))

    def base_norm(self) -> Tensor:
        """|W|_F, 0-d; known until the weight is written to."""
        version = self.base._version
        if version not in self._norms:
            self._norms.clear()
            self._norms[version] = compute_gramian([self.base.detach()]).reshape(()).sqrt()
        return self._norms[version]


def find_adapters(module: nn.Module) -> tuple[Adapter, ...]:
    """The low-rank adapters of a module, found by structure: PEFT's, loralib's, and others of the same form.

    A submodule with `scaling` and `lora_A`, `lora_B` (of an embedding `lora_embedding_A`, `lora_embedding_B`): layers,
    tensors, or mappings of them by the adapter's name. The base is the weight of its `base_layer`, or its own.
    Bases that hold no floating point numbers (quantised ones) have no norm that is known here, and are left out.

    Args:
        module: The module, with its adapters in place.

    Returns:
        All adapters, whether they are trained or not.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.lora_A, layer.lora_B, layer.scaling = nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False), 2.0
        >>> [adapter.scaling for adapter in find_adapters(nn.Sequential(layer))]
        [2.0]
    """
    return tuple(adapter for part in module.modules() for adapter in _adapters_of(part))


def pair_adapters(
    named_parameters: Iterable[tuple[str, Tensor]],
    scaling: float,
    *,
    down: str = "lora_A",
    up: str = "lora_B",
    base: str = "base_layer.weight",
) -> tuple[Adapter, ...]:
    """The low-rank adapters among tensors, by their names: for adapters that `find_adapters` does not know.

    Args:
        named_parameters: Names and tensors, as from `module.named_parameters()`, with the frozen ones.
        scaling: s, the same for all.
        down: What the name of each A holds.
        up: What stands in its place in the name of B.
        base: What stands in the place of it, and of what follows, in the name of the base.

    Returns:
        The adapters.

    Raises:
        HAMUValueError: If there is none, or a partner or base is not among the names.

    Example:
        >>> tensors = {"q.a": torch.ones(1, 3), "q.b": torch.zeros(2, 1), "q.weight": torch.ones(2, 3)}
        >>> len(pair_adapters(tensors.items(), scaling=2.0, down="a", up="b", base="weight"))
        1
    """
    tensors = dict(named_parameters)
    found = []
    for name in tensors:
        before, at, after = name.rpartition(down)
        if at:
            partners = {"up": f"{before}{up}{after}", "base": f"{before}{base}"}
            missing = next((partner for partner in partners.values() if partner not in tensors), None)
            if missing is not None:
                raise HAMUValueError(f"Expected {missing!r} beside {name!r}, but got no tensor of that name.")
            found.append(Adapter(tensors[name], tensors[partners["up"]], tensors[partners["base"]], scaling))
    if not found:
        raise HAMUValueError(f"Expected names that hold {down!r}, but got none. Pass the adapters' own name as `down`.")
    return tuple(found)


def bound_spectral_norms(factors: list[Tensor]) -> Tensor:
    """For each matrix a number that is at least its spectral norm and at most `r^(1/128)` times it.

    docs/method.md#radii, eq. 4.15.

    Args:
        factors: `[r, n]` each, whatever their r and n.

    Returns:
        `[len(factors)]`, float64; zero for zero, NaN for NaN.

    Example:
        >>> bound_spectral_norms([torch.diag(torch.tensor([3.0, 1.0]))]).round(decimals=3)
        tensor([3.], dtype=torch.float64)
    """
    dtype, device = widest_float(factors[0].device), factors[0].device
    squares = torch.zeros(len(factors), dtype=dtype, device=device)
    ranks = [len(factor) for factor in factors]
    for rank in dict.fromkeys(ranks):
        places = [i for i, r in enumerate(ranks) if r == rank]
        grams = torch.stack([_gram(factors[i].to(dtype)) for i in places])  # [k, r, r]
        squares[torch.tensor(places, device=device)] = _bound_largest(grams)
    return squares.sqrt()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, detached."""
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach()


def _gram(factor: Tensor) -> Tensor:
    return factor @ factor.T


def _bound_largest(grams: Tensor) -> Tensor:
    """`tr(G^64)^(1/64)` for each G, which is at least its largest eigenvalue; no host read, unlike eigenvalues."""
    tiny = torch.finfo(grams.dtype).tiny
    trace = first = _trace(grams)
    logarithm = first.clamp(min=tiny).log()
    for halvings in range(1, _SQUARINGS + 1):
        grams = grams / trace.clamp(min=tiny)[:, None, None]
        grams = grams @ grams
        trace = _trace(grams)
        logarithm = logarithm + trace.clamp(min=tiny).log() / 2**halvings
    return torch.where(first == 0, 0, logarithm.exp())


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _adapters_of(part: nn.Module) -> Iterator[Adapter]:
    scaling = _held(part, "scaling")
    if scaling is None:
        return
    for names in _FACTORS:
        downs, ups = (_held(part, name) for name in names)
        for key in _keys(downs):
            down, up = _weight(_entry(downs, key)), _weight(_entry(ups, key))
            base = None if down is None or up is None else _find_base(part)
            if down is not None and up is not None and base is not None and base.is_floating_point():
                yield Adapter(down, up, base, float(_entry(scaling, key)))


def _held(part: nn.Module, name: str) -> Any:
    """What a module holds under a name. Properties are not asked: reading one may change the module."""
    stores = (vars(part), part._parameters, part._modules, part._buffers)
    return next((store[name] for store in stores if name in store), None)


def _find_base(part: nn.Module) -> Tensor | None:
    inner = part
    while isinstance(_held(inner, "base_layer"), nn.Module):
        inner = _held(inner, "base_layer")
    return _weight(inner)


def _keys(factors: Any) -> list[str | None]:
    """The names of a layer's adapters; one without a name where there is no mapping of them."""
    if factors is None:
        return []
    return list(factors.keys()) if _is_mapping(factors) else [None]


def _entry(given: Any, key: str | None) -> Any:
    if not _is_mapping(given):
        return given
    return given[key] if key in given else None


def _is_mapping(given: Any) -> bool:
    return isinstance(given, Mapping | nn.ModuleDict | nn.ParameterDict)


def _weight(given: Any) -> Tensor | None:
    found = given if isinstance(given, Tensor) else getattr(given, "weight", None)
    return found if isinstance(found, Tensor) else None


def check_adapters(adapters: object) -> tuple[Adapter, ...]:
    """Raise unless something holds adapters; return them.

    Raises:
        HAMUValueError: If it does not.
    """
    found = tuple(adapters) if isinstance(adapters, Iterable) else (adapters,)
    for adapter in found:
        if not isinstance(adapter, Adapter):
            raise HAMUValueError(
                f"Expected `adapters` to be what `find_adapters(module)` returns, but got {describe(adapter)} in it."
            )
    return found
