"""What classifiers have in common: the sums that they report of their scores."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array, lax

from sharding.ops import back, cross_entropy, einsum, whole
from sharding.params import Entry


def image_inputs(height: int, width: int, channels: int) -> dict[str, Entry]:
    """Entries of a batch of images: pixels (float32) `batch height width channels`, labels (int32) and weights (float32)."""
    return {
        "pixels": Entry("batch height width channels", (height, width, channels), "float32"),
        "labels": Entry("batch", (), "int32"),
        "weights": Entry("batch", (), "float32"),
    }


def sums(scores: Array, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Global sums over examples: `loss` in nats, `correct` (examples whose label scores highest), `weight`; of scores
    `batch classes` and the entries labels and weights.
    """
    nats_B = cross_entropy(scores, batch["labels"], "batch classes")
    seen, lies = whole(lax.stop_gradient(scores), "batch classes", "classes")
    chosen_B = back(jnp.argmax(seen, axis=-1).astype(batch["labels"].dtype), "batch", lies[:-1])
    right_B = (chosen_B == batch["labels"]).astype(nats_B.dtype)
    return {
        "loss": einsum("batch ->", nats_B * batch["weights"]),
        "correct": einsum("batch ->", right_B * batch["weights"]),
        "weight": einsum("batch ->", batch["weights"]),
    }
