"""What a compiler made of a config's step: its collectives, its memory, or why it made none. Plain values, from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sharding.ledger import Collective
    from sharding.module.compiled import Emitted
    from sharding.module.differences import Difference


@dataclass(frozen=True)
class Memory:
    """Bytes on one device as the compiler has laid them out."""

    arguments: int
    outputs: int
    aliased: int
    """Outputs that lie where arguments did (the state is donated)."""
    temporaries: int
    code: int
    host_arguments: int = 0
    host_temporaries: int = 0

    @property
    def total(self) -> int:
        """Most that the program has on a device at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Refusal:
    """Why a compiler made no program; bytes of one device used and there, where it names them."""

    message: str
    used: int | None = None
    capacity: int | None = None


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a step for a target."""

    target: str
    partitioner: Literal["manual", "auto"]
    mesh: Mapping[str, int]
    traced: tuple[Collective, ...]
    """What was predicted of the step that was compiled; empty under XLA's partitioner, which decides after tracing."""
    repeated: tuple[Collective, ...]
    """Those of the predicted that are asked for again of the same value (`sharding.module.repeated`)."""
    collectives: tuple[Emitted, ...]
    """What the compiled module holds."""
    memory: Memory | None
    """None where the compiler refused."""
    refused: Refusal | None
    seconds: Mapping[str, float]
    """"trace" and "compile", in that process."""
    versions: Mapping[str, str]

    def differences(self) -> list[Difference]:
        """Where the compiled module departs from the trace; under XLA's partitioner every collective, as unpredicted."""
        from sharding.module.differences import differences, unpredicted

        if self.partitioner == "auto":
            return unpredicted(self.collectives)
        return differences(self.traced, self.collectives, self.repeated)

    @staticmethod
    def from_json(told: Mapping[str, Any]) -> Compiled:
        """From what the compiling process wrote."""
        return Compiled(
            target=told["target"],
            partitioner=told["partitioner"],
            mesh=told["mesh"],
            traced=tuple(map(collective_of, told["traced"])),
            repeated=tuple(map(collective_of, told["repeated"])),
            collectives=tuple(map(emitted_of, told["collectives"])),
            memory=Memory(**told["memory"]) if told["memory"] else None,
            refused=Refusal(**told["refused"]) if told["refused"] else None,
            seconds=told["seconds"],
            versions=told["versions"],
        )


def collective_of(row: Mapping[str, Any]) -> Collective:
    """A traced collective from the plain JSON of its fields."""
    from sharding.ledger import Collective

    return Collective(**_plain(row))


def emitted_of(row: Mapping[str, Any]) -> Emitted:
    """A compiled one."""
    from sharding.module.compiled import Emitted

    return Emitted(**_plain(row))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    from sharding.scope import Scope

    return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} | {
        "scope": Scope(**row["scope"])
    }


__all__ = ["Compiled", "Memory", "Refusal"]
