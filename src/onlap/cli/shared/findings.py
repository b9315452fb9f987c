"""How findings of a check are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from onlap.cli.terminal.text import count
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.check.findings import Finding
    from onlap.cli.terminal.output import Output

_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}
# Users of a layer that are named; a base layer has hundreds.
_USERS = 5


def show_findings(
    out: Output, findings: Iterable[Finding], remedy: Callable[[Finding], str] = lambda finding: finding.remedy
) -> tuple[Finding, ...]:
    """Print findings as they come, each as a line or a JSON object, and return them.

    Args:
        out: where to.
        findings: the findings.
        remedy: what to do about one.
    """
    shown_ones = []
    for finding in findings:
        shown_ones.append(finding)
        if out.json:
            more = {"severity": finding.severity, "explanation": finding.explanation, "remedy": remedy(finding)}
            out.item({**finding._asdict(), **more})
        else:
            out.line(f"{out.paint(finding.severity, _STYLES[finding.severity])}: {finding}{users_of(finding)}")
    return tuple(shown_ones)


def users_of(finding: Finding) -> str:
    """Who stands on the thing, for the end of a line."""
    names = [shown(name) for name in finding.users]
    more = f" and {len(names) - _USERS} more" if len(names) > _USERS else ""
    return f"; used by {', '.join(names[:_USERS])}{more}" if names else ""


def verdict(findings: tuple[Finding, ...]) -> str:
    """How many there are of each severity, in words."""
    severities = [each.severity for each in findings]
    counts = [count(severities.count(word), word) for word in _STYLES if word in severities]
    return ", ".join(counts) or "nothing found"
