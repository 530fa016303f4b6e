"""Consensus ADMM with partial participation: FedADMM (Gong et al., arXiv 2204.03529), used for its local adapters.

    minimise   sum_k p_k f_k(w_k)   with all w_k = z
    client k:  w_k <- argmin f_k(w) + rho/2 ||w - z + u_k||^2,   from its own w_k, as far as local steps get
               u_k <- u_k + w_k - z                                          (u = y / rho, the scaled dual)
               up  D_k = (w_k + u_k) after - (w_k + u_k) before
    server:    z <- z + eta sum_{k in S} p_k D_k

eta = 1 / sum_{k in S} p_k makes it the mean over the cohort; eta = 1 keeps z = sum_k p_k (w_k + u_k) over all
clients. With every client in every round they are the same, and z is that mean.

w_k is what client k uses: between its own optimum (rho near 0) and the consensus. u_k remembers how far the consensus
has kept it from its optimum. A client that has never trained has u_k = 0, begins from where everybody did, and uses
z.

On the wire: as FedAvg: down z, up D_k. w_k and u_k never travel. Before the first round every client tells its weight.

Differs from the paper in: its p_k are equal, which is the default here; the number of local steps is the trainer's.
arXiv 2203.15104 has the same client with a regulariser at the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import PositiveFloat

from fedloom import tensors
from fedloom.algorithms.base import Client, Server
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.phases import moved
from fedloom.types import Bundle, ClientUpdate, Memory, Message, Penalty, ServerState, Steps, Tensors, done

OWN, DUAL = "personal", "dual"
"""Names of the memory groups that hold a client's w and u."""


class Admm(FedAvg, name="admm"):
    """Local adapters that agree by dual variables, which every client keeps."""

    personal: ClassVar[bool] = True
    enrols: ClassVar[bool] = True
    mirrored: ClassVar[str] = "w_k + u_k, of which z is the mean,"
    own_combine: ClassVar[str] = "z is the mean of w_k + u_k"
    own_step: ClassVar[str] = "z is the mean of w_k + u_k"

    weighting: Literal["examples", "uniform"] = "uniform"
    """Weight of a client in z: 1, as in the paper, or its true number of training rows."""
    rho: PositiveFloat = 0.01
    """Strength of the pull to z - u_k."""
    over: Literal["all", "cohort"] = "all"
    """Whose mean z is: every client's, absent ones as they were last; or it takes the cohort's mean change in full."""

    def enrol(self, client: Client) -> Steps[Message]:
        return done(Message({"weight": Bundle(scalars={"weight": client.weight})}))

    def admit(self, server: Server, state: ServerState, told: Mapping[str, Message]) -> Steps[ServerState]:
        total = sum(message.groups["weight"].scalars["weight"] for message in told.values())
        return done(replace(state, slots={**state.slots, "everyone": Bundle(scalars={"weight": total})}))

    def train(self, client: Client, message: Message) -> Steps[tuple[ClientUpdate, Memory]]:
        z = message.groups["params"].tensors
        w = client.memory.get(OWN, Bundle(client.initial)).tensors
        u = client.memory[DUAL].tensors if DUAL in client.memory else tensors.zeros_like(w)
        fitted = yield from client.fit(w, penalty=self._pull(tensors.sub(z, u)))
        new = moved(w, fitted)
        dual = tensors.add(u, tensors.sub(new, z))
        change = tensors.sub(tensors.add(new, dual), tensors.add(w, u))
        update = client.update(change, fitted)
        metrics = {
            **update.metrics,
            "dual_norm": tensors.norm(dual),
            "consensus_gap": tensors.norm(tensors.sub(new, z)),
        }
        return replace(update, metrics=metrics), {**client.memory, OWN: Bundle(new), DUAL: Bundle(dual)}

    def trained(self, server: Server, state: ServerState, update: ClientUpdate) -> Tensors | None:
        return None  # it sends what u has become as well

    def step(self, server: Server, state: ServerState, combined: Message) -> Steps[ServerState]:
        change = combined.groups["params"].tensors
        share = combined.groups["cohort"].scalars["weight"] / state.slots["everyone"].scalars["weight"]
        params = tensors.add(state.params, change, alpha=share if self.over == "all" else 1.0)
        return done(replace(state, round=state.round + 1, params=params))

    def own(self, client: Client, message: Message) -> Steps[Tensors]:
        return done(client.memory.get(OWN, message.groups["params"]).tensors)

    def adapt(self, client: Client, message: Message, steps: int) -> Steps[Tensors]:
        own, z = (yield from self.own(client, message)), message.groups["params"].tensors
        to = tensors.sub(z, client.memory[DUAL].tensors) if DUAL in client.memory else z
        fitted = yield from client.fit(own, steps=range(steps), penalty=self._pull(to))
        return fitted.params

    def export(self, state: ServerState, memory: Memory | None = None) -> Mapping[str, Tensors]:
        if memory is None:
            return {"shared": state.params}
        return {"personal": memory.get(OWN, Bundle(state.params)).tensors}

    def _pull(self, to: Tensors) -> Penalty:
        return lambda w: 0.5 * self.rho * tensors.sq_dist(w, to)
