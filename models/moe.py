"""A decoder transformer whose feed-forward layers are mixtures of experts, in named ops."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax, nn

from models.moe_config import MoEConfig
from models.transformer import Attention, FeedForward, Transformer
from sharding.grouped import Product, dropless
from sharding.layers import layers_and_sums
from sharding.ops import einsum, rms_norm
from sharding.params import normal, ones, param, stack, zeros
from sharding.recomputed import recomputed
from sharding.region import wide
from sharding.routing import Route, chosen, combine, dispatch, dropped, seat, top_k

SIGNAL = 2.0**-10
"""What a bias' load error is multiplied by to be its gradient: exact, and too little to count in the gradient's norm."""


class Mixture(nnx.Module):
    """SwiGLU experts, of which each token goes through some (Shazeer et al. 2017, arXiv:1701.06538)."""

    def __init__(self, c: MoEConfig):
        self.config = c
        self.router = param("embed routes", (c.embed, c.experts), normal(c.embed**-0.5))
        if c.bias_rate:
            self.bias = param("routes", (c.experts,), zeros)
            self.bias.set_metadata(rate=c.bias_rate)
        self.gate_up = param("expert embed gates mlp", (c.experts, c.embed, 2, c.mlp), normal(c.embed**-0.5))
        down = (c.mlp * (c.top + c.shared) * 2 * c.layers) ** -0.5
        self.down = param("expert mlp embed", (c.experts, c.mlp, c.embed), normal(down))
        if c.shared:
            self.shared = FeedForward(dataclasses.replace(c, mlp=c.shared * c.mlp))

    def __call__(self, x_BLD: Array, weights_BL: Array, present_BL: Array) -> tuple[Array, dict[str, Array]]:
        """The mixture's output, zero for a token that is not present, and the sums that `statistics` makes."""
        c = self.config
        scores_BLR = einsum(
            "batch length embed, embed routes -> batch length routes", wide(x_BLD), self.router
        )
        bias = self.bias if c.bias_rate else None
        route = top_k(scores_BLR, c.top, present_BL, c.gates, bias)
        sums = statistics(c, scores_BLR, route, weights_BL, bias)
        if math.isinf(c.capacity):
            made_BLD = dropless(x_BLD, route, self.expert, self.gate_up, self.down)
        else:
            seats = seat(route, c.capacity)
            made_BLD = combine(self.experts(dispatch(x_BLD, seats)), seats)
            sums["dropped"] = einsum("batch length, batch length -> batch", dropped(seats), weights_BL)
        return (made_BLD + self.shared(x_BLD) if c.shared else made_BLD), sums

    def experts(self, x_EBSD: Array) -> Array:
        """Every expert over its slots."""
        both = einsum(
            "expert batch slots embed, expert embed gates mlp -> expert batch slots gates mlp",
            x_EBSD,
            self.gate_up,
        )
        # Computed again for the backward pass: elementwise, from what is kept anyway.
        hidden_EBSF = recomputed(lambda both: nn.silu(both[:, :, :, 0]) * both[:, :, :, 1])(both)
        return einsum(
            "expert batch slots mlp, expert mlp embed -> expert batch slots embed", hidden_EBSF, self.down
        )

    def expert(self, rows: Array, product: Product) -> Array:
        """The same for rows that each belong to one expert."""
        both = product(rows, self.gate_up)
        return product(recomputed(lambda both: nn.silu(both[:, 0]) * both[:, 1])(both), self.down)


