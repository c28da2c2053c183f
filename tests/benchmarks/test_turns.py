"""What is lost where turns end: the lines of the study that matter, on fewer conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks import turns
from benchmarks.turns import Workload, found_tokens
from jaxcache.core.kinds.state import State, StateResidency
from jaxcache.core.kinds.window import WindowResidency
from jaxcache.core.pages import Residency

MIDDLE = Workload("middle", num_conversations=8)
ONE_EACH = replace(MIDDLE, slots_each=1.0, windows_each=1.0)
SHARED = replace(MIDDLE, system_tokens=turns.SYSTEM_TOKENS)


def lost(workload: Workload, mixture: str, page_tokens: int = 16, grid: int = 1) -> float:
    """In percent of what full attention alone finds."""
    return 100 * (1 - found_tokens(workload, mixture, page_tokens, grid) / found_tokens(workload, "full", page_tokens))


@pytest.mark.parametrize("page_tokens", turns.PAGES)
@pytest.mark.parametrize("turn", ["short", "middle"])
@pytest.mark.parametrize("mixture", ["full + window", "full + state", "full + window + state"])
def test_on_a_grid_of_pages_nothing_is_lost(mixture, turn, page_tokens):
    """N4, N7: a hybrid finds what full attention alone would find, whatever the length of turns."""
    assert lost(replace(MIDDLE, turn=turn), mixture, page_tokens) == 0


@pytest.mark.parametrize(("grid", "low", "high"), [(64, 1, 3), (128, 3, 6), (256, 7, 12), (512, 15, 25)])
def test_what_a_coarser_grid_costs(grid, low, high):
    """Half of it a turn: the reason why a model declares none if its kernel can start anywhere."""
    assert low < lost(MIDDLE, "full + state", grid=grid) < high


@pytest.mark.parametrize("inserts_often", [True, False])
@pytest.mark.parametrize("each", [2.0, 1.0])
@pytest.mark.parametrize("mixture", ["full + window", "full + state", "full + window + state"])
def test_a_window_and_a_slot_for_each_conversation_suffice(mixture, each, inserts_often):
    """N7: beside what those need that run."""
    assert lost(replace(MIDDLE, slots_each=each, windows_each=each, inserts_often=inserts_often), mixture) == 0


@pytest.mark.parametrize("mixture", ["full + window", "full + state", "full + window + state"])
def test_with_half_of_that_most_is_still_found(mixture):
    assert 0 < lost(replace(MIDDLE, num_conversations=16, slots_each=0.5, windows_each=0.5), mixture) < 25


def test_what_all_conversations_begin_with_is_found():
    """Its state is shared: the many states of one conversation do not push it out of max_states_per_path."""
    assert lost(SHARED, "full + state") < 1


def take_all_for_shared(patch: pytest.MonkeyPatch) -> None:
    above = State._states_above

    def all_shared(self, newest):
        passed, shared = above(self, newest)
        return [], [*passed, *shared]

    patch.setattr(State, "_states_above", all_shared)


def generated_text_leaves_first(patch: pytest.MonkeyPatch) -> None:
    for residency in (WindowResidency, StateResidency):
        patch.setattr(residency, "output_leaves_first", True)


def passed_ones_leave_like_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residency, "demote", lambda self, node: None)


MUTATIONS: dict[str, tuple[Workload, str, Callable[[pytest.MonkeyPatch], object]]] = {
    "the state at the end of a turn leaves first": (ONE_EACH, "full + state", generated_text_leaves_first),
    "the window at the end of a turn leaves first": (ONE_EACH, "full + window", generated_text_leaves_first),
    "states that are passed leave like others": (ONE_EACH, "full + state", passed_ones_leave_like_others),
    "windows that are passed leave like others": (ONE_EACH, "full + window", passed_ones_leave_like_others),
    "the shallowest state leaves, shared or not": (SHARED, "full + state", take_all_for_shared),
}


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_lose_more(monkeypatch, name):
    workload, mixture, mutate = MUTATIONS[name]
    mutate(monkeypatch)
    assert lost(workload, mixture) > 1


def test_the_command_writes_what_it_measures(monkeypatch, tmp_path, capsys):
    few = [replace(MIDDLE, turn="short", num_turns=3)]
    monkeypatch.setattr(turns, "workloads", lambda: few)
    monkeypatch.setattr(turns, "PAGES", (16,))
    file = tmp_path / "turns.json"
    assert turns.main(["--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["lost"]["full + state, 1"] == 0 < row["lost"]["full + state, 256"]
    assert "short" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        turns.main(["--json", str(tmp_path)])
    assert "cannot be written" in capsys.readouterr().err
