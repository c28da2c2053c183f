"""The demo and the chat, as somebody would try them: in a process of their own, the chat in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pexpect
import pytest
from pexpect.fdpexpect import fdspawn
from rich.console import Console

from models import demo
from models.chat import read_line
from tests.models.tiny_gguf import write_tiny_gguf

ROOT = Path(__file__).parents[2]
WAIT_S = 120
REAL = pytest.param("real", marks=pytest.mark.slow)  # fetches SmolLM2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "120"}


class Terminal:
    """A chat in a pseudo-terminal that controls it. (Not forked from here: this process has threads.)"""

    def __init__(self, *options: str):
        master, slave = pty.openpty()
        run = ["setsid", "--ctty", "--wait", sys.executable, "-m", "models.chat", *options]
        self.process = subprocess.Popen(run, cwd=ROOT, env=environment(), stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.screen = fdspawn(master, encoding="utf-8", timeout=WAIT_S)

    def expect(self, pattern: str) -> None:
        self.screen.expect(pattern)

    def type(self, line: str) -> None:
        self.screen.sendline(line)

    def press_ctrl_c(self) -> None:
        self.screen.send("\x03")

    def ends_with(self, status: int) -> None:
        self.screen.expect(pexpect.EOF)
        assert self.process.wait(WAIT_S) == status


@pytest.fixture
def terminal():
    """Starts a chat; whatever comes, it is ended."""
    terminals = []

    def start(*options: str) -> Terminal:
        terminals.append(Terminal(*options))
        return terminals[-1]

    yield start
    for one in terminals:
        one.screen.close()  # the terminal hangs up
        one.process.wait(WAIT_S)


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
    chat.type("What is the capital of France, and what is it known for among travellers of all ages?")
    if model == "real":
        chat.expect("Paris")
    chat.expect(r"nothing found; first token after [\d,]+ ms.*> ")
    chat.type("Say that again.")
    chat.expect(r"from device; first token after [\d,]+ ms.*> ")
    chat.type("/restart")
    chat.expect("storage is as it was.*> ")
    chat.type("/why")
    chat.expect("never computed here.*> ")  # of storage nobody knows before it is asked
    chat.type("And once more.")
    chat.expect(r"from storage; first token after [\d,]+ ms.*> ")
    chat.type("/stats")
    chat.expect(r"tokens from storage: [1-9].*> ")
    chat.type("/what")
    chat.expect("only /why, /stats, /restart, /quit are known.*> ")
    chat.type("/quit")
    chat.ends_with(0)


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_then_the_program(tmp_path, terminal):
    """With the real model: random weights may end any answer at once."""
    chat = terminal("--storage", str(tmp_path / "storage"))
    chat.expect("Ask something.*> ")
    chat.type("Tell me a long story about a lighthouse.")
    chat.expect(" the ")  # of the answer: the question has none
    chat.press_ctrl_c()
    chat.expect(r"\(ended\).*> ")
    chat.type("What was it about?")
    chat.expect(r"from device; first token after [\d,]+ ms.*> ")
    chat.press_ctrl_c()
    chat.ends_with(0)


def test_a_ctrl_c_that_another_thread_receives_ends_the_wait_for_a_line(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    master, slave = pty.openpty()
    other = threading.Thread(target=threading.Event().wait, daemon=True)
    other.start()
    assert other.ident is not None
    ring = threading.Timer(0.2, signal.pthread_kill, (other.ident, signal.SIGINT))
    late = threading.Timer(20, os.write, (master, b"nothing ended the wait\n"))
    ring.daemon = late.daemon = True
    try:
        with os.fdopen(slave) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            os.write(master, "größer\n".encode())
            assert read_line(Console(), "> ") == "größer\n"
            ring.start()
            late.start()
            with pytest.raises(KeyboardInterrupt):
                read_line(Console(), "> ")
            os.write(master, b"\x04")
            with pytest.raises(EOFError):
                read_line(Console(), "> ")
    finally:
        late.cancel()
        os.close(master)
        signal.signal(signal.SIGINT, before)


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
