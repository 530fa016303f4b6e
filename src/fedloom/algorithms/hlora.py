"""HLoRA (Liu et al., arXiv 2503.00813): FlexLoRA's server for clients of ranks drawn at random.

    server:    W = sum_k p_k B_k A_k,   W = U S V^T
    client k:  starts from the first r_k directions

On the wire: as FlexLoRA. The ranks are those of `adapter.ranks`.

Differs from the paper in: it leaves out the scale s_k of LoRA, which is right where all clients have the same one.
Here s_k depends on the rank, so the products that are averaged are s_k B_k A_k: what the clients' layers add to their
weights. With one rank at all clients s cancels, and this is the paper.
"""

from __future__ import annotations

from fedloom.algorithms.flexlora import FlexLora


class HLora(FlexLora, name="hlora"):
    """FlexLoRA under the name of another paper."""
