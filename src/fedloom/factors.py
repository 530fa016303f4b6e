"""LoRA factors: what can be computed from (A, B, s) without ever building s B A.

A (r, d_in) and B (d_out, r) of one layer stand for the update s B A of its weight. Layers that keep their weight
transposed (GPT-2's Conv1D) have the same factors; only what adds the product to a weight minds the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.types import Tensors

Scale = Callable[[int], float]
"""Rank -> what the product of a pair of that rank is multiplied by: alpha / r, or alpha / sqrt r."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's update s B A: a (r, d_in), b (d_out, r)."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.a)

    def product(self) -> Tensor:
        """Return s B A, (d_out, d_in)."""
        return self.scale * (self.b @ self.a)

    def times(self, factor: float) -> Factors:
        """Return the factors of `factor` s B A."""
        return Factors(self.a, self.b, self.scale * factor)


def pairs(params: Tensors, scale: Scale) -> dict[str, Factors]:
    """Return module -> factors of an adapter; the scale of each pair is that of its rank.

    Raises:
        ValueError: a name is neither `<module>.lora_A` nor `<module>.lora_B`, or one of a pair is missing.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in params))
    expected = {f"{module}.{kind}" for module in modules for kind in ("lora_A", "lora_B")}
    if odd := sorted(expected ^ set(params)):
        raise ValueError(f"these are not LoRA factors in pairs: {odd[:3]}")
    return {
        m: Factors(params[f"{m}.lora_A"], params[f"{m}.lora_B"], scale(len(params[f"{m}.lora_A"]))) for m in modules
    }


def unpaired(of: Mapping[str, Factors], scale: Scale) -> dict[str, Tensor]:
    """Return the adapter whose pairs have the same products under `scale`; what differs goes into B."""
    params = {}
    for module, pair in of.items():
        params[f"{module}.lora_A"] = pair.a
        params[f"{module}.lora_B"] = pair.b * (pair.scale / scale(pair.rank))
    return params


def inner(x: Factors, y: Factors) -> float:
    """Return the Frobenius inner product <x, y> = s_x s_y tr(A_y A_x^T B_x^T B_y) in float64, from r x r matrices."""
    left, right = x.b.double().mT @ y.b.double(), x.a.double() @ y.a.double().mT
    return x.scale * y.scale * float((left * right).sum())


def norm(x: Factors) -> float:
    """Return ||s B A||_F, from the triangular factors of B and A^T, so that a small norm is exact too."""
    if x.rank >= min(x.a.shape[1], x.b.shape[0]):
        return abs(x.scale) * float(torch.linalg.matrix_norm(x.b.double() @ x.a.double()))
    left, right = (torch.linalg.qr(t.double(), mode="r").R for t in (x.b, x.a.mT))
    return abs(x.scale) * float(torch.linalg.matrix_norm(left @ right.mT))


def sq_distance(x: Mapping[str, Factors], y: Mapping[str, Factors]) -> float:
    """Return sum over modules of ||s_x B_x A_x - s_y B_y A_y||_F^2, which no change of basis of the factors changes."""
    return max(0.0, math.fsum(inner(x[m], x[m]) + inner(y[m], y[m]) - 2 * inner(x[m], y[m]) for m in x))


def stack(parts: Iterable[Factors]) -> Factors:
    """Return factors of summed rank whose product is the sum of the products: scales go into A, the scale is 1."""
    parts = list(parts)
    return Factors(torch.cat([p.a * p.scale for p in parts]), torch.cat([p.b for p in parts], 1))


def stack_all(adapters: Iterable[tuple[float, Mapping[str, Factors]]]) -> dict[str, Factors]:
    """Return module -> factors of summed rank of sum_k weight_k s_k B_k A_k.

    Args:
        adapters: (weight, module -> factors) of each adapter; all have the same modules.
    """
    several = [{module: pair.times(weight) for module, pair in one.items()} for weight, one in adapters]
    return {module: stack(one[module] for one in several) for module in several[0]}


def svd(x: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (d_out, k), S (k,) descending and V^T (k, d_in) with s B A = U diag(S) V^T, k = min(r, d_out, d_in).

    Two QR decompositions and the SVD of the small core; the d_out x d_in matrix is built only where the rank is not
    smaller than it.
    """
    if x.rank >= min(x.a.shape[1], x.b.shape[0]):
        u, s, vh = torch.linalg.svd(x.product(), full_matrices=False)
        return u, s, vh
    left, right = torch.linalg.qr(x.b), torch.linalg.qr(x.a.mT)
    u, s, vh = torch.linalg.svd(x.scale * (left.R @ right.R.mT))
    return left.Q @ u, s, vh @ right.Q.mT


def truncate(x: Factors, rank: int) -> Factors:
    """Return the best approximation of s B A of a rank (Eckart-Young): B = U diag(S), A = V^T, scale 1.

    A rank above what there is to tell is padded with zero columns of B and rows of A.
    """
    u, s, vh = svd(x)
    return resized(Factors(vh[:rank], u[:, :rank] * s[:rank]), rank)


def resized(x: Factors, rank: int) -> Factors:
    """Return the first `rank` rows of A and columns of B, or both padded with zeros up to it; the scale stays."""
    if x.rank >= rank:
        return Factors(x.a[:rank], x.b[:, :rank], x.scale)
    more = rank - x.rank
    return Factors(
        torch.cat([x.a, x.a.new_zeros(more, x.a.shape[1])]), torch.cat([x.b, x.b.new_zeros(len(x.b), more)], 1), x.scale
    )


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which rank every client has in every module, and what ranks mean.

    Attributes:
        whole: module -> rank of the global adapter, the largest of all.
        of: client -> module -> its rank.
        scale: see `Scale`.
    """

    whole: Mapping[str, int]
    of: Callable[[str], Mapping[str, int]]
    scale: Scale

    def cut(self, params: Tensors, client: str) -> dict[str, Tensor]:
        """Return the first rows of A and columns of B of an adapter, as many as a client has."""
        return self._resize(params, self.of(client))

    def pad(self, params: Tensors) -> dict[str, Tensor]:
        """Return a client's adapter padded with zeros to the global ranks."""
        return self._resize(params, self.whole)

    @staticmethod
    def _resize(params: Tensors, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        return unpaired({m: resized(f, ranks[m]) for m, f in pairs(params, _one).items()}, _one)


def _one(rank: int) -> float:
    return 1.0
