"""What is cited exists: the ids of docs/BEHAVIOURS.md, and the tests that docs/decisions names as guards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
CITED = re.compile(r"\b([KMANEWLRSXI][1-9]\d?)\b")  # such as N4 and I15; DeepSeek-V4 and F32 are none
DEFINED = re.compile(r"^- \*\*([A-Z]\d+)\*\* ", re.MULTILINE)
GUARD = re.compile(r"(tests/[\w/]+(?:\.py)?)|::(test_\w+)")  # a file or folder; a test in the file named before it


def texts(*patterns: str) -> dict[str, str]:
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


SOURCES = texts("tests/**/*.py", "jaxcache/**/*.py")
DECISIONS = texts("docs/decisions/*.md")
IDS = DEFINED.findall((ROOT / "docs/BEHAVIOURS.md").read_text())


def cited(sources: Mapping[str, str]) -> dict[str, str]:
    """Id -> a file that cites it."""
    return {id: name for name, source in sources.items() for id in CITED.findall(source)}


def undefined(sources: Mapping[str, str]) -> list[str]:
    return [f"{name} cites {id}" for id, name in cited(sources).items() if id not in IDS]


def missing_guards(decisions: Mapping[str, str]) -> Iterator[str]:
    for name, text in decisions.items():
        path, source = "", ""
        for file, test in GUARD.findall(text):
            if file:
                path, source = file, SOURCES.get(file, "")
                if not (ROOT / file).exists():
                    yield f"{name} names {file}"
            elif f"def {test}(" not in source:
                yield f"{name} names {path}::{test}"


def test_every_cited_behaviour_is_defined_once():
    assert len(IDS) == len(set(IDS)) > 90
    found = undefined(SOURCES)
    assert not found


def test_every_behaviour_is_cited():
    """By a test, or by the assertion of an invariant."""
    never = sorted(set(IDS) - set(cited(SOURCES)))
    assert not never


def test_every_guard_of_a_decision_exists():
    assert len(DECISIONS) > 20
    missing = list(missing_guards(DECISIONS))
    assert not missing


def test_what_is_made_up_is_found():
    made_up = "E" + "99"
    assert undefined({"a test": f'"""{made_up}: as N4."""'}) == [f"a test cites {made_up}"]
    guards = "`tests/core/test_fuzz.py::test_every_policy`, `::test_of_nothing`; `tests/core/test_nothing.py`"
    assert list(missing_guards({"a decision": guards})) == [
        "a decision names tests/core/test_fuzz.py::test_of_nothing",
        "a decision names tests/core/test_nothing.py",
    ]
