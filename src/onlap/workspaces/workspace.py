"""A workspace: one writable tree that is checkpointed, rolled back, forked and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from onlap import cancellation, errors
from onlap.arguments import StrPath, check_number, check_path
from onlap.boundary import public_class
from onlap.catalog.records import Record
from onlap.catalog.runs import Run
from onlap.errors import shown
from onlap.mounts.unmount import attempts
from onlap.snapshots.recorded import Pair
from onlap.trees.compare import Change
from onlap.workspaces import merging
from onlap.workspaces.history import chains, checkpoints, freezing, naming
from onlap.workspaces.records import (
    AT,
    BASE_ID,
    COMMAND,
    DIRECTORY,
    LINE,
    SOURCE,
    UNSYNCED,
    Checkpoint,
    Source,
    already_exists,
    check_workspace_name,
    excluded_in,
    fork_labels,
    format_command,
    name_label,
    node_id,
    parse_source,
    top_key,
)
from onlap.workspaces.tree.mounting import Mounting
from onlap.workspaces.tree.running import Isolation, Ran, Task, chosen_isolation, execute

if TYPE_CHECKING:
    from pathlib import Path

    from onlap.snapshots.running.run import Done
    from onlap.workspaces.merge.entries import Merged, MergePlan
    from onlap.workspaces.site import Site

T = TypeVar("T")


@public_class
class Workspace:
    """A named tree with one writable layer, on a history of checkpoints; made by :class:`Workspaces`.

    It outlives the process: ``store.workspaces[name]`` opens it again. Several processes may open it; a call that would
    replace a tree in use raises Busy.

    As a context manager, an unnamed workspace is removed at the end of the block; a named one stays.

    Attributes:
        name: its name.
    """

    def __init__(self, site: Site, name: str, run: Run | None = None) -> None:
        self._site = site
        self.name = name
        self._run = run
        self._mounting: Mounting | None = None

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._run is not None and self._run.is_ours:
            try:
                self.remove()
            finally:
                self._run.close()

    def __repr__(self) -> str:
        return f"<Workspace {shown(self.name)}>"

    # What it is

    @property
    def source(self) -> Source:
        """What it was made from."""
        return parse_source(self._top().labels[SOURCE])

    def source_changes(self) -> Iterator[str]:
        """The paths that have changed in the directory since the workspace was made from it.

        They are found by their stats, so a file that was written again with the same content counts too.

        Raises:
            InvalidArgument: it was not made from a directory.
            NotFound: there is no such directory any more.
            OnlapError: of another kind, for an error of the filesystem.
        """
        top = self._top()
        directory = self._directory(top)
        base = checkpoints.base_of(self._site.snapshotter, top)
        from onlap.workspaces.capture.live import changes

        return changes(self._site.snapshotter, base, directory, excluded_in(base.labels.get(DIRECTORY, "")))

    @property
    def at(self) -> Checkpoint:
        """The checkpoint that it stands on."""
        top = self._top()
        return self._describe(checkpoints.below(self._site.snapshotter, top), top)

    @property
    def is_changed(self) -> bool:
        """Whether anything was written since that checkpoint."""
        return not self._site.is_unchanged(self._top())

    def log(self) -> list[Checkpoint]:
        """Its checkpoints, and those that it came from, oldest first; the base is the first.

        Raises:
            NotFound: there is no such workspace any more.
        """
        top = self._top()
        base = checkpoints.base_of(self._site.snapshotter, top)
        found = [base, *checkpoints.of_workspace(self._site.snapshotter, top)]
        return [self._describe(checkpoints.measured(self._site.snapshotter, record), top) for record in found]

    def _top(self) -> Record:
        return self._site.top(self.name)

    def _describe(self, record: Record, top: Record | None = None) -> Checkpoint:
        return checkpoints.describe(record, top or self._top())

    # The tree

    @contextlib.contextmanager
    def mounted(self, at: StrPath | None = None) -> Iterator[Path]:
        """Mount its tree for the duration of a ``with`` block.

        Inside the block, :meth:`checkpoint` and :meth:`rollback` replace the tree under the same path.

        Args:
            at: an existing directory; by default one below the root. Without the privilege to mount there is no mount
                point: see :func:`onlap.mounted`.

        Raises:
            Busy: it is mounted already; or, at the end, a process still uses the tree.
            DataLoss: it stands on a checkpoint that a power cut took.
            OnlapError: see :func:`onlap.mounted`.
        """
        self._check_durable(self._top())
        if self._mounting is not None:
            raise errors.Busy(
                f"workspace {shown(self.name)} is mounted at {shown(self._mounting.path)} already",
                key=self.name,
                hint="use that path",
                holders=[self._mounting.path],
            )
        from onlap.mounts.paths import tree_path

        with Mounting(self._site.snapshotter, self._site.endings, top_key(self.name), at) as mounting:
            self._mounting = mounting
            try:
                yield tree_path(mounting.path)
            finally:
                self._mounting = None

    def _check_durable(self, record: Record) -> None:
        """Raise DataLoss if a power cut took the checkpoint, or one that a top or it lies on."""
        self._site.check_durable(record, self.name)

    def _with_top(self, action: Callable[[Record], T]) -> T:
        """Do something with the top; again with the next one if another thread or process replaces it meanwhile."""
        while True:
            top = self._top()
            try:
                return action(top)
            except errors.NotFound:
                if self._top().id == top.id:
                    raise
            cancellation.check()

    def _replacing(self, wait: float, action: Callable[[], Record], *, discarded: bool = False) -> Record:
        """Replace the top, under its mount if it is mounted here.

        Args:
            wait: seconds to wait while others use the tree.
            action: replaces it; raises Busy while it is used.
            discarded: the new one will not lie on the old one.
        """
        mounting = self._mounting
        with mounting.unmounted(wait, discarded=discarded) if mounting is not None else contextlib.nullcontext():
            for last in attempts(wait):
                try:
                    return action()
                except errors.Busy:
                    if last:
                        raise
                    cancellation.check()
            raise AssertionError("attempts() ends with the last one")

    # Commands

    def run(
        self,
        argv: Sequence[str],
        *,
        isolation: Isolation | None = None,
        cwd: StrPath | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        capture: bool = False,
        input: bytes | None = None,
    ) -> Ran:
        """Run a command in the tree, and wait for it; what it changed is known exactly.

        What was written before becomes a checkpoint first, so that the command starts on a layer of its own. While
        another command runs in the workspace this cannot be: then the changes are those since the last checkpoint.

        **"none" is not a sandbox**: the command has this user's files, processes and network; see
        :func:`onlap.snapshots.running.run`, also for what happens to it at the end.

        Args:
            argv: the command.
            isolation: ``"none"``: its working directory is the tree, in a mount namespace of its own;
                ``"namespace"``: the tree is its root, with processes and IPC of its own; ``"runtime"``: in a container,
                by runc or crun. By default what the workspace was made from decides: ``"runtime"`` for an image,
                ``"none"`` for a directory or a snapshot.
            cwd: the directory to work in, relative to the top of the tree.
            env: its environment, to which ONLAP_WORKSPACE is added; by default that of this process. In a container it
                is added to that of the image.
            timeout: seconds after which it is killed.
            capture: return its output.
            input: what it reads; by default nothing.

        Raises:
            NotFound: there is no such command or directory; ``.key`` says which.
            Busy: the tree is mounted by another process.
            ResourceExhausted: it filled the disk, or the workspace's own limit.
            Unimplemented: no container runtime is installed.
            OnlapError: see :func:`onlap.snapshots.running.run` and :meth:`checkpoint`.
        """
        return self._carry_out(isolation, Task(argv, cwd, env, timeout, capture, input))

    def _carry_out(self, isolation: Isolation | None, task: Task) -> Ran:
        task = task._replace(added={"ONLAP_WORKSPACE": self.name})
        top = self._top()
        how = chosen_isolation(isolation, parse_source(top.labels[SOURCE]))
        self._check_durable(top)

        def start(top: Record) -> tuple[Record, Done]:
            before = self._fresh(top)
            try:
                return before, execute(self._site, self._top(), how, task, self._mounting)
            finally:
                self._note_command(task.argv)

        before, done = self._with_top(start)
        changes = self._site.snapshotter.compare(Pair(before, self._top()))
        return Ran(*done, before=self._describe(before), changes=tuple(changes))

    def _fresh(self, top: Record) -> Record:
        """The checkpoint with the present state; the last one while something else uses the tree."""
        try:
            return self._find(self.checkpoint())
        except errors.Busy:
            return self._find(top.labels[AT])

    def _note_command(self, argv: Sequence[str]) -> None:
        top = self._top()
        if not self._site.is_unchanged(top):
            self._site.snapshotter.label(top.name, {COMMAND: format_command(argv)})

    # Checkpoints

    def checkpoint(
        self, name: str | None = None, *, durable: bool = False, wait: float = 0.0, freeze: bool = False
    ) -> Checkpoint:
        """Keep the present state, to go back to or to fork from.

        The time does not depend on the size of the tree. If nothing was written since the last checkpoint, this is that
        one. Other processes see it when this returns. It survives a power cut soon after; with ``durable``, when this
        returns. A process that has a file of the tree open would go on changing what was kept, so none may.

        Args:
            name: a name for it, which no other checkpoint of the workspace has.
            durable: wait until it survives a power cut.
            wait: seconds to wait for processes that use the tree.
            freeze: if programs run in the tree (:meth:`run`, ``onlap ws run``), freeze them in control groups, keep a
                copy of what the workspace has written, and let them run again. The time is that of the copy.

        Raises:
            Busy: a process uses the tree; ``.holders`` says who.
            Unimplemented: there is no freezer of control groups that this user may use.
            AlreadyExists: another checkpoint has the name.
            DataLoss: the workspace stands on a checkpoint that a power cut took, or could not be written to the disk.
            FailedPrecondition: it is to be durable, and the root is volatile.
            OnlapError: of another kind, for an error of the filesystem or the catalog.
        """
        if name is not None:
            check_workspace_name(name)
        if durable:
            self._site.durability.check_possible()
        check_number(wait, "wait")
        return self._with_top(lambda top: self._checkpoint(top, name, durable, wait, freeze))

    def _checkpoint(self, top: Record, name: str | None, durable: bool, wait: float, freeze: bool) -> Checkpoint:
        snapshotter = self._site.snapshotter
        self._check_durable(top)
        if self._site.is_unchanged(top):
            record = checkpoints.below(snapshotter, top)
            if name is not None:
                record = naming.give(snapshotter, top, record, name)
                top = self._top()  # a name of the base is a label of it
        else:
            if name is not None:
                snapshotter.catalog.database.read(lambda connection: naming.check_unused(connection, top, [name]))
            given = {name_label(name): top.labels[LINE]} if name is not None else {}
            try:
                record = self._replacing(wait, lambda: chains.advance(snapshotter, top, given))
            except errors.Busy:
                if not freeze or self._mounting is not None:
                    raise
                record = freezing.checkpoint(snapshotter, top, given)
            cancellation.made(partial(checkpoints.forget, snapshotter, [record], everywhere=True))
            self._site.durability.begin()
        if durable:
            if UNSYNCED in record.labels:
                self._site.durability.wait()
                record = snapshotter.record(record.name)
            self._site.durability.check_written((record.id, *snapshotter.ancestors(record)), self.name)
        return self._describe(record, top)

    def rollback(self, to: Checkpoint | str | None = None, *, wait: float = 0.0) -> Checkpoint:
        """Go back to a checkpoint; what was written since the last one is discarded, all checkpoints stay.

        Args:
            to: any checkpoint in :meth:`log`, its id or a name; by default the last one.
            wait: seconds to wait for processes that use the tree.

        Returns:
            The checkpoint.

        Raises:
            NotFound: there is no such checkpoint.
            Busy: a process uses the tree; ``.holders`` says who.
            DataLoss: a power cut took the checkpoint.
            OnlapError: of another kind, for an error of the filesystem or the catalog.
        """
        check_number(wait, "wait")

        def reset(top: Record) -> Checkpoint:
            onto = self._find(to, top)
            self._replacing(wait, lambda: chains.reset(self._site.snapshotter, top, onto), discarded=True)
            return self._describe(onto, top)

        return self._with_top(reset)

    def _find(self, reference: Checkpoint | str | None, top: Record | None = None) -> Record:
        """The snapshot of a checkpoint, by default of the last one."""
        snapshotter = self._site.snapshotter
        top = top or self._top()
        record = checkpoints.below(snapshotter, top) if reference is None else naming.find(snapshotter, top, reference)
        self._check_durable(record)
        return record

    def forget(self, checkpoint: Checkpoint | str) -> None:
        """Remove a checkpoint from the history; its space is freed as soon as nothing stands on it.

        Raises:
            NotFound: there is no such checkpoint.
            FailedPrecondition: it is the base, or a workspace stands on it.
        """
        snapshotter = self._site.snapshotter
        record = naming.find(snapshotter, self._top(), checkpoint)
        identifier = node_id(record)
        standing = self.name if identifier == BASE_ID else checkpoints.forget(snapshotter, [record]).get(identifier)
        if standing is not None:
            raise errors.FailedPrecondition(
                f"workspace {shown(standing)} stands on checkpoint {shown(identifier)}",
                key=standing,
                hint="let it go to another checkpoint first; the base stays as long as the workspace",
            )

    def keep(self, *, last: int | None = None, newer_than: float | None = None, named: bool = True) -> int:
        """Forget all checkpoints that this workspace made, except those that an argument keeps.

        Checkpoints that a workspace stands on stay, and so does the base.

        Args:
            last: this many of the newest.
            newer_than: those that are younger than this, in seconds.
            named: those with a name.

        Returns:
            How many were forgotten.

        Raises:
            InvalidArgument: an argument is wrong.
        """
        if last is not None:
            check_number(last, "number of checkpoints to keep", whole=True)
        if newer_than is not None:
            check_number(newer_than, "age of checkpoints to keep")
        if (last or 0) < 0 or (newer_than or 0) < 0:
            raise errors.InvalidArgument("fewer than no checkpoints cannot be kept", hint="give 0 or more")
        snapshotter = self._site.snapshotter
        unwanted = checkpoints.not_kept(snapshotter, self._top(), last or 0, newer_than, named=named)
        if not unwanted:
            return 0
        return len(unwanted) - len(checkpoints.forget(snapshotter, unwanted))

    # Forks

    def fork(self, name: str | None = None, *, at: Checkpoint | str | None = None) -> Workspace:
        """Make another workspace with the same tree and history; what is written in one is not seen in the other.

        Args:
            name: its name; by default this one's with a number. Without one, the fork of an unnamed workspace ends with
                that one's process at the latest.
            at: the checkpoint that it begins at; by default the present state, which becomes a checkpoint.

        Raises:
            AlreadyExists: there is such a workspace.
            OnlapError: see :meth:`checkpoint`.
        """
        if name is not None:
            check_workspace_name(name)
        return self._fork([name], at)[0]

    def forks(self, count: int, *, at: Checkpoint | str | None = None) -> list[Workspace]:
        """Make several forks in one step.

        Args:
            count: how many.
            at: as for :meth:`fork`.

        Raises:
            OnlapError: see :meth:`fork`; none is made then.
        """
        check_number(count, "number of forks", whole=True)
        if count < 0:
            raise errors.InvalidArgument(f"the number of forks is {count}")
        return self._fork([None] * count, at)

    def _fork(self, names: Sequence[str | None], at: Checkpoint | str | None) -> list[Workspace]:
        snapshotter = self._site.snapshotter
        onto = self._find(self.checkpoint() if at is None else at)
        top = self._top()
        while True:
            free = self._site.free_names(self.name)
            chosen = [name if name is not None else next(free) for name in names]
            try:
                chains.start(
                    snapshotter,
                    [top_key(name) for name in chosen],
                    onto,
                    [
                        fork_labels(top.labels, node_id(onto), name, named=given is not None)
                        for name, given in zip(chosen, names, strict=True)
                    ],
                )
            except errors.AlreadyExists as error:
                if None not in names:
                    raise already_exists(chosen[0]) from error
                continue  # another process took one of the names
            return [Workspace(self._site, name) for name in chosen]

    # Comparing

    def diff(self, before: Checkpoint | str | None = None, after: Checkpoint | str | None = None) -> Iterator[Change]:
        """How the tree differs between two states.

        Args:
            before: a checkpoint; by default the one that the workspace stands on.
            after: a checkpoint; by default the present state.

        Yields:
            The changes, sorted by path.

        Raises:
            NotFound: there is no such checkpoint.
            OnlapError: see :meth:`Store.diff`.
        """
        return self._site.snapshotter.compare(self._pair(before, after))

    def _pair(self, before: Checkpoint | str | None, after: Checkpoint | str | None) -> Pair:
        return Pair(self._find(before), self._top() if after is None else self._find(after))

    def patch(
        self, out: BinaryIO, before: Checkpoint | str | None = None, after: Checkpoint | str | None = None
    ) -> None:
        """Write the changes of text files as a unified diff, as ``git apply`` and ``patch -p1`` take it.

        Binary files are named. Owners, and modes other than the executable bit, are left out.

        Args:
            out: an open binary file.
            before: as for :meth:`diff`.
            after: likewise.

        Raises:
            OnlapError: as :meth:`diff`.
        """
        from onlap.workspaces.patch.patch import write_patch

        with self._site.snapshotter.comparing(self._pair(before, after), "compare") as (old, new, since):
            write_patch(old, new, self._site.snapshotter.markers, out, since=since)

    # Merging back

    def merge_plan(self, target: StrPath | None = None, *, select: Sequence[str] = ()) -> MergePlan:
        """What :meth:`merge` would do: every path that the workspace changed since its base, and what is there now.

        A merge into the directory that was killed is undone or finished first.

        Args:
            target: a directory; by default the one that was captured.
            select: globs of paths; ``**`` stands for any directories. By default everything.

        Raises:
            InvalidArgument: the workspace was not made from a directory, and no target is given; the target is not a
                directory; or a pattern matches nothing.
            NotFound: there is no such target.
            FailedPrecondition: something of a merge that was killed could not be undone; it says where that is kept.
            Busy: another merge into it is being done.
            OnlapError: of another kind, for an error of the filesystem.
        """
        top = self._top()
        with merging.planning(self._site, top, top, self._target(top, target)) as planned:
            return planned(select)

    def merge(self, target: StrPath | None = None, *, select: Sequence[str] = (), wait: float = 0.0) -> Merged:
        """Bring the changes since the base back into a directory: all that are selected, or none.

        The present state becomes a checkpoint first. Where the directory has changed what the workspace changed too,
        nothing is done; what it has from an earlier merge of the workspace is no such change. Nothing outside the
        directory is touched. If this process is killed, the next plan or merge for the directory undoes or finishes the
        merge.

        Args:
            target: as for :meth:`merge_plan`.
            select: likewise.
            wait: as for :meth:`checkpoint`.

        Raises:
            FailedPrecondition: there are conflicts, or somebody changed a file meanwhile; nothing was changed.
            OnlapError: see :meth:`merge_plan` and :meth:`checkpoint`.
        """
        state = self._find(self.checkpoint(wait=wait))
        top = self._top()
        return merging.merge(self._site, top, state, self._target(top, target), select)

    def _target(self, top: Record, target: StrPath | None) -> str:
        self._check_durable(top)
        return self._directory(top) if target is None else check_path(target, "directory to merge into")

    def _directory(self, top: Record) -> str:
        source = parse_source(top.labels[SOURCE])
        if source.kind != "directory":
            raise errors.InvalidArgument(
                f"workspace {shown(self.name)} was made from {source.kind} {shown(source.name)}, not from a directory",
                key=self.name,
                hint="say which directory is meant",
            )
        return source.name

    # The end

    def remove(self) -> None:
        """Remove the workspace, and those of its checkpoints from which no other workspace came.

        Raises:
            NotFound: it is gone already.
            Busy: a process uses its tree; ``.holders`` says who.
        """
        top = self._top()
        self._site.snapshotter.remove(top.name)
        if checkpoints.may_leave_some(self._site.snapshotter, top):
            checkpoints.collect(self._site.snapshotter)
