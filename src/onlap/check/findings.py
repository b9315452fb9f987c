"""What ``check`` can find: a closed set of kinds, each with what it means and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from onlap.errors import shown

Severity = Literal["error", "warning", "note"]


class Meaning(NamedTuple):
    """What a kind of finding means.

    Attributes:
        severity: ``"error"``: something that was recorded is lost or wrong. ``"warning"``: nothing is lost yet.
            ``"note"``: left over, as it happens; the next cleanup takes it.
        explanation: what it is, in one sentence.
        remedy: what to do; ``{}`` stands for the thing.
    """

    severity: Severity
    explanation: str
    remedy: str


_REPAIR = "onlap check --repair"
_REPAIR_DEEP = "onlap check --deep --repair"
_CLEANUP = "onlap cleanup"
_MEND = "onlap check --store DIR --repair"
_FROM_SOURCE = "onlap check --store DIR --repair, with a source: --from-registry, --from-content or --from-archive F"
_PRUNE = "let the store's own program remove what is not used, as docker system prune"
_MEND_OR_AGAIN = f"{_MEND}; if other records do not tell it, remove what stands on it, and pull or make it again"
_AGAIN = "remove what stands on it, and pull or make it again"
_REMOVE = "if nothing brings it back, remove it, leaf first: onlap rm {}"

# What only the stores of others can have.
_OF_OTHERS: Mapping[str, Meaning] = {
    "record-damaged": Meaning("error", "a record of it is missing, empty or damaged", _MEND_OR_AGAIN),
    "record-missing": Meaning("error", "the store has lost the record of it", _AGAIN),
    "record-wrong": Meaning("error", "records of it contradict each other", _AGAIN),
    "link-missing": Meaning("error", "the short link to it is missing, so that nothing on it can be mounted", _MEND),
    "link-dangling": Meaning("note", "a short link leads to nothing", "remove the link while the daemon is stopped"),
    "lower-wrong": Meaning("error", "its list of the layers below is missing or wrong", _MEND),
    "too-deep": Meaning("error", "it has more layers below it than can be mounted", "squash some of them"),
    "split-damaged": Meaning("error", "the list of what the layer holds (tar-split) is damaged", _FROM_SOURCE),
    "layer-unused": Meaning("note", "no image or container uses it", _PRUNE),
}
OF_OTHERS = frozenset(_OF_OTHERS)
# What to do about kinds of our own store that those of others have too.
_REMEDIES_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("file-missing", "file-changed", "file-unknown", "tree-missing"), _FROM_SOURCE),
    "file-unreadable": f"check the filesystem (fsck) while nothing is mounted, then: {_FROM_SOURCE}",
    **dict.fromkeys(("blob-missing", "blob-damaged"), _FROM_SOURCE),
    **dict.fromkeys(("image-damaged", "parent-missing", "parent-not-committed", "parent-cycle"), _AGAIN),
    "tree-unknown": "remove it while the daemon and all containers are stopped, unless it was just making it",
    "workdir-missing": _MEND,
    "staging-left": "the next repair, or the store's own program, removes it",
    "trash-waiting": "the store's own program removes it",
    "catalog-damaged": "stop the daemon, move the store away, and pull again",
}

KINDS: Mapping[str, Meaning] = {
    # The catalog
    "catalog-damaged": Meaning(
        "error",
        "SQLite finds its file damaged",
        f"{_REPAIR}; if that does not help, move catalog.db* away, and run it again",
    ),
    "parent-missing": Meaning("error", "the record of the parent is gone", _REMOVE),
    "parent-not-committed": Meaning("error", "its parent can still be written to, or is a view", _REMOVE),
    "parent-cycle": Meaning("error", "it stands on itself", _REMOVE),
    "pin-missing": Meaning("error", "nothing keeps the blobs of the image, so that a cleanup deletes them", _REPAIR),
    "pin-dangling": Meaning("warning", "something keeps a snapshot that is gone", _REPAIR),
    "sidecar-missing": Meaning("note", "the copy of its record beside the tree is missing or old", _CLEANUP),
    "sidecar-damaged": Meaning("warning", "the copy of its record beside the tree says something else", _REPAIR),
    # Trees
    "tree-missing": Meaning("error", "its directory is gone", _REPAIR),
    "tree-quarantined": Meaning("error", "its tree was damaged and set aside", _REPAIR),
    "workdir-missing": Meaning("error", "the snapshot cannot be mounted without its workdir", _REPAIR),
    "tree-unknown": Meaning("warning", "no record belongs to this directory", f"{_REPAIR} takes it in if it can"),
    "committed-mounted": Meaning(
        "warning", "a committed layer is mounted read-write, so that it can still change", "unmount it"
    ),
    "open-to-others": Meaning("warning", "others may look or write where only the owner should", _REPAIR),
    # Content
    "manifest-missing": Meaning("warning", "the list of what the layer holds is gone", _REPAIR),
    "manifest-damaged": Meaning("warning", "the list of what the layer holds is damaged", _REPAIR_DEEP),
    "file-missing": Meaning("error", "a file of a committed layer is gone", _REPAIR_DEEP),
    "file-changed": Meaning("error", "a file of a committed layer is not what was committed", _REPAIR_DEEP),
    "file-unreadable": Meaning("error", "a file of a committed layer cannot be read", _REPAIR_DEEP),
    "file-unknown": Meaning("warning", "a committed layer has a file that was not committed", _REPAIR_DEEP),
    # Images
    "image-damaged": Meaning("error", "the documents of the image are damaged", "onlap check --repair --from-registry"),
    "blob-missing": Meaning("error", "a blob that an image needs is gone", "onlap check --repair --from-registry"),
    "blob-damaged": Meaning("error", "the blob is not what its digest says", _REPAIR_DEEP),
    # What programs leave
    "staging-left": Meaning("note", "a program that was killed left an unfinished tree", _CLEANUP),
    "run-left": Meaning("note", "a program that was killed left mounts, snapshots or files", _CLEANUP),
    "trash-waiting": Meaning("note", "a removed tree waits to be deleted", _CLEANUP),
    **_OF_OTHERS,
}


class Finding(NamedTuple):
    """One thing that is not as it should be.

    Attributes:
        kind: one of :data:`KINDS`.
        thing: the name of a snapshot or image, a digest, or a path below the root.
        path: a file inside the snapshot's tree, from its top; of a record, the name of its file; else None.
        detail: more, in words: what of it differs, who has it mounted.
        users: the images and containers of a store of others that stand on the thing.
    """

    kind: str
    thing: str
    path: str | None = None
    detail: str = ""
    users: tuple[str, ...] = ()

    @property
    def severity(self) -> Severity:
        """See :class:`Meaning`."""
        return KINDS[self.kind].severity

    @property
    def explanation(self) -> str:
        """What it is, in one sentence."""
        return KINDS[self.kind].explanation

    @property
    def remedy(self) -> str:
        """What to do."""
        return KINDS[self.kind].remedy.format(shown(self.thing))

    @property
    def place(self) -> str:
        """The thing, and the file in it, to be shown."""
        if self.path is None:
            return shown(self.thing)
        return f"{shown(self.thing)}: {shown(self.path if self.kind in OF_OTHERS else '/' + self.path)}"

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.kind}: {self.place}: {self.explanation}{detail}"


def remedy_elsewhere(finding: Finding, directory: str) -> str:
    """What to do about a finding in another program's store.

    Args:
        finding: the finding.
        directory: the store, as it was given.
    """
    said = _REMEDIES_ELSEWHERE.get(finding.kind, KINDS[finding.kind].remedy)
    return said.replace("--store DIR", f"--store {shown(directory)}")


def identity(finding: Finding) -> tuple[str, str, str | None]:
    """What is the same of a finding in two checks: all but the detail, which may have other words the second time."""
    return finding.kind, finding.thing, finding.path


class Report(NamedTuple):
    """What a check found.

    Attributes:
        findings: everything, in the order in which it was met.
        snapshots: how many were looked at.
        files: how many of their files were compared with their manifests.
        size: bytes that were read for that, and of blobs.
        blobs: how many were read.
        unlisted: committed snapshots that have no manifest yet, so that their content cannot be checked.
        after: where a check that was cut short goes on, for the argument ``after``; None when it came to its end.
        repaired: which of the findings were repaired.
    """

    findings: tuple[Finding, ...]
    snapshots: int
    files: int
    size: int
    blobs: int
    unlisted: int
    after: str | None
    repaired: tuple[Finding, ...] = ()

    @property
    def left(self) -> tuple[Finding, ...]:
        """What is wrong and was not repaired; leftovers (of severity ``"note"``) do not count."""
        repaired = set(self.repaired)
        return tuple(each for each in self.findings if each.severity != "note" and each not in repaired)

    @property
    def ok(self) -> bool:
        """Whether nothing is left."""
        return not self.left

    def after_repair(self, tried: tuple[Finding, ...], left: tuple[Finding, ...]) -> Report:
        """The same after a repair.

        Args:
            tried: the findings that were to be repaired.
            left: what was found behind the repair.
        """
        still, known = set(map(identity, left)), set(map(identity, self.findings))
        # What the repair itself leaves for the background is no finding.
        new = tuple(each for each in left if identity(each) not in known and each.severity != "note")
        repaired = tuple(each for each in tried if identity(each) not in still)
        return self._replace(findings=self.findings + new, repaired=repaired)
