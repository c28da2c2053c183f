"""`python -m benchmarks core`: which figures, as JSON and as a table; exit codes. Sizes are tiny: no time counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import figure
from benchmarks.__main__ import main
from benchmarks.core import suite
from benchmarks.core.workload import Workload, short
from benchmarks.figure import Goal

TINY = Workload(
    page_tokens=(16, 64),
    prompt_tokens=4096,
    short_prompt_tokens=(1024,),
    path_nodes=8,
    insert_tokens=512,
    insert_after_tokens=128,
    num_turns=5,
    victims=30,
    victim_pages=2,
    num_evictions=10,
    namespaces=30,
    conversations=10,
    conversation_turns=3,
    turn_pages=80,
    share_evictions=2,
    capacities=(200_000,),
    rounds=2,
    replay_requests=60,
    turn_requests=7,
    memory_requests=60,
    memory_tokens=200_000,
    running=12,
    arriving=3,
    context_tokens=(100, 300),
    step_capacity=8000,
    warmup_steps=30,
    num_steps=20,
)
NAMES = {
    "interpreter",
    *("match_1k_page16", "match_4k_page16", "match_4k_page64", "match_4k_8_nodes_page16", "match_4k_8_nodes_page64"),
    *("rematch", "rematch_changed", "split", "split_3_components", "insert_duplicate_4k", "insert_512_after_128"),
    *("lock_unlock_8_nodes", "admit_8_nodes", "release_8_nodes"),
    *(
        "evict_one",
        "evict_one_30_namespaces",
        "evict_share",
        "evict_share_3_components",
        "bytes_per_token",
        "bytes_per_token_all_host",
    ),
    *("step_12", "step_12_grow_each", "step_12_3_components", "step_12_tokens"),
    *("step_12_tables", "step_12_whole", "step_12_3_components_whole"),
    *("step_12_whole_host", "step_12_3_components_whole_host"),
    *("pause", "pause_full_collection", "pause_collect_in_step"),
    *("step_12_p99", "step_12_grow_each_p99", "step_12_3_components_p99"),
    *(f"replay_{what}_page{page}_200000" for what in ("full", "all", "all_host") for page in (16, 64)),
}
WITHOUT_GOAL = {
    "interpreter",
    "pause",
    "pause_full_collection",
    "match_1k_page16",
    "rematch_changed",
    "insert_512_after_128",
    "admit_8_nodes",
    "release_8_nodes",
}
WHOLE_STEPS = ("step_12_whole", "step_12_3_components_whole_host")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(suite, "WORKLOAD", TINY)


def test_every_figure_as_json(capsys):
    code = main(["core", "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    figures = report["figures"]
    assert set(figures) == NAMES
    assert code == bool(report["missed"])
    assert report["missed"] == [name for name, entry in figures.items() if entry.get("met") is False]
    for name, entry in figures.items():
        is_measured = entry["value"] > 0 or name.startswith("pause")  # so few objects may be collected in no turn
        assert entry["meaning"] and entry["unit"] and is_measured and entry["noise"] >= 0, name
        if "floor" in entry:
            assert entry["floor"] > 0 and entry["ratio"] > 0 and entry["ratio_noise"] >= 0, name
        is_part = name.startswith("step_12_") and name not in WHOLE_STEPS
        assert ("goal" in entry) is not (is_part or name in WITHOUT_GOAL), name
        assert ("goal" in entry) == ("met" in entry)
    replayed = figures["replay_full_page16_200000"]
    assert replayed["floor_hit_rate"] == pytest.approx(replayed["hit_rate"], abs=0.01)


def test_only_some_as_a_table_and_in_a_file(capsys, tmp_path):
    file = tmp_path / "new" / "bench.json"
    main(["core", "--only", "rematch", "path", "--json", str(file)])
    out = capsys.readouterr().out
    assert "match again while the tree is the same" in out
    assert "lock + unlock 8 nodes / stripped tree" in out
    assert set(json.loads(file.read_text())["figures"]) == {
        "interpreter",
        "rematch",
        "rematch_changed",
        "lock_unlock_8_nodes",
        "admit_8_nodes",
        "release_8_nodes",
    }


def test_a_trace_of_ones_own(capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 512, "output_length": 1, "hash_ids": [1]}\n' * 3)
    main(["core", "--only", "replay_page64", "--trace", str(trace), "--json", "-"])
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["replay_full_page64_200000"]["hit_rate"] == pytest.approx(2 * 448 / (3 * 512))


@pytest.mark.parametrize(("num_bytes", "code", "met"), [(9.0, 0, True), (0.1, 1, False)])
def test_a_missed_goal_is_marked_and_is_the_exit_code(monkeypatch, capsys, num_bytes, code, met):
    monkeypatch.setattr("benchmarks.core.replays.BYTES_GOAL", Goal("value", "<=", num_bytes))
    assert main(["core", "--only", "bytes", "--json", "-"]) == code
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["figures"]["bytes_per_token"]["met"] is met
    assert ("bytes_per_token" in report["missed"]) is not met
    assert ("bytes_per_token: value <= 0.1 is missed" in captured.err) is not met
    main(["core", "--only", "bytes"])
    assert ("NO" in capsys.readouterr().out) is not met


def test_what_cannot_be_measured_is_said(capsys, tmp_path):
    assert main(["core", "--only", "moon"]) == 2
    assert "'moon' is the beginning of none of match" in capsys.readouterr().err
    assert main(["core", "--trace", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: No such file or directory: name a trace with --trace" in capsys.readouterr().err


def test_a_ratio_is_of_the_same_turn():
    made = figure.figure("x", "", [2.0, 4.0, 60.0], [1.0, 2.0, 20.0], goal=Goal("ratio", ">=", 2))
    assert (made.value, made.floor, made.ratio, made.met) == (4.0, 2.0, 2.0, True)
    assert made.ratio_noise == 1.0
    assert not replace(made, goal=Goal("ratio", "<=", 1.9)).met
    assert figure.figure("x", "", [2.0]).met is None


def test_sizes_by_name():
    assert [short(count) for count in (131072, 2_000_000, 48)] == ["128k", "2M", "48"]
