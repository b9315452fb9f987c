"""Exit statuses: what a script can tell apart."""

from __future__ import annotations

DONE = 0
NO = 1  # the answer is no: diff --exit-code, --require
USAGE = 2
BUG = 70  # EX_SOFTWARE of sysexits.h
SIGNAL = 128  # plus the signal's number, as shells have it

# env(1): where a command of the caller's is run, every status below belongs to that command.
RUN_FAILED = 125
CANNOT_RUN = 126
NO_COMMAND = 127

# From OnlapError.kind; Busy is a FailedPrecondition, DigestMismatch a DataLoss.
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
    "Canceled": SIGNAL + 2,  # only a callback of ours cancels, and it does so for Ctrl-C
    "Internal": BUG,
}

# For "onlap --help".
MEANING = (
    "0 done, 1 the answer is no, 2 usage, 3 not found, 4 exists already, 5 wrong state or busy, 6 invalid argument,\n"
    "7 permission denied, 8 out of space or other resources, 9 try again later, 10 not supported here, 11 data loss,\n"
    "70 a bug of ours (-vv shows where), 128+N ended by signal N; enter and run: 125 to 127 as env(1), else the\n"
    "command's own"
)