def statistics(
    c: MoEConfig, scores_BLR: Array, route: Route, weights_BL: Array, bias: nnx.Param | None
) -> dict[str, Array]:
    """Sums over each row's tokens, `batch`: what balances the experts, and how large scores grow.

    balance: E x sum over experts of (share of choices) x (mean probability), times the weight of the row's tokens: 1 a token
    where the load is even (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6). router_z: squared log of the partition function.
    bias: a term that is zero and whose gradient is each expert's load error.
    """
    shares_BLR, probabilities_BLR = chosen(route), nn.softmax(scores_BLR, axis=-1)
    per_row = "batch length routes, batch length -> batch routes"
    weight_B = einsum("batch length -> batch", weights_BL)
    share_BR = einsum(per_row, shares_BLR, weights_BL) / c.top
    mean_BR = einsum(per_row, probabilities_BLR, weights_BL)
    if c.balance_over == "row":
        even_B = einsum("batch routes, batch routes -> batch", share_BR, mean_BR) / jnp.maximum(
            weight_B, 1e-6
        )
    else:
        share_R, mean_R = (einsum("batch routes -> routes", x) for x in (share_BR, mean_BR))
        total = jnp.maximum(einsum("batch ->", weight_B), 1e-6)
        even_B = weight_B * (einsum("routes, routes ->", share_R, mean_R) / jnp.square(total))
    log_BL = nn.logsumexp(scores_BLR, axis=-1)
    sums = {
        "balance": c.experts * even_B,
        "router_z": einsum("batch length, batch length -> batch", jnp.square(log_BL), weights_BL),
    }
    if bias is not None:
        # Whole numbers: no order of sums rounds them. By token, so that devices that split the length have each their part.
        error_BLR = c.experts * shares_BLR - jnp.sum(shares_BLR, axis=-1, keepdims=True)
        term_BL = einsum("batch length routes, routes -> batch length", error_BLR, bias)
        term_B = SIGNAL * einsum("batch length -> batch", term_BL)
        sums["bias"] = term_B - lax.stop_gradient(term_B)
    return sums


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, c: MoEConfig):
        self.attention_norm = param("embed", (c.embed,), ones)
        self.attention = Attention(c)
        self.mlp_norm = param("embed", (c.embed,), ones)
        self.mlp = Mixture(c)

    def __call__(self, x_BLD: Array, weights_BL: Array, *apart: Array) -> tuple[Array, dict[str, Array]]:
        x_BLD = x_BLD + self.attention(rms_norm(x_BLD, self.attention_norm, "batch length embed"), *apart)
        present_BL = (apart[0] if apart else weights_BL) > 0
        made_BLD, sums = self.mlp(
            rms_norm(x_BLD, self.mlp_norm, "batch length embed"), weights_BL, present_BL
        )
        return x_BLD + made_BLD, sums


class MoE(Transformer):
    """Decoder-only language model of mixtures of experts; it reads what `Transformer` reads. What is padding goes to no
    expert: of packed documents what is in no segment, of running text what weighs nothing.
    """

    config: MoEConfig

    def __init__(self, c: MoEConfig):
        super().__init__(c)
        self.layers = stack(Block(c), c.layers)

    def hidden(self, tokens: Array, *apart: Array) -> Array:
        """The residual stream `batch length embed` after the last norm; in running text no token is padding."""
        return self.hidden_and_sums(tokens, jnp.ones(tokens.shape, jnp.float32), *apart)[0]

    def hidden_and_sums(
        self, tokens: Array, weights_BL: Array, *apart: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The residual stream after the last norm, and what the layers sum over each row's tokens."""
        c = self.config
        beside = (weights_BL, *apart)
        x_BLD, sums = layers_and_sums(self.layers, self.entered(tokens), c.remat, c.loop, beside)
        return rms_norm(x_BLD, self.norm, "batch length embed"), sums

    def loss(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Global sums over tokens: those of `Transformer.scored`, means over layers of `balance` (1: even load), `router_z` and
        `dropped` (share of choices), and `objective`, the loss with the auxiliary losses of all layers.
        """
        c = self.config
        x_BLD, rows = self.hidden_and_sums(batch["tokens"], batch["weights"], *self.apart(batch))
        sums = self.scored(x_BLD, batch)
        layers = {name: einsum("batch ->", row) for name, row in rows.items()}
        objective = sums.get("objective", sums["loss"])
        for name, factor in (("balance", c.balance), ("router_z", c.router_z), ("bias", 1.0)):
            if factor and name in layers:
                objective = objective + jnp.asarray(factor, layers[name].dtype) * layers[name]
        layers.pop("bias", None)
        return {**sums, **{name: total / c.layers for name, total in layers.items()}, "objective": objective}
