"""The LoRA linear layer for K clients at once, on one frozen weight.

Tokens of the input belong to clients in runs: first client 0's, then client 1's. Client k's tokens see the base weight
W and its own factors A_k (r, d_in), B_k (d_out, r):   y = x W^T + s_k (x A_k^T) B_k^T.   K = 1 is plain LoRA. With a
core R_k (r, r) between them, B_k R_k takes the place of B_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloom.client.adapted import Adapted, Owners, Spans
from fedloom.client.quantize import Quantised
from fedloom.factors import Factors


def multiply(x: Tensor, factors: Tensor, spans: Spans) -> Tensor:
    """Return each client's tokens times its factor: x (n, m), factors (K, m, p) -> (n, p)."""
    clients = factors.shape[0]
    if clients == 1:
        return x @ factors[0]
    if _even(spans):
        return torch.bmm(x.reshape(clients, -1, x.shape[-1]), factors).flatten(0, 1)
    out = x.new_empty(x.shape[0], factors.shape[-1])
    for part, xk, factor in zip(out.split(spans), x.split(spans), factors, strict=True):
        torch.mm(xk, factor, out=part)
    return out


def add_product(y: Tensor, x: Tensor, factors: Tensor, spans: Spans) -> Tensor:
    """Add `multiply(x, factors, spans)` to y (n, p), in place."""
    clients = factors.shape[0]
    if clients == 1:
        return y.addmm_(x, factors[0])
    if _even(spans):
        y.view(clients, -1, y.shape[-1]).baddbmm_(x.reshape(clients, -1, x.shape[-1]), factors)
        return y
    for part, xk, factor in zip(y.split(spans), x.split(spans), factors, strict=True):
        part.addmm_(xk, factor)
    return y


def correlate(u: Tensor, x: Tensor, clients: int, spans: Spans) -> Tensor:
    """Return each client's u^T x, summed over its tokens: u (n, m), x (n, p) -> (K, m, p)."""
    if clients == 1:
        return (u.mT @ x)[None]
    if _even(spans):
        return torch.bmm(u.reshape(clients, -1, u.shape[-1]).mT, x.reshape(clients, -1, x.shape[-1]))
    return torch.stack([uk.mT @ xk for uk, xk in zip(u.split(spans), x.split(spans), strict=True)])


def _even(spans: Spans) -> bool:
    return spans is None or min(spans) == max(spans)


