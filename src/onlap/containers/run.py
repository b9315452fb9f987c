"""A container in the foreground: prepare, mount, run, and clean up.

The cleanup removes, in this order: the container, the mount points that were made in a tree that stays, the mount, the
snapshot, the directory of the run. Where this process is killed, :mod:`onlap.catalog.runs` does the same later, at the
start of the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import resource
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from onlap import errors
from onlap.catalog.records import ACTIVE, VIEW, Record
from onlap.catalog.runs import LABEL, Run
from onlap.containers import bundle, capabilities, mount_points, orphans, rundirs, runtime, seccomp, tree_files
from onlap.containers.bundle import Defaults
from onlap.containers.mount_points import MountPoint
from onlap.containers.options import NETWORKS, Options, Volume
from onlap.containers.runtime import Failure
from onlap.containers.signals import Forwarder
from onlap.containers.users import find_user
from onlap.errors import shown
from onlap.images.records import LABEL_IMAGE, LABEL_IMAGE_DIGEST
from onlap.mounts.temporary import mounted
from onlap.mounts.userns import may_mount
from onlap.progress import Callback
from onlap.snapshots import exclusion
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.snapshots.running.streams import Streams

if TYPE_CHECKING:
    from onlap.images import Image, Images

# Fetches an image.
Pull = Callable[[str], "Image"]

_LOCAL_HOSTS = """\
127.0.0.1\tlocalhost {hostname}
::1\tlocalhost ip6-localhost ip6-loopback
"""


class Source(NamedTuple):
    """What a container starts with.

    Attributes:
        snapshot: a committed one, on which the container gets a snapshot of its own; an active one, in which it runs;
            or a view.
        defaults: the image's, for its containers.
        labels: of the container's snapshot: the image, if there is one.
    """

    snapshot: str
    defaults: Defaults = Defaults()
    labels: Mapping[str, str] = {}


class Ended(NamedTuple):
    """How a container ended.

    Attributes:
        status: of its command, or 128 plus the number of the signal that ended it; 126 and 127 as from env(1).
        problem: why the command could not be run; None where it was run.
        stdout: what it wrote there, if that was captured.
        stderr: likewise.
        timed_out: whether it was killed after its timeout.
    """

    status: int
    problem: str | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    timed_out: bool = False


class Attended(NamedTuple):
    """How a caller attends to a container, instead of giving it this process's standard streams.

    Attributes:
        capture: return its output; otherwise it gets this process's.
        input: what it reads; None: nothing.
        timeout: seconds after which it is killed.
    """

    capture: bool
    input: bytes | None
    timeout: float | None


def find_source(
    snapshotter: RecordedSnapshotter,
    images: Callable[[], Images],
    name: str,
    progress: Callback | None = None,
    *,
    pull: Pull | None = None,
    newest: bool = False,
) -> Source:
    """The snapshot of exactly this name, else the image, which is unpacked if need be.

    Args:
        snapshotter: of the root.
        images: gives the root's images; called only when they are needed.
        name: of a snapshot or an image.
        progress: called with what is unpacked.
        pull: fetches an image that the root does not have.
        newest: fetch it even where the root has it, since the registry may have a newer one.

    Raises:
        NotFound: there is neither.
        OnlapError: the image cannot be fetched or unpacked.
    """
    try:
        record = snapshotter.record(name)
    except errors.NotFound:
        return _image_source(images(), name, progress, pull, newest)
    if LABEL_IMAGE in record.labels:
        found = images()
        image = found.labelled(record.labels)
        if image is not None:  # else it was removed; the tree is complete without it
            return image_source(found, name, image)
    return Source(name)


def _image_source(images: Images, name: str, progress: Callback | None, pull: Pull | None, newest: bool) -> Source:
    try:
        image = images.get(name)
    except (errors.NotFound, errors.InvalidArgument) as error:
        # A name that no image can have may be that of a snapshot.
        if pull is None or not isinstance(error, errors.NotFound):
            raise errors.NotFound(
                f"there is no snapshot and no image {shown(name)}",
                key=name,
                hint=f"see: onlap ls, onlap image ls; or fetch it: onlap image pull {shown(name)}",
            ) from error
        newest = True
    if newest and pull is not None:
        image = _pulled(name, pull)
    return image_source(images, images.unpack(image, progress=progress), image)


def _pulled(name: str, pull: Pull) -> Image:
    try:
        return pull(name)
    except (errors.NotFound, errors.PermissionDenied, errors.Unavailable) as error:
        raise type(error)(
            f"there is no snapshot {shown(name)}, and the image cannot be pulled: {error.message}",
            key=name,
            hint=error.hint,
        ) from error


def image_source(images: Images, snapshot: str, image: Image) -> Source:
    """A snapshot with the defaults of an image."""
    execution = images.config(image).execution
    defaults = Defaults(
        entrypoint=tuple(execution.entrypoint or ()),
        command=tuple(execution.cmd or ()),
        env=tuple(execution.env or ()),
        user=execution.user,
        workdir=execution.working_dir,
    )
    return Source(snapshot, defaults, {LABEL_IMAGE: image.name, LABEL_IMAGE_DIGEST: image.digest})


def run(
    snapshotter: RecordedSnapshotter,
    source: Source,
    options: Options,
    *,
    keep: str | None = None,
    search: str = "",
    attended: Attended | None = None,
) -> Ended:
    """Run a container, and wait for its end. It gets this process's standard streams and signals.

    Args:
        snapshotter: of the root.
        source: what it starts with.
        options: the caller's.
        keep: keep its snapshot under this key; else it is removed. An active snapshot always stays.
        search: directories to look for a runtime in before the usual ones, in the form of PATH.
        attended: what to do with its streams, and when to end it.

    Raises:
        PermissionDenied: this process may not mount.
        Unimplemented: no runtime is installed.
        AlreadyExists: the key ``keep`` exists.
        FailedPrecondition: the active snapshot is in use, or no runtime could make the container.
        InvalidArgument, NotFound: an option is invalid; the error says which.
        OnlapError: of another kind: the filesystem or the kernel failed.
    """
    if options.network not in NETWORKS:
        raise errors.InvalidArgument(f"there is no network {shown(options.network)}", hint="none or host")
    if not may_mount():
        raise errors.PermissionDenied(
            "only root can run containers",
            hint="run it with sudo, or work in the tree without a container: onlap enter",
        )
    runtimes = runtime.candidates(search)
    # Invalid options are reported before a snapshot is made that stays.
    args = bundle.arguments(source.defaults, options)
    profile = _seccomp(options)
    with contextlib.ExitStack() as stack:
        claimed = stack.enter_context(rundirs.claimed(snapshotter))
        directory = claimed.directory
        record, options = _prepare(snapshotter, source, options, keep, claimed)
        plan = stack.enter_context(exclusion.mounting(snapshotter, record))
        stack.enter_context(mounted(plan, rundirs.rootfs(directory)))
        with errors.translated("run a container", key=os.path.basename(directory)):
            root = stack.enter_context(tree_files.opened_top(rundirs.rootfs(directory)))
            hostname = os.uname().nodename if options.network == "host" else os.path.basename(directory)
            binds = _host_files(directory, options, hostname)
            user = find_user(root, source.defaults.user if options.user is None else options.user)
            env = bundle.environment(source.defaults, options, user, hostname)
            cwd = bundle.working_directory(source.defaults, options)
            problem = find_problem(root, args[0], env, cwd, options.volumes)
            if problem is not None:
                return Ended(problem.status or runtime.CANNOT_RUN, problem.message)
            configuration = bundle.specification(
                rundirs.rootfs(directory),
                args=args,
                env=env,
                cwd=cwd,
                user=user,
                hostname=hostname,
                options=options,
                binds=binds,
                seccomp=profile,
                open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            )
            with open(f"{directory}/config.json", "w", encoding="utf-8") as file:
                json.dump(configuration, file)
            stays = LABEL not in record.labels
            with mount_points.made(
                directory, rundirs.rootfs(directory), _mount_points(options, binds) if stays else ()
            ):
                return _run_any(runtimes, directory, attended)


def _prepare(
    snapshotter: RecordedSnapshotter, source: Source, options: Options, keep: str | None, run: Run
) -> tuple[Record, Options]:
    """The snapshot to run in, and the options, with those that it requires."""
    found = snapshotter.record(source.snapshot)
    if found.kind == ACTIVE:
        if keep is not None:
            raise errors.InvalidArgument(
                f"snapshot {shown(found.name)} is active, and stays under its own key",
                key=keep,
                hint="leave --keep out",
            )
        return found, options
    parent: str | None = found.name
    if found.kind == VIEW:
        # The runtime cannot make mount points in a view: it gets a snapshot beside it, as a read-only root.
        parent, options = found.parent, options._replace(read_only=True)
    labels = dict(source.labels)
    if keep is None:
        labels |= run.labels
    key = keep if keep is not None else f"run-{run.id}"
    snapshotter.prepare(key, parent, labels)
    return snapshotter.record(key), options


def _host_files(directory: str, options: Options, hostname: str) -> list[Volume]:
    """Files by which a program resolves its own host name, and names in the host's network.

    Those of the host are copied, since the container may write to them.
    """
    contents = {"hostname": f"{hostname}\n".encode(), "hosts": _LOCAL_HOSTS.format(hostname=hostname).encode()}
    for name in ("hosts", "resolv.conf") if options.network == "host" else ():
        with contextlib.suppress(FileNotFoundError), open(f"/etc/{name}", "rb") as file:
            contents[name] = file.read()
    taken = {volume.target for volume in options.volumes}
    found = []
    for name, content in contents.items():
        path = f"{directory}/{name}"
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, 0o644)
        if f"/etc/{name}" not in taken:
            found.append(Volume(path, f"/etc/{name}"))
    return found


def _mount_points(options: Options, binds: Sequence[Volume]) -> list[MountPoint]:
    directories = [*bundle.OWN_MOUNT_POINTS, *(tmpfs.target for tmpfs in options.tmpfs)]
    volumes = [MountPoint(volume.target, os.path.isdir(volume.source)) for volume in (*binds, *options.volumes)]
    return [*(MountPoint(path, True) for path in directories), *volumes]


def _seccomp(options: Options) -> dict[str, object] | None:
    held = capabilities.chosen(options.cap_add, options.cap_drop)
    path = options.seccomp if options.seccomp is not None else seccomp.default_profile()
    return None if path is None or path == seccomp.UNCONFINED else seccomp.load(path, held)


def find_problem(
    root: int, command: str, env: Mapping[str, str], cwd: str, volumes: Sequence[Volume] = ()
) -> Failure | None:
    """Why a command cannot be run in a tree, where that can be known in advance; raises OSError.

    The runtime would report it as well, but to the standard error of the container.
    """
    if "/" in command:
        places = [posixpath.join(cwd, command)]
    else:
        places = [posixpath.join(cwd, place, command) for place in env.get("PATH", "").split(":")]
    denied = False
    for place in places:
        there = tree_files.status(root, place)
        if there is not None and stat.S_ISREG(there.st_mode):
            if there.st_mode & 0o111:
                return None
            denied = True
        elif there is not None and "/" in command:
            denied = True
    # Files in volumes and in /proc are not there yet.
    if volumes or command.startswith(("/proc/", "/dev/")):
        return None
    if denied:
        return Failure(f"{shown(command)} cannot be executed", runtime.CANNOT_RUN)
    return Failure(f"there is no command {shown(command)} in the tree", runtime.NO_COMMAND)


def _run_any(runtimes: list[str], directory: str, attended: Attended | None) -> Ended:
    """Run the container with the first runtime that can make it.

    A failure is not remembered for later runs: the reason may be a volume of this container.
    """
    failures = []
    for each in runtimes:
        ended, failure = _run_with(each, directory, attended)
        if failure is None:
            return ended
        if failure.status is not None:
            return Ended(failure.status, failure.message)
        if ended.status > 128:
            return ended  # a signal ended it before it had started: that is not a failure to retry
        failures.append(f"{os.path.basename(each)}: {shown(failure.message)}")
    raise errors.FailedPrecondition(
        f"the container cannot be made: {'; '.join(failures)}", hint="another runtime may be able to: runc, crun"
    )


class _Container:
    """A container whose streams are attended to (:class:`onlap.snapshots.running.streams.Awaited`)."""

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int, end: Callable[[], None]) -> None:
        self._process = process
        self._pidfd = pidfd
        self.kill = end

    def fileno(self) -> int:
        """A descriptor that is readable when the runtime has ended."""
        return self._pidfd

    def wait(self, timeout: float | None = None) -> int | None:
        """The runtime's status; None if it still runs."""
        return self._process.poll()


