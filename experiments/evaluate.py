"""Held-out loss, and the text that a trained language model writes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from experiments.agreement import said_by_all
from experiments.config import Sample
from experiments.data.contract import Dataset
from experiments.feed import global_batch
from experiments.record_lines import from_json
from experiments.record_schema import to_json
from sharding.errors import InputError

if TYPE_CHECKING:
    from sharding.step import TrainStep


def held_out(step: TrainStep, params: Any, dataset: Dataset, rows: int, batches: int) -> dict[str, float]:
    """Mean loss over the first `batches` held-out batches of `rows` rows, in nats per token (of text) or example.

    Other sums that the model reports are given as means under their own names, and what they are means over as
    "tokens" or "examples".
    """
    total: dict[str, float] = {}
    enough = min(batches, -(-dataset.heldout_rows // rows))
    for at in range(enough):
        batch = global_batch(dataset, "heldout", 0, at, rows, step.batch_shardings())
        for name, value in step.evaluate(params, batch).items():
            total[name] = total.get(name, 0.0) + float(value)
    weight = total.pop("weight")
    return {name: value / weight for name, value in total.items()} | {unit(dataset): weight}


def evaluated(dataset: Dataset, rows: int, batches: int) -> Mapping[str, Any]:
    """What is known without a model of the very text that `held_out` evaluates; empty where the data is no text.

    Process 0 finds it out and tells the others (a collective).
    """
    import jax

    first = jax.process_index() == 0
    facts = dataset.heldout_facts(min(rows * batches, dataset.heldout_rows)) if first else {}
    return from_json(json.loads(said_by_all(json.dumps(to_json(facts, "heldout_facts")))[0]))


def bits_per_byte(nats: float, text: Mapping[str, Any]) -> dict[str, float]:
    """A loss in nats per token of the `evaluated` text as {"bits_per_byte": ...}; {} where its bytes are not known."""
    size = text.get("bytes_per_token")
    return {} if size is None else {"bits_per_byte": nats / math.log(2) / size}


def unit(dataset: Dataset) -> Literal["tokens", "examples"]:
    """What is counted and averaged over: tokens of text, else examples."""
    return "examples" if dataset.bytes_per_token_heldout is None else "tokens"


def check_sample(step: TrainStep, dataset: Dataset, ask: Sample) -> None:
    """Refuse, before anything is trained, a sample that the model or the data cannot give. InputError."""
    if not ask.tokens:
        return
    model, reads = step.model, ", ".join(step.inputs)
    if not hasattr(model, "logits") or "tokens" not in step.inputs:
        has = "has logits" if hasattr(model, "logits") else "has no logits"
        raise InputError(
            f"sample.tokens asks for {ask.tokens} tokens of text, but the model {type(model).__name__} writes none: that "
            f"takes a method `logits` and `tokens` among its inputs; it {has} and reads {reads}. Set sample.tokens to 0."
        )
    dataset.encode(ask.prompt)


def sample(step: TrainStep, params: Any, dataset: Dataset, ask: Sample, length: int, seed: int) -> str:
    """The prompt and `ask.tokens` tokens drawn after it, as text.

    The whole window of `length` tokens is computed anew for each token, on the mesh of training and with as few rows as
    it splits the batch into, so every split that trains can also write. All rows hold the same text; row 0 is read.
    Of a model's vocabulary only the tokens that the data has are drawn.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from sharding.params import drawing

    ids = dataset.encode(ask.prompt) or [0]
    sharding = step.batch_shardings()["tokens"]
    assert sharding is not None, "a model writes on a mesh, be it of one device"
    rows = math.prod(step.split.layouts.sizes[axis] for axis in step.inputs["tokens"].dims[0])
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    vocab = dataset.facts.get("vocab")

    @functools.partial(jax.jit, out_shardings=whole)
    def next_token(params: Any, tokens: jax.Array, at: jax.Array, key: jax.Array) -> jax.Array:
        logits = step.forward(params, "logits", "batch length vocab", (tokens, "batch length"))
        row = jax.lax.dynamic_index_in_dim(logits[0], at, axis=0, keepdims=False).astype(jnp.float32)
        if vocab is not None:  # a model may have room for more tokens, which stand for no text
            row = jnp.where(jnp.arange(row.shape[0]) < vocab, row, -jnp.inf)
        if ask.temperature == 0:
            return jnp.argmax(row)
        return jax.random.categorical(key, row / ask.temperature)

    with drawing(seed) as key:
        for i in range(ask.tokens):
            window = ids[-length:]
            padded = np.zeros((rows, length), np.int32)
            padded[:, : len(window)] = window
            tokens = jax.make_array_from_callback(padded.shape, sharding, lambda index, p=padded: p[index])
            at = np.int32(len(window) - 1)
            ids.append(int(next_token(params, tokens, at, jax.random.fold_in(key, i))))
    return dataset.decode(ids)
