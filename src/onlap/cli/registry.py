"""Every verb, with the module that runs it; nothing is loaded before it is asked for.

A module of a verb has ``arguments(parser)``, which declares what it takes, and ``run(call)``, which does it and returns
the exit status (None for 0).
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple


class Verb(NamedTuple):
    """One verb.

    Attributes:
        name: what the user types; of a verb of a group two words, as ``image pull``.
        module: of :mod:`onlap.cli.verbs`.
        group: the heading that it stands under in the help.
        summary: what it does, in a line.
    """

    name: str
    module: str
    group: str
    summary: str

    def load(self) -> ModuleType:
        """Its module."""
        from importlib import import_module

        return import_module(f"onlap.cli.verbs.{self.module}")


_SNAPSHOTS = "snapshots"
_MOUNTING = "mounting"
_CONTENT = "content"
_CARE = "care"
_IMAGES = "images"
_DOCKER = "Docker's data roots"
_SERVE = "serve"

VERBS = {
    verb.name: verb
    for verb in (
        Verb("init", "init", _SNAPSHOTS, "make a root, or say what the one that is there is"),
        Verb("prepare", "prepare", _SNAPSHOTS, "a new active snapshot, which can be written to"),
        Verb("view", "prepare", _SNAPSHOTS, "a new read-only snapshot"),
        Verb("commit", "commit", _SNAPSHOTS, "turn an active snapshot into a committed one"),
        Verb("rm", "rm", _SNAPSHOTS, "remove snapshots, and free their space"),
        Verb("ls", "ls", _SNAPSHOTS, "list the snapshots"),
        Verb("tree", "tree", _SNAPSHOTS, "show which snapshot stands on which"),
        Verb("info", "info", _SNAPSHOTS, "all that is known of a snapshot"),
        Verb("label", "label", _SNAPSHOTS, "set, take away or show labels"),
        Verb("usage", "usage", _SNAPSHOTS, "bytes and inodes that snapshots take"),
        Verb("mounts", "mounts", _MOUNTING, "print how a snapshot is mounted"),
        Verb("mount", "mount", _MOUNTING, "mount a snapshot at a directory"),
        Verb("umount", "mount", _MOUNTING, "unmount it"),
        Verb("enter", "enter", _MOUNTING, "run a command in a snapshot's tree, in a namespace of its own"),
        Verb("diff", "diff", _CONTENT, "what a snapshot changed, or how two differ"),
        Verb("apply", "apply", _CONTENT, "write the archive of a layer into an active snapshot"),
        Verb("import", "import_", _CONTENT, "take a directory or an archive in, as a committed snapshot"),
        Verb("export", "export", _CONTENT, "write the tree of a snapshot into a directory or an archive"),
        Verb("squash", "squash", _CONTENT, "make one layer of several"),
        Verb("df", "df", _CARE, "what the root holds, who keeps it, and what cleanup would free"),
        Verb("cleanup", "cleanup", _CARE, "delete what belongs to no snapshot"),
        Verb("probe", "probe", _CARE, "what this kernel and a directory can do"),
        Verb("demo", "demo", _CARE, "the main job, on a real tree; leaves nothing behind"),
        Verb("completion", "completion", _CARE, "print a script that completes onlap's command lines"),
        Verb("run", "run", _IMAGES, "run a command in a container, on an image or a snapshot"),
        Verb("image pull", "image.pull", _IMAGES, "fetch an image from a registry, and unpack it"),
        Verb("image push", "image.push", _IMAGES, "send an image to a registry"),
        Verb("image import", "image.import_", _IMAGES, "take images in from an archive or a directory"),
        Verb("image export", "image.export", _IMAGES, "write images into an archive or a directory"),
        Verb("image ls", "image.ls", _IMAGES, "list the images"),
        Verb("image inspect", "image.inspect", _IMAGES, "all that is known of an image, its configuration included"),
        Verb("image digest", "image.digest", _IMAGES, "print the digest of an image's manifest"),
        Verb("image rm", "image.rm", _IMAGES, "remove images, and the layers that nothing else needs"),
        Verb("image tag", "image.tag", _IMAGES, "give an image another name"),
        Verb("image history", "image.history", _IMAGES, "what each step of an image's making did"),
        Verb("image diff", "image.diff", _IMAGES, "how two images differ, path by path"),
        Verb("image files", "image.files", _IMAGES, "which layer each file comes from, and what it hides"),
        Verb("image commit", "image.commit", _IMAGES, "make an image of an active snapshot"),
        Verb("docker ls", "docker.ls", _DOCKER, "whose the layers of a Docker data root are, and what they take"),
        Verb("docker tree", "docker.tree", _DOCKER, "which of them stands on which"),
        Verb("docker diff", "docker.diff", _DOCKER, "what one of them changed"),
        Verb("docker check", "docker.check", _DOCKER, "what is damaged in a Docker data root, or wasted"),
        Verb("serve", "serve", _SERVE, "serve the snapshots to containerd, or be Docker's graph driver"),
    )
}

# First words of verbs that have two.
GROUPS = frozenset(group for group, space, _ in (name.partition(" ") for name in VERBS) if space)


def of_group(group: str) -> list[Verb]:
    """The verbs of a group, in the order of the help."""
    return [verb for name, verb in VERBS.items() if name.startswith(f"{group} ")]