class _Fused(torch.autograd.Function):
    """Layers that share an input as one node: low-rank products are added in place, no float32 copy of an activation.

    With dy_g the gradient of layer g's y_g and u_g = x A_g^T (the A_g of all layers are one factor):
        dB_g = s dy_g^T u_g,   dA_g = s (dy_g B_g)^T x,   dx = sum_g dy_g W_g + s (dy_g B_g) A_g.
    The weight is read again in the backward pass, so a quantised one exists densely for a moment only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[LoraLinear], *factors: Tensor) -> tuple[Tensor, ...]:
        # x (n, d_in); factors: a (K, r, d_in), b (K, d_out, r) of each layer
        spans = layers[0].spans.tokens
        a_low = torch.cat([a.to(x.dtype) for a in factors[::2]], 1) if len(layers) > 1 else factors[0].to(x.dtype)
        b_low = [(b * layer.scale).to(x.dtype) for layer, b in zip(layers, factors[1::2], strict=True)]
        u = multiply(x, a_low.mT, spans)  # (n, g r)
        outs = []
        for layer, b, ug in zip(layers, b_low, _columns(u, factors), strict=True):
            outs.append(add_product(layer.frozen(x), ug, b.mT, spans))
        ctx.save_for_backward(x, u, a_low, *b_low)
        ctx.layers, ctx.spans, ctx.dtype = layers, spans, factors[0].dtype
        ctx.ranks = [a.shape[1] for a in factors[::2]]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, u, a_low, *b_low = ctx.saved_tensors
        clients, grads = a_low.shape[0], []
        dys = tuple(dy.contiguous() for dy in dys)
        dus = [multiply(dy, b, ctx.spans) for dy, b in zip(dys, b_low, strict=True)]  # (n, r) each, already times s
        du = torch.cat(dus, 1) if len(dus) > 1 else dus[0]
        da = correlate(du, x, clients, ctx.spans)
        for layer, dy, ug, dag in zip(ctx.layers, dys, u.split(ctx.ranks, 1), da.split(ctx.ranks, 1), strict=True):
            # u^T dy, transposed after: the CPU's kernels are twice as fast on this shape
            db = correlate(ug, dy, clients, ctx.spans).mT.to(ctx.dtype) * layer.scale
            grads += [dag.to(ctx.dtype), db]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ ctx.layers[0].weight()
            for layer, dy in zip(ctx.layers[1:], dys[1:], strict=True):
                dx.addmm_(dy, layer.weight())
            add_product(dx, du, a_low, ctx.spans)
        return dx, None, *grads


def _columns(u: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    return list(u.split([a.shape[1] for a in factors[::2]], 1))


@dataclass(slots=True)
class Beside:
    """Further adapters of a layer, beside its main one (`fedloom.slots`).

    Attributes:
        pairs: A (K, r_i, d_in) and B (K, d_out, r_i) of each slot.
        scales: (K, 1, 1) of each: its scale as a factor of the main one's.
        mix: (K, slots) weights, the main one's first; None: ones.
        router: (K, slots, d_in), whose softmax over the slots weighs them token by token; None: `mix` does.
    """

    pairs: list[tuple[Tensor, Tensor]]
    scales: list[Tensor]
    mix: Tensor | None = None
    router: Tensor | None = None

    def joined(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of the summed rank: fixed weights and scales go into B; differentiable."""
        bs = [b, *(one * scale for (_, one), scale in zip(self.pairs, self.scales, strict=True))]
        if self.mix is not None:
            bs = [one * self.mix[:, i, None, None] for i, one in enumerate(bs)]
        return torch.cat([a, *(one for one, _ in self.pairs)], 1), torch.cat(bs, 2)

    def weights(self, x: Tensor, k: int, rank: int) -> Tensor:
        """Return the router's weight of every column of u for client k's tokens x (n, d_in); in float32 at least."""
        if self.router is None:
            raise TypeError("this mixture has no router")
        told = functional.linear(x, self.router[k].to(x.dtype))
        weights = torch.softmax(told.to(torch.promote_types(told.dtype, torch.float32)), -1)
        ranks = torch.tensor([rank, *(a.shape[1] for a, _ in self.pairs)], device=x.device)
        return weights.repeat_interleave(ranks, 1)


@dataclass(slots=True)
class Siblings:
    """Layers that the model calls one after another with the same input: the first call computes all of them."""

    layers: tuple[LoraLinear, ...]
    _input: Tensor | None = None
    _outs: dict[int, Tensor] | None = None

    def call(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """Return the layer's output for x, which is (..., d_in)."""
        if self._outs is not None and x is self._input and id(layer) in self._outs:
            out = self._outs.pop(id(layer))
            if not self._outs:
                self._input = self._outs = None
            return out
        outs = fused(x, self.layers)
        self._outs = {id(one): out for one, out in zip(self.layers, outs, strict=True)}
        out = self._outs.pop(id(layer))
        self._input = x
        return out

    def forget(self) -> None:
        """Let go of outputs that nobody asked for."""
        self._input = self._outs = None


def fused(x: Tensor, layers: Sequence[LoraLinear]) -> list[Tensor]:
    """Return the output of each layer for the same x (..., d_in), as one node of the graph."""
    factors = [factor for layer in layers for factor in layer.factors()]
    flat = x.reshape(-1, x.shape[-1])
    outs = _Fused.apply(flat, tuple(layers), *factors)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outs]


