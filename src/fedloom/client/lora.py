"""The LoRA linear layer with a leading client axis.

Rows of the input belong to K clients in equal blocks: x (K b, ..., d_in). Client k's rows see W and its own factors
A_k (r, d_in), B_k (d_out, r):   y = x W^T + s (x A_k^T) B_k^T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedloom.types import ModelError


class _FusedLora(torch.autograd.Function):
    """The layer as one node: the low-rank product is added in place, no float32 copy of an activation is made.

    Gradients, with dy the gradient of y and u = x A^T:
        dB = s dy^T u,   dA = s (dy B)^T x,   dx = dy W + s (dy B) A.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:  # noqa: PLR0917, PLR0913
        # x (K n, d_in), a (K, r, d_in), b (K, d_out, r)
        clients = a.shape[0]
        a_low, b_low = a.to(x.dtype), (b * scale).to(x.dtype)
        xk = x.view(clients, -1, x.shape[-1])
        u = torch.bmm(xk, a_low.mT)  # (K, n, r)
        y = functional.linear(x, weight, bias)
        y.view(clients, -1, y.shape[-1]).baddbmm_(u, b_low.mT)
        ctx.save_for_backward(x, weight, a_low, b_low, u)
        ctx.scale, ctx.dtype = scale, a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x, weight, a_low, b_low, u = ctx.saved_tensors
        clients = a_low.shape[0]
        dy = dy.contiguous()
        dyk, xk = dy.view(clients, -1, dy.shape[-1]), x.view(clients, -1, x.shape[-1])
        du = torch.bmm(dyk, b_low)  # (K, n, r), already times s
        da = torch.bmm(du.mT, xk).to(ctx.dtype) if ctx.needs_input_grad[3] else None
        # u^T dy, transposed after: the CPU's kernels are twice as fast on this shape
        db = torch.bmm(u.mT, dyk).mT.to(ctx.dtype) * ctx.scale if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.view(clients, -1, dx.shape[-1]).baddbmm_(du, a_low)
        return dx, None, None, da, db, None


class LoraLinear(nn.Module):
    """A frozen linear layer with the low-rank factors of K clients beside it.

    Attributes:
        base: the layer that was replaced.
        lora_A, lora_B: (K, r, d_in) and (K, d_out, r).
        enabled: False computes the base alone.
        streams: one generator a client while training with dropout; empty means no dropout.
    """

    def __init__(self, base: nn.Module, r: int, scale: float, dropout: float, reference: bool) -> None:
        super().__init__()
        self.base, self.r, self.scale, self.p = base, r, scale, dropout
        self.transposed = isinstance(base, Conv1D)
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.d_out, self.d_in = reversed(weight.shape) if self.transposed else weight.shape
        self.fused = not reference and type(base) is nn.Linear
        self.exact = reference
        self.enabled = True
        self.streams: tuple[torch.Generator, ...] = ()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(1, r, self.d_in, dtype=dtype, device=weight.device), requires_grad=False)
        self.lora_B = nn.Parameter(
            torch.zeros(1, self.d_out, r, dtype=dtype, device=weight.device), requires_grad=False
        )

    @staticmethod
    def check(name: str, module: nn.Module) -> None:
        """Raise ModelError unless a LoRA layer can stand for `module`."""
        if not isinstance(module, nn.Linear | Conv1D):
            raise ModelError(
                f"adapter.targets: {name} is a {type(module).__name__}; LoRA here adapts linear layers only"
            )

    def load(self, a: Tensor, b: Tensor) -> None:
        """Set the factors of K clients: a (K, r, d_in), b (K, d_out, r); copies are made in at least float32."""
        like = self.lora_A
        self.lora_A = nn.Parameter(a.to(like.device, like.dtype, copy=True))
        self.lora_B = nn.Parameter(b.to(like.device, like.dtype, copy=True))

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """Return s B A in the layout of the base weight, for one client: a (r, d_in), b (d_out, r)."""
        product = self.scale * (b @ a)
        return product.T if self.transposed else product

    def forward(self, x: Tensor) -> Tensor:
        """Map (K b, ..., d_in) to (K b, ..., d_out)."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        dropping = bool(self.streams) and self.p > 0
        if self.fused and not dropping:
            flat = x.reshape(-1, x.shape[-1])
            y = _FusedLora.apply(flat, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)
            return y.view(*x.shape[:-1], self.d_out)  # type: ignore[no-any-return]
        return self._plain(x, dropping)

    def _plain(self, x: Tensor, dropping: bool) -> Tensor:
        y = self.base(x)
        # the reference path computes as peft does: activations rise to the factors' dtype
        dtype = self.lora_A.dtype if self.exact else x.dtype
        low = x.to(dtype)
        if dropping:
            low = low * self._keep(x, dtype)
        low = low.reshape(self.lora_A.shape[0], -1, self.d_in)
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
        if a.shape[0] == 1:
            low = functional.linear(functional.linear(low[0], a[0]), b[0])
        else:
            low = torch.bmm(torch.bmm(low, a.mT), b.mT)
        return (y + (low * self.scale).view(y.shape)).to(y.dtype)  # type: ignore[no-any-return]

    def _keep(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Draw the dropout mask of each client's rows from its own stream, scaled by 1 / (1 - p)."""
        rows = x.shape[0] // len(self.streams)
        masks = [torch.rand((rows, *x.shape[1:]), generator=stream) >= self.p for stream in self.streams]
        return torch.cat(masks).to(x.device, dtype) / (1 - self.p)
