"""Exit statuses: what a script can tell apart."""

from __future__ import annotations

DONE = 0
NO = 1
USAGE = 2
BUG = 70  # EX_SOFTWARE of sysexits.h
SIGNAL = 128  # plus the signal's number, as in shells

# As env(1): where the user's command runs, every status below belongs to that command.
RUN_FAILED = 125
CANNOT_RUN = 126
NO_COMMAND = 127

# By OnlapError.kind; Busy is a FailedPrecondition, DigestMismatch a DataLoss.
BY_KIND = {
    "NotFound": 3,
    "AlreadyExists": 4,
    "FailedPrecondition": 5,
    "Busy": 5,
    "InvalidArgument": 6,
    "PermissionDenied": 7,
    "ResourceExhausted": 8,
    "Unavailable": 9,
    "Unimplemented": 10,
    "DataLoss": 11,
    "DigestMismatch": 11,
    "Canceled": SIGNAL + 2,  # only a callback of the command cancels, and only for Ctrl-C
    "Internal": BUG,
}

# For the help and the manual.
MEANINGS = {
    "0": "done",
    "1": "the answer is no (`diff --exit-code`, `probe --require`, `docker check`)",
    "2": "usage: the command line is not understood",
    "3": "not found",
    "4": "already exists",
    "5": "wrong state, or busy",
    "6": "invalid argument",
    "7": "permission denied",
    "8": "out of space, inodes, descriptors or memory",
    "9": "unavailable; the same command may succeed later",
    "10": "not supported by this kernel, filesystem or snapshotter",
    "11": "data loss: what was stored is gone or damaged",
    "70": "a bug in Onlap; `-vv` shows where",
    "125": "of verbs that run a command: Onlap itself failed; every other status is the command's",
    "126": "of these: the command cannot be run",
    "127": "of these: there is no such command",
    "128+N": "ended by signal N",
}
