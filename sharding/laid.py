"""Where everything of a training run lies on a mesh: parameters, optimizer state, batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.layout import Layout, Layouts, ParamLayouts
from sharding.marks import HOST, require_host
from sharding.params import Model, ParamSpec, declare
from sharding.partitioner import Manual, Partitioner
from sharding.pipeline.grid import Schedule
from sharding.signed import rates, signed

State = dict[str, Any]
"""params: path -> array; optimizer: optax state; step: int32 scalar, the number of updates made."""


@dataclass(frozen=True)
class Split:
    """How training is split: rules on a mesh under a partitioner, with gradients accumulated over micro-batches."""

    layouts: Layouts
    mesh: Mesh | None
    partitioner: Partitioner = field(default_factory=Manual)
    accumulate: int = 1
    platform: str = ""
    """The platform to trace for ("cpu", "gpu", "tpu"); "" takes that of the mesh's devices."""
    moments: Literal["device", "host"] = "device"
    """Where the optimizer's arrays lie between updates: "host" is the memory of the host that a device reads by itself. An
    update brings them to the devices and puts them back. Without a mesh they are on the one device all the same."""
    schedule: Schedule | None = None
    """How micro-batches go through the stages of the layers; None: the layers are no pipeline."""

    @property
    def micro_batches(self) -> int:
        """In how many parts the rows of a device go through the model in one step."""
        return self.accumulate * (self.schedule.microbatches if self.schedule else 1)

    def target(self) -> str:
        """The platform that the step is for."""
        return self.platform or (self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else "cpu")


class Laid:
    """A model, an optimizer and a split: the abstract tree, its layouts, and where state and batches lie."""

    def __init__(self, model: Model, optimizer: optax.GradientTransformation, split: Split):
        self.model, self.split = model, split
        if split.moments == "host":
            require_host(split.mesh, "An optimizer with memory='host'")
        self.optimizer = signed(optimizer, rates(model))
        self.tree: dict[str, ParamSpec] = declare(model)
        self.layouts: dict[str, ParamLayouts] = {
            p: split.layouts.param(p, s.names, s.shape) for p, s in self.tree.items()
        }
        self.inputs: dict[str, Layout] = {
            k: split.layouts.activation(tuple(entry.names.split())) for k, entry in model.inputs.items()
        }

    def sharding(self, layout: Layout) -> NamedSharding | None:
        """The jax sharding of a layout on this split's mesh; None without a mesh."""
        return None if self.split.mesh is None else NamedSharding(self.split.mesh, layout.spec())

    def batch_shardings(self) -> dict[str, NamedSharding | None]:
        """Where each entry of a batch lies."""
        return {k: self.sharding(layout) for k, layout in self.inputs.items()}

    def abstract_batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch of `rows` rows."""
        return {k: entry.abstract(rows) for k, entry in self.model.inputs.items()}

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state, without arrays: what a checkpoint restores into."""
        params = {p: s.abstract() for p, s in self.tree.items()}
        state = {
            "params": params,
            "optimizer": jax.eval_shape(self.optimizer.init, params),
            "step": jax.ShapeDtypeStruct((), jnp.int32),
        }
        put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        return state if self.split.mesh is None else jax.tree.map(put, state, self.state_shardings())

    def state_shardings(self) -> Any:
        """Where each leaf of the state lies: parameters at rest, optimizer state by its own role and in its memory."""
        if self.split.mesh is None:
            return None
        return {
            "params": {p: self.sharding(x.param) for p, x in self.layouts.items()},
            "optimizer": self.moment_shardings(HOST if self.split.moments == "host" else ""),
            "step": NamedSharding(self.split.mesh, PartitionSpec()),
        }

    def moment_shardings(self, memory: str) -> Any:
        """Where each leaf of the optimizer's state lies, its arrays in this memory; counts are always on the devices.

        memory: a kind of memory as jax has it, or "" for that which arrays lie in anyway.
        """
        abstract = {p: s.abstract() for p, s in self.tree.items()}

        def lies(keys: tuple[Any, ...], leaf: Any) -> NamedSharding | None:
            """Where a leaf is an array like a parameter, that parameter's layout; factored moments and counts whole."""
            path = next((k.key for k in reversed(keys) if isinstance(k, jax.tree_util.DictKey)), "")
            like = path in self.tree and leaf.shape == self.tree[path].shape
            found = self.sharding(self.layouts[path].optimizer if like else Layout((), ()))
            return found.with_memory_kind(memory) if found and memory and leaf.ndim else found

        return jax.tree_util.tree_map_with_path(lies, jax.eval_shape(self.optimizer.init, abstract))

    def fetched(self, moments: Any) -> Any:
        """The optimizer's state on the devices, for an update."""
        if self.split.mesh is None or self.split.moments == "device":
            return moments
        return jax.tree.map(
            lambda x, to: jax.device_put(x, to) if x.ndim else x, moments, self.moment_shardings("device")
        )
