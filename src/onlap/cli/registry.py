"""Every verb, with the function that runs it; a verb's module is loaded only when the verb is used.

A verb is two functions of a module of :mod:`onlap.cli.verbs`: ``rm_arguments(parser)`` declares its arguments, and
``rm(call)`` runs it and returns the exit status (None for 0).
"""

from __future__ import annotations

from collections.abc import Callable
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from onlap.cli.call import Call
    from onlap.cli.parser import Parser


class Verb(NamedTuple):
    """One verb.

    Attributes:
        name: what the user types; for a verb of a group two words, as ``image pull``.
        module: a module of :mod:`onlap.cli.verbs`.
        heading: the heading above it in the help.
        summary: one line on what it does.
    """

    name: str
    module: str
    heading: str
    summary: str

    @property
    def arguments(self) -> Callable[[Parser], None]:
        """The function that declares its arguments."""
        return self._load(f"{self._word}_arguments")

    @property
    def run(self) -> Callable[[Call], int | None]:
        """The function that runs it."""
        return self._load(f"{self._word}_" if iskeyword(self._word) else self._word)

    @property
    def _word(self) -> str:
        return self.name.rpartition(" ")[2]

    def _load(self, function: str) -> Callable[..., Any]:
        from importlib import import_module

        loaded: Callable[..., Any] = getattr(import_module(f"onlap.cli.verbs.{self.module}"), function)
        return loaded


# A hidden verb, for the scripts of "onlap completion".
COMPLETE = "__complete"

_SNAPSHOTS = "snapshots"
_MOUNTING = "mounting"
_CONTENT = "content"
_MAINTENANCE = "maintenance"
_IMAGES = "images"
_WORKSPACES = "workspaces"
_DOCKER = "Docker's data roots"
_SERVE = "serve"

