"""Checkpoints: one thin interface over Orbax, in which a step counts only once it is sealed.

A folder of checkpoints holds one directory a step, named by the step's number::

    <folder>/120/state/       every array of the training state (Orbax, OCDBT)
    <folder>/120/meta/        JSON: what the caller said of the run, "step", "tree" {path: [shape, dtype]}
    <folder>/120/sealed.json  every file of the two, its size and sha256; written when all of them are on the disk,
                              before Orbax renames the directory from its temporary name to this one
    <folder>/set-aside/       steps that were found incomplete, kept for whoever wants to look
    <folder>/deleting/        steps on their way out: renamed first, deleted then

A step without a seal, or with a file that is missing or of another length, is no checkpoint: nothing here
restores it, lists it, or stumbles over it; one of other bytes is refused when it is read. So a kill at any
moment (while writing, sealing, or deleting an old step) leaves the newest sealed step as it was.

On the disk the state is a tree of plain dicts keyed by the parts of each leaf's path, so optax's NamedTuples
and EmptyStates, tuples and dicts all come back into whatever structure is asked for, and any other tool can
read them. Typed PRNG keys are stored as the numbers they hold; "tree" says of which kind they are.

Under several processes every method is called by all of them; the folder is one file system that all of them
see.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.agreement import first_says, said_by_all
from experiments.checkpoint_folder import UNFINISHED, damaged, lock, missing, probe, seal, sealed_steps, sync
from experiments.checkpoint_orbax import manager
from experiments.checkpoint_tidying import clear, retire, tidy
from experiments.checkpoint_tree import (
    check_savable,
    complete_meta,
    differences,
    flatten,
    like,
    nest,
    numbers,
    some,
    summary,
)
from sharding.errors import InputError, first_line


class CheckpointStore:
    """The checkpoints of one run: save in the background, restore onto any mesh, keep the newest.

    ``folder`` is made if it is not there; a relative path is taken from the working directory. ``keep`` >= 1
    sealed steps are kept, always with the one just saved among them. ``notes`` of process 0 says, a line
    each, what opening the folder and saving into it had to set aside.

    Opening raises InputError for a folder that cannot be written, that another live run has open, or that is
    a URL. The devices must have been chosen before: under several processes it asks JAX which process this
    is.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        if "://" in os.fspath(folder):
            raise InputError(
                f"checkpoint folder {os.fspath(folder)!r}: only folders of a mounted file system are "
                f"supported, because a seal is made durable by renames and fsync. Give a path, for instance "
                f"of a mounted bucket."
            )
        if keep < 1:
            raise InputError(
                f"checkpoints.keep is {keep}: at least 1 step must be kept, else none could be resumed."
            )
        import jax

        self.folder = Path(os.path.abspath(folder))
        self.keep = keep
        self.notes: list[str] = []
        self._whole: set[int] = set()
        self._place = jax.process_index(), jax.process_count()
        self._primary = self._place[0] == 0
        self._manager: Any = None
        self._saving: int | None = None
        self._finished: Future[None] | None = None
        self._background = ThreadPoolExecutor(1, "checkpoint")
        probe(self.folder, jax.process_index())
        self._lock = lock(self.folder) if self._primary else None
        self.notes += tidy(self.folder) if self._primary else []

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The sealed steps that this process sees, ascending; a step still being saved is not among them."""
        return sealed_steps(self.folder)

    def latest(self) -> int | None:
        """The newest sealed step or None; several processes all get what process 0 sees (a collective)."""
        newest = first_says(max(self.steps(), default=-1))
        return None if newest < 0 else newest

    def has(self, step: int) -> bool:
        """Whether ``step`` is sealed as process 0 sees it (a collective), or being saved by this store."""
        return step == self._saving or bool(first_says(int(not missing(self.folder / str(step)))))

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> float:
        """Start saving ``state`` as ``step``; returns the seconds for which the caller was blocked.

        ``state`` is a pytree of jax.Arrays of any sharding. Its values are taken before this returns, so the
        caller may donate its buffers at once; on CPU, where taking them costs no copy, a step that donates
        them while they are being written gets new buffers instead, and the state is there twice for that
        long. ``meta`` is JSON; the store adds "step" and "tree" {path: [shape, dtype]}. An earlier save still
        in flight is waited for (and counted), and its error raised here.

        Raises InputError for a step that exists, a leaf that is no jax.Array, meta that is no JSON, or a disk
        without room for the state.
        """
        start = time.perf_counter()
        self.wait()
        arrays = flatten(state)
        check_savable(arrays)
        meta = complete_meta(meta, step, arrays)
        if self.has(step):
            raise InputError(
                f"step {step} is already saved in {self.folder} (sealed steps: {self.steps()}). "
                f"Ask has({step}) before saving, or give the run another folder."
            )
        needed, free = sum(x.nbytes for x in arrays.values()), shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(
                f"no room for the checkpoint of step {step}: its arrays take {needed:,} bytes and "
                f"{self.folder} has {free:,} bytes free. Free some, keep fewer steps (checkpoints.keep), or "
                f"choose another folder."
            )
        self._make_room_for(step)
        import orbax.checkpoint as ocp

        self._saving = step
        stored = nest({path: numbers(x) for path, x in arrays.items()})
        items = ocp.args.Composite(state=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(meta))
        try:
            self._orbax().save(step, args=items, force=True)
        except Exception as error:  # Orbax raises what its stores raise, each their own kind
            raise self._failed(error) from error
        self._finished = self._background.submit(self._finish, step)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Block until the save in flight is sealed and what it supersedes gone; InputError if it failed."""
        if self._finished is None:
            return
        try:
            self._finished.result()
        except Exception as error:  # as above, from the thread that saved
            raise self._failed(error) from error
        self._saving = self._finished = None

    def meta(self, step: int) -> dict[str, Any]:
        """What was said of the run when the sealed ``step`` was saved, and "step" and "tree"."""
        self._check_sealed(step)
        import orbax.checkpoint as ocp

        with self._reading(step):
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return dict(self._orbax().restore(step, args=items)["meta"])

    def restore(self, step: int | None, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state of ``step`` (None = the newest sealed one) and its meta.

        ``abstract_state`` is a pytree of jax.ShapeDtypeStruct with shardings, on any mesh and number of
        devices: each array is read straight onto its sharding, bit for bit as it was saved, and returned in
        this structure. Raises InputError where there is no such step, where the checkpoint's paths, shapes or
        dtypes are not exactly those asked (each difference is named; nothing is cast, cut or padded), and
        where its files cannot be read.
        """
        self.wait()
        if step is None:
            step = self.latest()
            if step is None:
                raise InputError(f"nothing to restore: {self.folder} holds no sealed checkpoint.")
        self._check_sealed(step)
        import jax
        import orbax.checkpoint as ocp

        asked = flatten(abstract_state)
        unplaced = [path for path, leaf in asked.items() if getattr(leaf, "sharding", None) is None]
        if unplaced:
            raise InputError(f"restore needs a sharding for every array; {some(unplaced)} have none.")
        plain = {path: numbers(leaf) for path, leaf in asked.items()}
        meta = self.meta(step)
        with self._reading(step):
            stored = summary(flatten(self._orbax().item_metadata(step)["state"].tree))
            # Of keys the files hold numbers; only the meta says that they are keys, and of which kind.
            stored |= {path: told for path, told in meta["tree"].items() if told[1].startswith("key<")}
            if differing := differences(stored, summary(asked)):
                raise InputError(
                    f"the checkpoint of step {step} in {self.folder} is of another model: "
                    f"{'; '.join(differing)}. Restore it with the config it was saved from, or give this run "
                    f"a folder of its own."
                )
            items = ocp.args.Composite(state=ocp.args.StandardRestore(nest(plain)))
            arrays = flatten(self._orbax().restore(step, args=items)["state"])
        leaves = [like(leaf, arrays[path]) for path, leaf in asked.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), meta

    def close(self) -> None:
        """Wait for the save in flight (raising its error), and let go of the folder."""
        try:
            self.wait()
            if self._manager is not None:
                self._manager.close()
        finally:
            self._manager = None
            self._background.shutdown()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _orbax(self) -> Any:
        """The CheckpointManager, made at the first need: Orbax takes a second or more to import."""
        if self._manager is None:
            self._manager = manager(self.folder, self._seal)
        return self._manager

    def _seal(self) -> None:
        """Orbax's callback on process 0: all processes have written, the directory is not yet renamed."""
        assert self._saving is not None
        seal(self.folder / f"{self._saving}{UNFINISHED}", self._saving)

    def _finish(self, step: int) -> None:
        """In the background: see the step committed, then retire the oldest beyond ``keep``, not this one."""
        self._manager.wait_until_finished()
        if not self._primary:
            return
        sync(self.folder)  # or a loss of power could undo the commit after the older steps are gone
        if lack := missing(self.folder / str(step)):
            raise OSError(f"the step was committed, but {lack}")
        retire(self.folder, step, self.keep)

    def _make_room_for(self, step: int) -> None:
        """Clear away what is left of an earlier try at ``step``, on the disk and in Orbax's memory of it."""
        if self._primary:
            self.notes += clear(self.folder, step)
        from orbax.checkpoint import multihost

        multihost.sync_global_processes(f"shardlab:room:{step}")
        if step in self._orbax().all_steps():
            self._orbax().reload()

    def _check_sealed(self, step: int) -> None:
        """InputError, the same in every process, for a step that one of them finds not whole; its bytes are read once."""
        path, why = self.folder / str(step), ""
        if lack := missing(path):
            why = f"{lack}. Its sealed steps are {self.steps()}."
        elif step not in self._whole and (harm := damaged(path, *self._place)):
            why = f"{harm}. {self._instead(step)}"
        if found := next(filter(None, said_by_all(why)), ""):
            raise InputError(f"step {step} of {self.folder} cannot be restored: {found}")
        self._whole.add(step)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns whatever Orbax and tensorstore raise on damaged files into an InputError."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # as above
            raise InputError(
                f"the checkpoint of step {step} in {self.folder} is sealed but cannot be read: "
                f"{first_line(error)}. {self._instead(step)}"
            ) from error

    def _instead(self, step: int) -> str:
        """What to do without ``step``: its other sealed steps stand as they were."""
        others = [other for other in self.steps() if other != step]
        if not others:
            return "It is the only sealed step: begin the run anew."
        return f"Move the folder {self.folder / str(step)} away to go on from step {others[-1]} (sealed: {others})."

    def _failed(self, error: Exception) -> InputError:
        """The error of a save that did not come about; the next save starts with a fresh manager."""
        step, self._saving, self._finished, self._manager = self._saving, None, None, None
        return InputError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {first_line(error)}. The "
            f"sealed steps there, {self.steps()}, are as they were. Look at the disk's free space, quota and "
            f"permissions."
        )
