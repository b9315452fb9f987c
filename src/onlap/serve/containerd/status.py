"""From our errors to gRPC's status codes, as containerd maps its own.

Source: github.com/containerd/errdefs, pkg/errgrpc/grpc.go (in v1.7: errdefs/grpc.go).
"""

from __future__ import annotations

from onlap import errors

# The numbers in grpc/status.proto, by their usual names. containerd passes DataLoss and ResourceExhausted through
# unchanged; its client shows their text.
CODES = {
    "InvalidArgument": 3,
    "NotFound": 5,
    "AlreadyExists": 6,
    "PermissionDenied": 7,
    "ResourceExhausted": 8,
    "FailedPrecondition": 9,
    "Canceled": 1,
    "Unimplemented": 12,
    "Internal": 13,
    "Unavailable": 14,
    "DataLoss": 15,
}

# containerd's client treats a FAILED_PRECONDITION whose text ends like this as another class of error.
_MISREAD = (": conflict", ": not modified")


def status(error: BaseException) -> tuple[int, str]:
    """The code and text of the answer; never UNKNOWN, whatever the error."""
    if isinstance(error, OSError):
        error = errors.from_oserror(error, doing="answer the call")
    if not isinstance(error, errors.OnlapError):
        return CODES["Internal"], f"a bug in Onlap: {type(error).__name__}: {error}"
    message = str(error)
    if message.endswith(_MISREAD):
        message += "."
    return CODES[error.kind], message
