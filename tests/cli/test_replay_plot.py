"""`python -m jaxcache replay --plot`: the picture, and errors before the long work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks.core.workload import TRACE
from jaxcache.cli import _replay_plot, main
from jaxcache.core.eviction import POLICIES
from jaxcache.replay.replay import Setting
from jaxcache.replay.study import Curves, Occupancy, Study

ROOT = Path(__file__).parents[2]
SHORT = ("replay", str(TRACE), "--requests", "60", "--page-tokens", "512", "--device-tokens", "300k")


def axes_of(curves: Curves, setting: Setting):
    axes = Figure().add_subplot()
    _replay_plot.draw_curves(axes, curves, setting)
    return axes


# ---- the picture


def test_lines_are_the_numbers_and_equal_policies_are_one():
    curves = Curves([1000, 2000], {"fifo": [0.1, 0.2], "lru": [0.1, 0.3], "priority": [0.1, 0.3]}, [0.2, 0.4], 0.5)
    axes = axes_of(curves, Setting(16, 2000))
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["infinite cache", "offline optimum", "lru, priority", "fifo", "asked for, 2k"]
    assert list(lines["lru, priority"].get_ydata()) == [0.1, 0.3]
    assert list(lines["fifo"].get_ydata()) == [0.1, 0.2]
    assert list(lines["offline optimum"].get_ydata()) == [0.2, 0.4]
    assert lines["offline optimum"].get_xdata() == pytest.approx([1000, 2000])
    assert list(lines["infinite cache"].get_ydata()) == [0.5, 0.5]
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[1] > 0.5


@pytest.mark.parametrize(("host", "scale"), [(4000, "linear"), (100_000, "log")])
def test_capacities_are_dashed_and_far_ones_make_a_log_axis(host, scale):
    occupancy = Occupancy({"device": 2000, "host": host}, [0, 1], {"device": [0, 1500], "host": [0, 1600]})
    axes = Figure().add_subplot()
    _replay_plot.draw_occupancy(axes, occupancy, Setting(16, 2000, host))
    assert axes.get_yscale() == scale
    dashed = {line.get_label(): line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"}
    assert dashed == {"capacity of device, 2k": 2000, f"capacity of host, {host // 1000}k": host}
    assert [list(line.get_ydata()) for line in axes.get_lines()][::2] == [[0, 1500], [0, 1600]]


def test_the_title_says_what_was_replayed():
    setting = Setting(16, 2000, components=("full", "state"), num_namespaces=3, include_outputs=True)
    title = _replay_plot.title(["a.jsonl", "b.jsonl"], setting, 1234)
    assert (
        title == "a.jsonl, b.jsonl\n1,234 requests; pages of 16 tokens; components full, state; 3 namespaces; outputs"
    )
    title = _replay_plot.title(["a", "b", "c", "d", "e"], Setting(16, 2000), 1)
    assert title == "a, b, c and 2 more\n1 requests; pages of 16 tokens; component full"


@pytest.mark.parametrize(
    ("count", "text"), [(31_250, "31.2k"), (2_000_000, "2M"), (999_936, "1M"), (512, "512"), (1_250_000, "1.25M")]
)
def test_tokens_are_short(count, text):
    assert _replay_plot.tokens(count) == text


def test_a_png_has_every_line_in_its_colour(capsys, tmp_path):
    file = tmp_path / "new" / "replay.png"
    assert main([*SHORT, "--policy", "fifo", "--host-tokens", "600k", "--plot", str(file), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert json.loads(out)["policy"] == "fifo"
    image = matplotlib.image.imread(file)[..., :3]
    assert min(image.shape[:2]) > 500
    assert (image == 1).all(axis=2).mean() < 0.98
    for color in ("#0072b2", "#d55e00", "black"):
        near = np.abs(image - np.array(to_rgb(color))).max(axis=2) < 0.02
        assert near.sum() > 200, color


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_is_the_format(tmp_path, suffix, start):
    file = tmp_path / f"replay{suffix}"
    curves = Curves([1000, 2000], {"lru": [0.1, 0.2]}, [0.2, 0.3], 0.4)
    occupancy = Occupancy({"device": 2000}, [0, 1], {"device": [0, 1000]})
    _replay_plot.draw(file, ["trace"], Setting(16, 2000), 1, curves, occupancy)
    assert file.read_bytes().startswith(start)


def test_the_json_is_the_same_with_a_plot(capsys, tmp_path):
    def report(*options: str) -> dict:
        assert main([*SHORT, *options, "--json", "-"]) == 0
        report = json.loads(capsys.readouterr().out)
        timed = ("requests_per_cpu_second", "us_per_request", "bytes_per_cached_token")
        return {name: value for name, value in report.items() if name not in timed} | {"names": list(report)}

    assert report("--plot", str(tmp_path / "replay.svg")) == report()


def test_a_plot_that_fails_at_the_end_loses_no_figures(capsys, monkeypatch, tmp_path):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(_replay_plot, "draw", fail)
    with pytest.raises(OSError, match="disk full"):
        main([*SHORT, "--plot", str(tmp_path / "replay.png"), "--json", "-"])
    assert json.loads(capsys.readouterr().out)["requests"] == 60


# ---- errors, before anything is replayed


@pytest.fixture
def no_work(monkeypatch):
    def fail(*args):
        raise AssertionError("the long work has begun")

    monkeypatch.setattr(Study, "reports", fail)
    monkeypatch.setattr("jaxcache.replay.traces.read_trace", fail)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["replay.xyz", "replay", "replay.gz"])
def test_a_suffix_that_cannot_be_written_is_said(capsys, tmp_path, name):
    assert main([*SHORT, "--plot", str(tmp_path / "new" / name)]) == 1
    err = capsys.readouterr().err
    assert f"cannot write '{name}'; use a suffix such as .png, .svg or .pdf" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_work")
def test_a_place_that_cannot_be_written_is_said(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main([*SHORT, "--plot", str(tmp_path / "file" / "replay.png")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
    (tmp_path / "folder.png").mkdir()
    assert main([*SHORT, "--plot", str(tmp_path / "folder.png")]) == 1
    assert "folder.png cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("no_work")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert main([*SHORT, "--plot", str(tmp_path / "replay.png")]) == 1
    assert "replay.png cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("no_work")
def test_missing_matplotlib_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SHORT, "--plot", str(tmp_path / "replay.png")]) == 1
    assert capsys.readouterr().err == "replay: matplotlib is missing: pip install 'jaxcache[cli]'\n"


def test_without_a_plot_matplotlib_is_not_needed():
    code = (
        "import sys; sys.modules['matplotlib'] = None; from jaxcache.cli import main;"
        f"sys.exit(main({[*SHORT[:3], '20', '--json', '-']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"] == 20


def test_global_state_stays():
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy();"
        "from jaxcache.cli import _replay_plot; from pathlib import Path; _replay_plot.check_format(Path('a.pdf'));"
        "assert dict.__eq__(matplotlib.rcParams, before); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_policy_has_a_style_of_its_own():
    curves = Curves([1000, 2000], {name: [0.01 * i, 0.1] for i, name in enumerate(POLICIES)}, [0.2, 0.3], 0.4)
    axes = axes_of(curves, Setting(16, 2000))
    styles = {(line.get_color(), line.get_marker()) for line in axes.get_lines() if line.get_label() in POLICIES}
    assert len(styles) == len(POLICIES)
