"""Conversations over real text with a small real model, three times: without a cache, with one, and after a restart.

    python -m models.demo [--model FILE.gguf] [--readers 2] [--turns 2] [--json FILE]

Readers ask about documents of this repository, one after the other: everybody's prompt begins with the document, and a
later turn with all that was said before. The restart begins with an empty device and host memory, on the same storage.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxcache
from jaxcache.command_options import prepare_json, write_json
from models.command import ERRORS, open_model, show_error
from models.conversation import Conversation, LocalModel
from models.serve import TIERS, BatchShape, Request, hits_by_tier

ROOT = Path(__file__).parents[1]
SYSTEM = "You are a helpful assistant. Answer from this document in one short sentence.\n\n"
SHAPE = BatchShape(prefill_rows=1, chunk_tokens=128, decode_rows=1, table_pages=128)
DEVICE_PAGES, HOST_PAGES = 160, 200  # of the conversations not one half fits the device, so that all tiers are used
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Document:
    """A part of a file, and what its readers ask: questions[reader][turn]"""

    file: str
    start: int
    stop: int
    questions: tuple[tuple[str, ...], ...]

    @property
    def text(self) -> str:
        return (ROOT / self.file).read_text()[self.start : self.stop]


DOCUMENTS = (
    Document(
        "README.md",
        0,
        5000,
        (
            ("What is jaxcache?", "What does `make test` do?", "Who is it for?"),
            ("How do I try it?", "Does it need a GPU?", "Which models does it serve?"),
        ),
    ),
    Document(
        "LICENSE",
        300,
        6300,
        (
            ("What is this licence about?", "What is a Contribution?", "May I sell the work?"),
            ("Who is the Licensor?", "What does the patent grant say?", "What is a Derivative Work?"),
        ),
    ),
    Document(
        "jaxcache/DESIGN.md",
        0,
        5000,
        (
            ("What is this design about?", "What is a page?", "What is a node?"),
            ("Who decides what is evicted?", "What is a tier?", "What is a transfer?"),
        ),
    ),
)


@dataclass
class Arm:
    """One pass over all conversations. seconds: of serving"""

    title: str
    turns: list[list[Request]] = field(default_factory=list)  # by turn, then by reader
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def requests(self) -> list[Request]:
        return [request for turn in self.turns for request in turn]

    @property
    def hit_tokens(self) -> dict[str, int]:
        return hits_by_tier(self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def tokens_per_s(self) -> float:
        return (self.prompt_tokens + sum(len(request.output) for request in self.requests)) / self.seconds

    def ttft_ms(self) -> dict[str, float]:
        """Medians: of turn 1 by reader, then by turn. Readers take turns document by document."""
        first, n = self.turns[0], len(DOCUMENTS)
        groups = {f"turn 1, reader {i // n + 1}": first[i : i + n] for i in range(0, len(first), n)}
        groups |= {f"turn {turn + 1}": requests for turn, requests in enumerate(self.turns) if turn}
        return {name: statistics.median(r.ttft_ms for r in requests) for name, requests in groups.items()}


class Demo:
    def __init__(self, model: LocalModel, console: Console, num_readers: int, num_turns: int):
        self.model, self.console, self.num_turns = model, console, num_turns
        self.readers = [(document, reader) for reader in range(num_readers) for document in DOCUMENTS]

    def serve(self, title: str, storage: jaxcache.Storage | None) -> Arm:
        """storage: None: without a cache"""
        caching = storage is not None
        self.console.rule(title)
        server = self.model.server(
            storage,
            device_pages=DEVICE_PAGES,
            host_pages=HOST_PAGES if caching else 0,
            caching=caching,
            prefetch_policy=jaxcache.PrefetchPolicy.WAIT_COMPLETE,
        )
        arm, talks = Arm(title), [Conversation(self.model, server, SYSTEM + d.text) for d, _ in self.readers]
        with server.cache:
            start = time.perf_counter()
            for turn in range(self.num_turns):
                arm.turns.append([])
                for (document, reader), talk in zip(self.readers, talks, strict=True):
                    self._ask(talk, document.file, reader, document.questions[reader][turn])
                    assert talk.last is not None
                    arm.turns[-1].append(talk.last)
                    arm.texts.append(talk.messages[-1]["content"])
            arm.seconds = time.perf_counter() - start
            if caching:
                server.pools = server.cache.drain(server.pools)
        return arm

    def _ask(self, talk: Conversation, file: str, reader: int, question: str) -> None:
        self.console.print(Text(f"{file}, reader {reader + 1}: {question}", style="bold"))
        for piece in talk.ask(question, ANSWER_TOKENS):
            self.console.print(Text(piece), end="", soft_wrap=True)
        assert talk.last is not None
        hits = {tier: n for tier, n in (talk.last.hit_tokens or {}).items() if n}
        found = ", ".join(f"{n:,} from {tier}" for tier, n in hits.items()) or "all computed"
        told = f"{len(talk.last.prompt):,} tokens, {found}: first token after {talk.last.ttft_ms:,.0f} ms"
        self.console.print(Text(f"\n  {told}", style="dim"))

    def compare(self, folder: Path) -> dict[str, Any]:
        arms = [
            self.serve("without a cache", None),
            self.serve("with a cache", jaxcache.FileStorage(folder)),
            self.serve("after a restart", jaxcache.FileStorage(folder)),
        ]
        self.console.print(table(arms))
        return figures(arms)


def table(arms: Sequence[Arm]) -> Table:
    shown = Table("", *(arm.title for arm in arms), title=f"{len(arms[0].requests)} answers, three times")
    shown.add_row("prompt tokens", *(f"{arm.prompt_tokens:,}" for arm in arms))
    for tier in TIERS:
        shown.add_row(f"  from {tier}", *(f"{arm.hit_tokens[tier]:,}" for arm in arms))
    for name in arms[0].ttft_ms():
        times = (f"{arm.ttft_ms()[name]:,.0f} ms" for arm in arms)
        shown.add_row(f"first token, {name}", *times)
    shown.add_row("tokens per second", *(f"{arm.tokens_per_s:,.0f}" for arm in arms))
    same = ("yes" if arm.texts == arms[0].texts else "NO" for arm in arms[1:])
    shown.add_row("texts as without", "", *same)
    return shown


def figures(arms: Sequence[Arm]) -> dict[str, Any]:
    return {
        arm.title: {
            "prompt_tokens": arm.prompt_tokens,
            "hit_tokens": arm.hit_tokens,
            "ttft_p50_ms": {name: round(ms, 1) for name, ms in arm.ttft_ms().items()},
            "tokens_per_s": round(arm.tokens_per_s, 1),
            "seconds": round(arm.seconds, 1),
            "texts_identical": arm.texts == arms[0].texts,
        }
        for arm in arms
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="file *.gguf, Llama or Gemma 3, with a chat template (default: fetches SmolLM2)"
    )
    parser.add_argument("--readers", type=int, choices=(1, 2), default=2, help="of each document (default: 2)")
    parser.add_argument("--turns", type=int, choices=(1, 2, 3), default=2, help="of each reader (default: 2)")
    parser.add_argument("--storage", type=Path, help="folder of the storage tier (default: a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    args = parser.parse_args(argv)
    console = Console(stderr=args.json == "-")
    folder = args.storage or Path(tempfile.mkdtemp(prefix="jaxcache-demo-"))
    try:
        prepare_json(args.json)
        model = open_model(args.model, SHAPE, console)
        found = Demo(model, console, args.readers, args.turns).compare(folder)
    except ERRORS as error:
        show_error(error)
        return 2
    finally:
        if args.storage is None:
            shutil.rmtree(folder, ignore_errors=True)
    write_json(args.json, found)
    return 0 if all(arm["texts_identical"] for arm in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
