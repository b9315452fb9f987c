"""The system calls that a container may make, by the profile that containers/common installs for Podman.

A profile has rules for capabilities, machines and kernels; a runtime needs the result for one container.

Sources: containers/common v0.62, pkg/seccomp/seccomp_linux.go and filter.go; OCI runtime specification 1.2,
config-linux.md, "Seccomp".
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from onlap import errors
from onlap.errors import shown

# The administrator's before the distribution's, in Podman's order (containers.conf(5), seccomp_profile).
PLACES = ("/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json")
UNCONFINED = "unconfined"

# From the machine as uname(2) has it to Go's name, which filters of profiles use, and libseccomp's.
_MACHINES = {
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "armv7l": ("arm", "SCMP_ARCH_ARM"),
    "i686": ("386", "SCMP_ARCH_X86"),
    "loongarch64": ("loong64", "SCMP_ARCH_LOONGARCH64"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
}
_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})")
_MAX_PROFILE = 8 << 20


def default_profile() -> str | None:
    """The path of this machine's profile; None where there is none."""
    return next((path for path in PLACES if os.path.exists(path)), None)


def load(path: str, capabilities: Collection[str]) -> dict[str, object]:
    """A profile in the runtime's form, for this machine and a container with these capabilities.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is not a profile.
        OnlapError: it cannot be read.
    """
    with errors.translated("read the seccomp profile", key=path), open(path, "rb") as file:
        data = file.read(_MAX_PROFILE)
    try:
        return _specification(json.loads(data), os.uname().machine, capabilities)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.InvalidArgument(
            f"{shown(path)} is not a seccomp profile: {type(error).__name__}: {shown(error)}",
            key=path,
            hint="it must be JSON, as /usr/share/containers/seccomp.json is",
        ) from error


def _specification(profile: Mapping[str, Any], machine: str, capabilities: Collection[str]) -> dict[str, object]:
    architecture, native = _MACHINES.get(machine, ("", ""))
    rules = [
        _rule(call)
        for call in profile["syscalls"]
        if _is_included(call.get("includes") or {}, architecture, capabilities)
        and not _is_excluded(call.get("excludes") or {}, architecture, capabilities)
    ]
    found: dict[str, object] = {"defaultAction": str(profile["defaultAction"]), "syscalls": rules}
    found |= _errno(profile, "defaultErrnoRet", "defaultErrno")
    architectures = list(profile.get("architectures") or ()) or _architectures(profile.get("archMap") or (), native)
    if architectures:
        found["architectures"] = architectures
    if profile.get("flags"):
        found["flags"] = list(profile["flags"])
    return found


def _architectures(table: Sequence[Mapping[str, Any]], native: str) -> list[str]:
    """This machine's architecture, and others that its kernel runs."""
    return next(
        ([native, *(row.get("subArchitectures") or ())] for row in table if row["architecture"] == native),
        [],
    )


def _is_included(filters: Mapping[str, Any], architecture: str, capabilities: Collection[str]) -> bool:
    return (
        (not filters.get("arches") or architecture in filters["arches"])
        and all(name in capabilities for name in filters.get("caps") or ())
        and (not filters.get("minKernel") or _kernel_is_at_least(filters["minKernel"]))
    )


def _is_excluded(filters: Mapping[str, Any], architecture: str, capabilities: Collection[str]) -> bool:
    return (
        architecture in (filters.get("arches") or ())
        or any(name in capabilities for name in filters.get("caps") or ())
        or bool(filters.get("minKernel") and _kernel_is_at_least(filters["minKernel"]))
    )


def _kernel_is_at_least(version: str) -> bool:
    wanted, running = (_VERSION.match(text) for text in (version, os.uname().release))
    if wanted is None:
        raise ValueError(f"{version} is not a version of a kernel")
    return running is not None and (int(running[1]), int(running[2])) >= (int(wanted[1]), int(wanted[2]))


def _rule(call: Mapping[str, Any]) -> dict[str, object]:
    names = list(call.get("names") or ([call["name"]] if call.get("name") else []))
    if not names:
        raise ValueError("a rule names no system call")
    rule: dict[str, object] = {"names": names, "action": str(call["action"])}
    arguments = [
        {key: each[key] for key in ("index", "value", "valueTwo", "op") if key in each}
        for each in call.get("args") or ()
    ]
    return rule | ({"args": arguments} if arguments else {}) | _errno(call, "errnoRet", "errno")


def _errno(table: Mapping[str, Any], number: str, name: str) -> dict[str, object]:
    """The error of a refused call: Docker's profiles have its number, Podman's its name as well."""
    if table.get(number) is not None:
        return {number: int(table[number])}
    if not table.get(name):
        return {}
    value = getattr(errno, table[name], None)
    if not isinstance(value, int):
        raise ValueError(f"there is no error {table[name]}")
    return {number: value}
