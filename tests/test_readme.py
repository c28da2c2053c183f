"""What the README tells people to paste runs, and does what it says."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def run(number: int, count: int = 3) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == count
    exec(compile(examples[number], str(README), "exec"), {})


def test_the_pasted_lines_run_and_hit(capsys):
    run(0)
    out = capsys.readouterr().out
    assert "0 of 100 tokens are cached" in out
    assert "96 of 103 tokens are cached" in out
    assert "never computed here" in out


def test_the_pasted_hybrid_hits(capsys):
    """M3, M4."""
    run(1)
    out = capsys.readouterr().out
    assert "0 of 100 tokens are cached" in out
    assert "96 of 130 tokens are cached" in out


def test_the_pasted_tenants_have_their_shares(capsys):
    """E7: through the face, with a priority and a retention."""
    run(2)
    out = capsys.readouterr().out
    assert "96 tokens of acme are still there" in out
    assert "{'resident': 32, 'pinned': 0, 'floor': 0, 'quota': 32}" in out