class LoraLinear(Adapted):
    """A frozen linear layer with the low-rank factors of K clients beside it.

    Attributes:
        a, b: (K, r, d_in) and (K, d_out, r), set by `Attached.load`; a smaller rank is padded with zeros.
        core: (K, r, r), what stands between B and A; None: nothing does.
        beside: further adapters in the same pass; None: there are none.
        scale: s, or (K, 1, 1) of them where clients have different ranks.
        streams: one generator a client while training with dropout; empty means no dropout.
        siblings: the layers that are computed together with this one; None: it stands alone.
        change: what is added to a quantised weight: factors (d_out, r), (r, d_in), and a dense (d_out, d_in).
    """

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Module, r: int, dropout: float, reference: bool, owners: Owners) -> None:
        super().__init__(base, owners)
        self.r, self.p, self.exact = r, dropout, reference
        self.core: Tensor | None = None
        self.beside: Beside | None = None
        self.scale: float | Tensor = 1.0
        self.streams: tuple[torch.Generator, ...] = ()
        self.siblings: Siblings | None = None
        self.change: tuple[Tensor, ...] = ()
        self._untouched: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (K, r, d_in) and B (K, d_out, r), a core multiplied into B, all slots in one; differentiable."""
        if self.beside is not None:
            return self.beside.joined(self.a, self.b)
        return self.a, self.b if self.core is None else self.b @ self.core

    def weight(self) -> Tensor:
        """Return the frozen weight with its change, as (d_out, d_in)."""
        weight = super().weight()
        for i in range(0, len(self.change) - 1, 2):
            weight = torch.addmm(weight, self.change[i], self.change[i + 1])
        return weight + self.change[-1] if len(self.change) % 2 else weight

    def frozen(self, x: Tensor) -> Tensor:
        """Return the frozen layer's output, with the change of its weight."""
        out: Tensor = functional.linear(x, self.weight(), self.base.bias) if self.change else self.base(x)  # type: ignore[arg-type]
        return out

    def shift(self, dense_part: Tensor | None, low: Factors | None) -> None:
        """Let the frozen weight be the untouched one plus a dense and a low-rank change, rounded once; None: nothing.

        A quantised weight stays as it is, and the change beside it.
        """
        if isinstance(self.base, Quantised):
            kept = [low.b * low.scale, low.a] if low is not None else []
            kept += [dense_part] if dense_part is not None else []
            self.change = tuple(t.to(self.base.weight.device, self.base.dtype) for t in kept)
            return
        weight: Tensor = self.base.weight.data  # type: ignore[assignment]
        if self._untouched is None:
            self._untouched = weight.clone()
        parts = [part for part in (dense_part, low.product() if low is not None else None) if part is not None]
        total = self._untouched
        for part in parts:
            total = total + self.like_base(part).to(weight.device)
        weight.copy_(total)

    def delta(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return s B A in the layout of the base weight, for one client: a (r, d_in), b (d_out, r)."""
        return self.like_base(scale * (b @ a))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        dropping = bool(self.streams) and self.p > 0
        if self.exact or dropping or (self.beside is not None and self.beside.router is not None):
            return self._plain(x, dropping)
        if self.siblings is not None:
            return self.siblings.call(self, x)
        return fused(x, (self,))[0]

    def _plain(self, x: Tensor, dropping: bool) -> Tensor:
        y = self.frozen(x)
        # the reference path computes as peft does: activations rise to the factors' dtype
        dtype = self.a.dtype if self.exact else x.dtype
        low = x.reshape(-1, self.d_in).to(dtype)
        parts = low.split(self.spans.tokens or len(low) // len(self.a))
        (a, b), outs = self.factors(), []
        for k, part in enumerate(parts):
            if dropping:
                part = part * self._keep(part, self.streams[k])
            u = functional.linear(part, a[k].to(dtype))
            if self.beside is not None and self.beside.router is not None:
                u = u * self.beside.weights(parts[k], k, self.a.shape[1]).to(dtype)
            outs.append(functional.linear(u, b[k].to(dtype)) * self._scale(k))
        low = outs[0] if len(outs) == 1 else torch.cat(outs)
        return (y + low.view(y.shape)).to(y.dtype)

    def _scale(self, k: int) -> float | Tensor:
        return self.scale[k] if isinstance(self.scale, Tensor) else self.scale

    def _keep(self, x: Tensor, stream: torch.Generator) -> Tensor:
        """Draw the dropout mask of one client's tokens from its own stream, scaled by 1 / (1 - p)."""
        return (torch.rand(x.shape, generator=stream) >= self.p).to(x.device, x.dtype) / (1 - self.p)
