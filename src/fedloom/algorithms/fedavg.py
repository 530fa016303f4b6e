"""FedAvg (McMahan et al., arXiv 1602.05629); on LoRA factors it is FedIT (arXiv 2305.05644).

    client k:  w_k = local steps from w^t on its own loss
    server:    w^{t+1} = w^t + eta_s sum_k p_k (w_k - w^t),   p_k = n_k / sum_j n_j  (or 1/K)

On the wire: down w, up w_k - w; b P bytes each for P trainable parameters of b bytes.

Differs from the paper in: the change is sent instead of the weights (the same mean; transforms need the change);
the optimiser is built afresh every round. A and B of LoRA are averaged apart, so the product of the means is not the
mean of the products; the methods that mend this are algorithms of their own.
"""

from __future__ import annotations

from fedloom.algorithms.base import Algorithm


class FedAvg(Algorithm, name="fedavg"):
    """Federated averaging: the weighted mean of the clients' changes."""