def _attend(
    process: subprocess.Popen[bytes], streams: Streams, timeout: float | None, end: Callable[[], None]
) -> Ended:
    pidfd = os.pidfd_open(process.pid)
    try:
        status, timed_out = streams.communicate(_Container(process, pidfd, end), timeout)
    finally:
        os.close(pidfd)
    return Ended(status, None, bytes(streams.stdout), bytes(streams.stderr), timed_out)


def _run_with(program: str, directory: str, attended: Attended | None) -> tuple[Ended, Failure | None]:
    for path in (runtime.log(directory), runtime.pid_file(directory)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    with open(f"{directory}/runtime", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(program)
    identifier = rundirs.container_id(directory)
    words = "run", "--bundle", directory, "--pid-file", runtime.pid_file(directory), identifier
    forwarder = Forwarder()
    with contextlib.ExitStack() as stack:
        stdio: Sequence[int | None] = (None, None, None)
        if attended is not None:
            streams = Streams(stack, capture=attended.capture, input=attended.input)
            stdio = streams.theirs
        stack.enter_context(forwarder.installed())
        # The runtime does so itself, unless it was killed.
        stack.callback(runtime.delete, program, directory, identifier)
        # No environment: the runtime needs none, and LISTEN_FDS would pass descriptors to the container.
        command = runtime.command(program, directory, *words)
        process = subprocess.Popen(command, env={}, stdin=stdio[0], stdout=stdio[1], stderr=stdio[2])
        forwarder.attach(process)
        if attended is None:
            ended = Ended(forwarder.wait(process))
        else:
            end = partial(runtime.delete, program, directory, identifier)
            ended = _attend(process, streams, attended.timeout, end)
    status = ended.status
    if status < 0:
        orphans.end(identifier)
    failure = runtime.read_failure(directory) if status != 0 else None
    if forwarder.ended_by is not None:
        status = 128 + forwarder.ended_by
    return ended._replace(status=128 - status if status < 0 else status), failure
