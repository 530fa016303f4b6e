"""The trainable tensors of K clients in one buffer, which train in one pass and step in a few large operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedloom.types import Tensors

Shape = tuple[int, ...]


class Stack:
    """K clients' tensors, each name a (K, *shape) view into one (K, P) buffer; client k's row holds all it trains.

    Clients may have smaller tensors than others (another LoRA rank): theirs are padded with zeros, which a LoRA layer
    keeps at zero, since the gradient of a padded row of A is a product with a padded column of B, and the reverse.

    Attributes:
        views: name -> (K, *shape), a leaf of the graph.
        flat, grad: (K, P) values and gradients of the names that move.
    """

    def __init__(
        self,
        clients: Sequence[Tensors],
        device: torch.device,
        dtype: torch.dtype,
        moving: Callable[[str], bool] | None = None,
    ) -> None:
        self.names = list(clients[0])
        self._own = [{name: tuple(one[name].shape) for name in self.names} for one in clients]
        self.shapes: dict[str, Shape] = {
            name: tuple(max(sizes) for sizes in zip(*(own[name] for own in self._own), strict=True))
            for name in self.names
        }
        self.moving = [name for name in self.names if moving is None or moving(name)]
        self._still = {
            name: torch.stack([self._padded(name, one[name], device, dtype) for one in clients])
            for name in self.names
            if name not in set(self.moving)
        }
        self.flat = torch.stack([self.pack(one, device, dtype) for one in clients])
        self._view()

    def __len__(self) -> int:
        return len(self.flat)

    def pack(self, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return one client's tensors as a (P,) row; a moving name that is absent counts as zero."""
        size = sum(torch.Size(self.shapes[name]).numel() for name in self.moving)
        row, first = torch.zeros(size, device=device, dtype=dtype), 0
        for name in self.moving:
            shape = self.shapes[name]
            numel = torch.Size(shape).numel()
            if name in tensors:
                _corner(row[first : first + numel].view(shape), tensors[name].shape).copy_(tensors[name])
            first += numel
        return row

    def client(self, k: int) -> dict[str, Tensor]:
        """Return client k's tensors in its own shapes, differentiable."""
        return {name: _corner(view[k], self._own[k][name]) for name, view in self.views.items()}

    def values(self, k: int) -> dict[str, Tensor]:
        """Return copies of client k's tensors on the CPU."""
        with torch.no_grad():
            return {
                name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in self.client(k).items()
            }

    def keep(self, clients: Sequence[int]) -> None:
        """Go on with these clients alone, numbered anew in the order given."""
        self._own = [self._own[k] for k in clients]
        self._still = {name: value[list(clients)] for name, value in self._still.items()}
        self.flat = self.flat[list(clients)]
        self._view()

    def ranks(self, name: str) -> list[Shape]:
        """Return the true shape of a name, client by client."""
        return [own[name] for own in self._own]

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        self.grad.zero_()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar to those that are there."""
        leaves = [self.views[name] for name in self.moving]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for gradient, part in zip(self._grads, found, strict=True):
            if part is not None:
                gradient.add_(part)

    def grads(self, k: int) -> list[Tensor]:
        """Return client k's gradients, a tensor a moving name."""
        return [gradient[k] for gradient in self._grads]

    def _view(self) -> None:
        self.grad = torch.zeros_like(self.flat)
        values, self._grads = self._cut(self.flat), self._cut(self.grad)
        moving = {n: v.detach().requires_grad_(True) for n, v in zip(self.moving, values, strict=True)}
        self.views: Mapping[str, Tensor] = {n: moving[n] if n in moving else self._still[n] for n in self.names}

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """Return a (K, *shape) view of a (K, P) buffer for every moving name."""
        sizes = [torch.Size(self.shapes[name]).numel() for name in self.moving]
        cuts = zip(self.moving, flat.split(sizes, 1), strict=True)
        return [part.view(-1, *self.shapes[name]) for name, part in cuts]

    def _padded(self, name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(self.shapes[name], device=device, dtype=dtype)
        _corner(out, value.shape).copy_(value)
        return out


def _corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the part of `tensor` from index 0 up to `shape` in every dimension."""
    return tensor[tuple(slice(size) for size in shape)] if tuple(tensor.shape) != tuple(shape) else tensor