VERBS = {
    verb.name: verb
    for verb in (
        Verb("init", "root", _SNAPSHOTS, "make a root, or show what an existing one is"),
        Verb("prepare", "snapshots", _SNAPSHOTS, "make an active snapshot, which can be written to"),
        Verb("view", "snapshots", _SNAPSHOTS, "make a read-only snapshot"),
        Verb("commit", "snapshots", _SNAPSHOTS, "turn an active snapshot into a committed one"),
        Verb("rm", "snapshots", _SNAPSHOTS, "remove snapshots, and free their space"),
        Verb("ls", "listing", _SNAPSHOTS, "list the snapshots"),
        Verb("tree", "listing", _SNAPSHOTS, "show which snapshot is the parent of which"),
        Verb("info", "listing", _SNAPSHOTS, "show everything about a snapshot"),
        Verb("label", "snapshots", _SNAPSHOTS, "set, remove or show labels"),
        Verb("usage", "listing", _SNAPSHOTS, "show the bytes and inodes that snapshots take"),
        Verb("mounts", "mounting", _MOUNTING, "print how a snapshot is mounted"),
        Verb("mount", "mounting", _MOUNTING, "mount a snapshot at a directory"),
        Verb("umount", "mounting", _MOUNTING, "unmount a snapshot"),
        Verb("enter", "running.enter", _MOUNTING, "run a command in a snapshot's tree, in its own namespace"),
        Verb("unshare", "running.unshare", _MOUNTING, "run a command in namespaces where the library can mount"),
        Verb("diff", "content", _CONTENT, "show what a snapshot changed, or how two differ"),
        Verb("apply", "content", _CONTENT, "apply a layer archive to an active snapshot"),
        Verb("import", "content", _CONTENT, "import a directory or an archive as a committed snapshot"),
        Verb("export", "content", _CONTENT, "export a snapshot's tree to a directory or an archive"),
        Verb("squash", "snapshots", _CONTENT, "merge several layers into one"),
        Verb("df", "root", _MAINTENANCE, "show what the root holds, who keeps it, and what cleanup would free"),
        Verb("cleanup", "root", _MAINTENANCE, "delete what belongs to no snapshot"),
        Verb("check", "check", _MAINTENANCE, "compare what the root holds with what it should hold"),
        Verb("backup", "backup", _MAINTENANCE, "write everything committed to an archive, while the root is in use"),
        Verb("restore", "backup", _MAINTENANCE, "make a new root from a backup"),
        Verb("probe", "root", _MAINTENANCE, "show what this kernel and a directory can do"),
        Verb("demo", "demo", _MAINTENANCE, "show the main job on a real tree, and leave nothing behind"),
        Verb("completion", "completion", _MAINTENANCE, "print a script that completes onlap's command lines"),
        Verb("run", "running.run", _IMAGES, "run a command in a container, from an image or a snapshot"),
        Verb("image pull", "image.registry", _IMAGES, "pull an image from a registry, and unpack it"),
        Verb("image push", "image.registry", _IMAGES, "push an image to a registry"),
        Verb("image import", "image.formats", _IMAGES, "import images from an archive or a directory"),
        Verb("image export", "image.formats", _IMAGES, "export images to an archive or a directory"),
        Verb("image ls", "image.index", _IMAGES, "list the images"),
        Verb("image inspect", "image.index", _IMAGES, "show everything about an image, including its configuration"),
        Verb("image digest", "image.index", _IMAGES, "print the digest of an image's manifest"),
        Verb("image rm", "image.index", _IMAGES, "remove images, and the layers that nothing else needs"),
        Verb("image tag", "image.index", _IMAGES, "give an image another name"),
        Verb("image history", "image.inspection", _IMAGES, "show what each build step of an image did"),
        Verb("image diff", "image.inspection", _IMAGES, "show how two images differ, path by path"),
        Verb("image files", "image.inspection", _IMAGES, "show which layer each file comes from, and what it hides"),
        Verb("image commit", "image.commit", _IMAGES, "make an image of an active snapshot"),
        Verb("ws new", "ws.lifetime", _WORKSPACES, "make a workspace of a directory, a snapshot or an image"),
        Verb("ws ls", "ws.lifetime", _WORKSPACES, "list the workspaces"),
        Verb("ws run", "ws.running", _WORKSPACES, "run a command in a workspace, and show what it changed"),
        Verb("ws shell", "ws.running", _WORKSPACES, "start a shell in a workspace"),
        Verb("ws checkpoint", "ws.history", _WORKSPACES, "keep the present state of a workspace"),
        Verb("ws rollback", "ws.history", _WORKSPACES, "go back to a checkpoint"),
        Verb("ws fork", "ws.lifetime", _WORKSPACES, "make more workspaces with the same tree"),
        Verb("ws log", "ws.history", _WORKSPACES, "show the checkpoints of a workspace as a tree"),
        Verb("ws diff", "ws.changes", _WORKSPACES, "show what a workspace changed"),
        Verb("ws merge", "ws.changes", _WORKSPACES, "bring what a workspace changed back into the directory"),
        Verb("ws forget", "ws.history", _WORKSPACES, "remove checkpoints from the history"),
        Verb("ws keep", "ws.history", _WORKSPACES, "forget all checkpoints but the newest and the named ones"),
        Verb("ws rm", "ws.lifetime", _WORKSPACES, "remove workspaces, and free their space"),
        Verb("try", "ws.trying", _WORKSPACES, "run a command in a copy of this directory, and apply what it changed"),
        Verb("docker ls", "docker", _DOCKER, "list the layers of a Docker data root, their owners and their sizes"),
        Verb("docker tree", "docker", _DOCKER, "show which of them is the parent of which"),
        Verb("docker diff", "docker", _DOCKER, "show what one of them changed"),
        Verb("docker check", "docker", _DOCKER, "find what is damaged or wasted in a Docker data root"),
        Verb("serve containerd", "serve", _SERVE, "serve the snapshots to containerd"),
        Verb("serve docker", "serve", _SERVE, "be a graph driver plugin of Docker"),
    )
}

# First words of verbs that have two.
GROUPS = frozenset(group for group, space, _ in (name.partition(" ") for name in VERBS) if space)


def of_group(group: str) -> list[Verb]:
    """The verbs of a group, in the order of the help."""
    return [verb for name, verb in VERBS.items() if name.startswith(f"{group} ")]
