"""What a plugin has to know after a restart: dockerd sends it only once, when dockerd starts.

Two files: ``<socket-dir>/.<name>.home`` has the path of the driver's home; on a tmpfs, as /run, it ends with the boot.
``<home>/.onlap-graphdriver.json`` has the rest: options, id maps, and the reference counts above one. The counts are
valid for one boot; the driver checks which mounts still exist, each of which is one use at least.

Neither is synced: after a power cut dockerd starts again as well, and sends everything again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

from onlap import errors
from onlap.catalog.disk.boot import boot_id
from onlap.errors import shown
from onlap.graphdrivers.ids import IdMap
from onlap.syscalls.files import write_all

FILE = ".onlap-graphdriver.json"
_FORMAT = 1
_APPLYING = ".onlap-applying-"


class State(NamedTuple):
    """What dockerd sent, and the counts since.

    Attributes:
        driver: ``"overlay"`` or ``"overlay2"``.
        home: the driver's directory.
        options: Docker's ``--storage-opt``.
        ids: Docker's ``--userns-remap``.
        counts: how many Gets of a layer have had no Put yet, where that is more than one.
    """

    driver: str
    home: str
    options: tuple[str, ...]
    ids: IdMap
    counts: Mapping[str, int]


class StateFile:
    """The two files of one plugin.

    Args:
        socket_directory: the directory of the file with the home's path.
        name: the plugin's.
    """

    def __init__(self, socket_directory: str, name: str) -> None:
        self._pointer = os.path.join(socket_directory, f".{name}.home")

    def save(self, state: State) -> None:
        """Save the state.

        Raises:
            OnlapError: an error of the kernel.
        """
        value = {
            "format": _FORMAT,
            "boot": boot_id(),
            "driver": state.driver,
            "options": state.options,
            **state.ids.as_json(),
            "counts": dict(state.counts),
        }
        with errors.translated("save the plugin's state", key=state.home):
            _replace(os.path.join(state.home, FILE), json.dumps(value).encode())

    def point(self, home: str) -> None:
        """Save the path of the home.

        Raises:
            OnlapError: an error of the kernel.
        """
        with errors.translated("save the path of the plugin's home", key=home):
            _replace(self._pointer, os.fsencode(home))

    def load(self) -> State | None:
        """The saved state; None if there is none.

        Raises:
            DataLoss: the files are damaged.
            OnlapError: of another kind, for errors of the kernel.
        """
        home = _read(self._pointer)
        if home and b"\0" in home:  # after a power cut, if only the file's length was written
            raise errors.DataLoss(
                f"{shown(self._pointer)} is damaged", key=self._pointer, hint="remove it, and restart dockerd"
            )
        return _load(os.fsdecode(home)) if home else None

    def driver_of(self, home: str) -> str | None:
        """The driver that wrote a home; None if none of ours did, or if that is unknown.

        Raises:
            OnlapError: an error of the kernel.
        """
        try:
            state = _load(home)
        except errors.DataLoss:
            return None  # dockerd sends all of it again
        return None if state is None else state.driver


class Applying:
    """A mark that a layer is being applied, which stays if the plugin is killed in the meantime.

    Args:
        home: the driver's.
        id: the layer's, which exists.
    """

    def __init__(self, home: str, id: str) -> None:
        self._path = os.path.join(home, _APPLYING + id)

    def begin(self) -> bool:
        """Set the mark; False if it is set already.

        Raises:
            OnlapError: an error of the kernel.
        """
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        except OSError as error:
            raise errors.from_oserror(error, doing="mark the layer", key=self._path) from error
        return True

    def end(self) -> None:
        """Remove the mark, if it is set.

        Raises:
            OnlapError: an error of the kernel.
        """
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise errors.from_oserror(error, doing="unmark the layer", key=self._path) from error

    @staticmethod
    def forget_all(home: str) -> None:
        """Remove all marks: dockerd was restarted, and repeats nothing."""
        for name in os.listdir(home):
            if name.startswith(_APPLYING):
                Applying(home, name.removeprefix(_APPLYING)).end()


def _load(home: str) -> State | None:
    text = _read(os.path.join(home, FILE))
    if text is None:
        return None
    try:
        return _parse(home, json.loads(text))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise errors.DataLoss(
            f"the plugin's state in {shown(home)} is damaged",
            key=home,
            hint=f"remove {FILE} there and restart dockerd, which sends it again",
        ) from error


def _parse(home: str, value: dict[str, object]) -> State:
    if value["format"] != _FORMAT:
        raise ValueError(f"format {value['format']!r}")
    options, counts = value["options"], value["counts"]
    if not isinstance(options, list) or not isinstance(counts, dict):
        raise TypeError("options must be a list and counts an object")
    # Mounts end with the boot.
    known = {str(id): int(count) for id, count in counts.items()} if value["boot"] == boot_id() else {}
    ids = IdMap.from_json(value["UIDMaps"], value["GIDMaps"])
    return State(str(value["driver"]), home, tuple(str(option) for option in options), ids, known)


def _replace(path: str, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one."""
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, content)
    finally:
        os.close(fd)
    os.rename(new, path)


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise errors.from_oserror(error, doing="read the plugin's state", key=path) from error
