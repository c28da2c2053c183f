"""The demo and the chat, as somebody would try them: in a process of their own, the chat in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from models import demo
from tests.models.tiny_gguf import write_tiny_gguf

ROOT = Path(__file__).parents[2]
WAIT_S = 120
REAL = pytest.param("real", marks=pytest.mark.slow)  # fetches SmolLM2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "120"}


@pytest.fixture
def terminal():
    """Starts a chat in a pseudo-terminal; whatever comes, it is ended."""
    chats = []

    def start(*options: str) -> pexpect.spawn:
        run = ["-m", "models.chat", *options]
        chats.append(pexpect.spawn(sys.executable, run, cwd=ROOT, env=environment(), encoding="utf-8", timeout=WAIT_S))
        return chats[-1]

    yield start
    for chat in chats:
        chat.close(force=True)


@pytest.fixture
def small_demo(monkeypatch) -> None:
    """Short documents, and tiers that hold a part of them."""
    short = [demo.Document(d.file, d.start, d.start + 400, d.questions) for d in demo.DOCUMENTS]
    monkeypatch.setattr(demo, "DOCUMENTS", tuple(short))
    monkeypatch.setattr(demo, "DEVICE_PAGES", 64)
    monkeypatch.setattr(demo, "HOST_PAGES", 64)


def test_the_demo_compares_three_passes(tiny, tmp_path, small_demo, capsys):
    figures = tmp_path / "figures.json"
    assert demo.main(["--model", str(tiny), "--json", str(figures)]) == 0
    shown, arms = capsys.readouterr().out, json.loads(figures.read_text())
    without, cached, again = arms["without a cache"], arms["with a cache"], arms["after a restart"]
    assert not any(without["hit_tokens"].values())
    assert cached["hit_tokens"]["device"] and sum(cached["hit_tokens"].values()) > cached["prompt_tokens"] / 3
    assert again["hit_tokens"]["storage"] > 0
    assert cached["texts_identical"] and again["texts_identical"]
    assert list(cached["ttft_p50_ms"]) == ["turn 1, reader 1", "turn 1, reader 2", "turn 2"]
    for said in ("README.md, reader 1: What is jaxcache?", "texts as without", "tokens per second"):
        assert said in shown


def test_the_demo_says_when_texts_differ(tiny, small_demo, monkeypatch):
    serve = demo.Demo.serve

    def spoiled(self, title, storage):
        arm = serve(self, title, None)
        arm.texts[0] += title
        return arm

    monkeypatch.setattr(demo.Demo, "serve", spoiled)
    assert demo.main(["--model", str(tiny), "--readers", "1", "--turns", "1"]) == 1


def test_the_demo_names_a_file_that_is_none(tmp_path, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert demo.main(["--model", str(tmp_path / "broken.gguf")]) == 2
    assert "broken.gguf: no GGUF file, or truncated" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("model", ["tiny", REAL])
def test_a_chat(model, tiny, tmp_path, terminal):
    options = ["--storage", str(tmp_path / "storage"), *(["--model", str(tiny)] if model == "tiny" else [])]
    chat = terminal(*options)
    chat.expect("Ask something.*> ")
    chat.sendline("What is the capital of France, and what is it known for among travellers of all ages?")
    if model == "real":
        chat.expect("Paris")
    chat.expect(r"nothing found; first token after [\d,]+ ms.*> ")
    chat.sendline("Say that again.")
    chat.expect(r"from device; first token after [\d,]+ ms.*> ")
    chat.sendline("/restart")
    chat.expect("storage is as it was.*> ")
    chat.sendline("/why")
    chat.expect("never computed here.*> ")  # of storage nobody knows before it is asked
    chat.sendline("And once more.")
    chat.expect(r"from storage; first token after [\d,]+ ms.*> ")
    chat.sendline("/stats")
    chat.expect(r"tokens from storage: [1-9].*> ")
    chat.sendline("/what")
    chat.expect("only /why, /stats, /restart, /quit are known.*> ")
    chat.sendline("/quit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_then_the_program(tmp_path, terminal):
    """With the real model: random weights may end any answer at once."""
    chat = terminal("--storage", str(tmp_path / "storage"))
    chat.expect("Ask something.*> ")
    chat.sendline("Tell me a long story about a lighthouse.")
    chat.expect(" the ")  # of the answer: the question has none
    chat.sendintr()
    chat.expect(r"\(ended\).*> ")
    chat.sendline("What was it about?")
    chat.expect(r"from device; first token after [\d,]+ ms.*> ")
    chat.sendintr()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


@pytest.mark.parametrize("command", ["demo", "chat"])
def test_help_says_what_there_is(command):
    done = subprocess.run(
        [sys.executable, "-m", f"models.{command}", "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "--model" in done.stdout and "--storage" in done.stdout
