"""How Orbax is set up to write the checkpoints of one folder, and how what it says is kept short."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def manager(folder: Path, written: Callable[[], None]) -> Any:
    """An `ocp.CheckpointManager` of the items "state" and "meta" that deletes nothing by itself.

    `written` is called on process 0 when every process has written a step and before its directory is renamed.
    """
    import orbax.checkpoint as ocp

    _quieten()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name, handler, args in (
        ("state", ocp.StandardCheckpointHandler(), (ocp.args.StandardSave, ocp.args.StandardRestore)),
        ("meta", ocp.JsonCheckpointHandler(), (ocp.args.JsonSave, ocp.args.JsonRestore)),
    ):
        for arg in args:
            registry.add(name, arg, handler)
    # No max_to_keep: Orbax deletes in place, and a kill then leaves half a step that looks whole.
    options = ocp.CheckpointManagerOptions(
        save_root_metadata=False,
        async_options=ocp.AsyncOptions(post_finalization_callback=written),
    )
    return ocp.CheckpointManager(folder, options=options, handler_registry=registry)


def _from_elsewhere(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _quieten() -> None:
    """Keep Orbax's own log lines out of the terminal; its errors all arrive as exceptions."""
    logging.getLogger("absl").addFilter(_from_elsewhere)
