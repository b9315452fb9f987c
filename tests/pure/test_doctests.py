"""The examples in docstrings run as they stand."""

from __future__ import annotations

import doctest
import pkgutil
from collections.abc import Iterator
from importlib import import_module

import pytest

import capabilities
import onlap

# Those that mount what an ordinary user may not.
NEEDS: dict[str, str] = {}


def modules() -> Iterator[str]:
    yield "onlap"
    for found in pkgutil.walk_packages(onlap.__path__, "onlap."):
        yield found.name


def examples() -> Iterator[doctest.DocTest]:
    # Empty docstrings are passed over by the finder; so are names that a module only imports.
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in modules():
        if name.endswith("__main__"):
            continue
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "onlap":
                raise
            continue  # a dependency of an extra that is not installed
        yield from (test for test in finder.find(module, name) if test.examples)


EXAMPLES = list(examples())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example: doctest.DocTest) -> None:
    if example.name in NEEDS:
        verdict = capabilities.verdict(NEEDS[example.name])
        if not verdict.ok:
            pytest.skip(verdict.reason)
    said: list[str] = []
    # IGNORE_EXCEPTION_DETAIL is off: the text of an error is part of what is shown.
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert result.failed == 0, "".join(said)


def test_the_contract_has_its_three_scenarios() -> None:
    names = {example.name: example for example in EXAMPLES}
    contract = names["onlap.snapshots.contract"]
    sources = "".join(each.source for each in contract.examples)
    for call in ("prepare(", "commit(", "remove("):
        assert call in sources
    assert "onlap" in names
