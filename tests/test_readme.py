"""What the README tells people to paste runs, and does what it says."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_pasted_lines_run_and_hit(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
    out = capsys.readouterr().out
    assert "0 of 100 tokens are cached" in out
    assert "96 of 103 tokens are cached" in out
    assert "never computed here" in out
