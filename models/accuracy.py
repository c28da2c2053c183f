"""Accuracy with real text: the same questions in six arms, whose answers must be equal wherever the text comes from.

    python -m models.accuracy [--model FILE.gguf] [--json FILE]

    question alone      without the document: what guessing is worth
    without a cache     every prompt computed: what the other arms must equal
    cold                an empty cache: a document is computed once, and on the device from its second question on
    device              the same again: everything is on the device
    host                the device holds one document, and the other one is asked about next
    after a restart     a new cache on the same storage folder; device and host memory are emptied before every question

The questions are those of `models.questions`, where it says what is right, what guessing is worth and what is clearly
more. Exit status 1: some arm answers otherwise than without a cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jaxcache
from jaxcache.command_options import prepare_json, write_json
from models.command import ERRORS, open_model, show_error
from models.conversation import PAGE_TOKENS, LocalModel
from models.questions import ANSWER_TOKENS, GUESSED, THRESHOLD, QuestionSet, load
from models.serve import TIERS, BatchShape, Request, Server, hits_by_tier

SHAPE = BatchShape(prefill_rows=1, chunk_tokens=128, decode_rows=1, table_pages=128)
PAGES = 256  # of device and of host memory: both documents and all questions


@dataclass
class Arm:
    """One pass over all questions, in their order. seconds: of serving"""

    title: str
    requests: list[Request] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    num_right: int = 0
    seconds: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def hit_tokens(self) -> dict[str, int]:
        return hits_by_tier(self.requests)


def keep(server: Server) -> None:
    """Before a question: everything stays where it is."""


def forget(server: Server) -> None:
    """Before a question: only storage keeps what it has."""
    server.pools = server.cache.drain(server.pools)
    server.cache.reset()


class Exam:
    """One model and the questions that it is asked, one after the other."""

    def __init__(self, model: LocalModel, asked: QuestionSet, console: Console):
        self.model, self.asked, self.console = model, asked, console
        self.prompts = [asked.prompt(question) for question in asked.questions]

    def run(self, folder: Path) -> list[Arm]:
        """All arms. folder: of the storage tier"""
        with self.serving(None, host_pages=0, caching=False) as server:
            arms = [self.ask("question alone", server, [question.ending for question in self.asked.questions])]
            arms += [self.ask("without a cache", server, self.prompts)]
        with self.serving(jaxcache.FileStorage(folder)) as server:
            arms += [self.ask(title, server, self.prompts) for title in ("cold", "device")]
            server.pools = server.cache.drain(server.pools)
        with self.serving(None, device_pages=self.pages_of_one()) as server:
            self.read_documents(server)
            arms += [self.ask("host", server, self.prompts)]
        with self.serving(jaxcache.FileStorage(folder)) as server:
            arms += [self.ask("after a restart", server, self.prompts, forget)]
        return arms

    @contextmanager
    def serving(self, storage: jaxcache.Storage | None, **options: Any) -> Iterator[Server]:
        """options: of CacheConfig"""
        chosen = {"device_pages": PAGES, "host_pages": PAGES, "prefetch_if_faster": False, **options}
        server = self.model.server(storage, prefetch_policy=jaxcache.PrefetchPolicy.WAIT_COMPLETE, **chosen)
        with server.cache:
            yield server

    def ask(
        self, title: str, server: Server, prompts: Sequence[str], before_each: Callable[[Server], None] = keep
    ) -> Arm:
        """prompts: one for each question"""
        arm = Arm(title)
        columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            for question, prompt in zip(progress.track(self.asked.questions, description=title), prompts, strict=True):
                before_each(server)
                start = time.perf_counter()
                request = self.answer(server, prompt)
                arm.seconds += time.perf_counter() - start
                arm.requests.append(request)
                arm.answers.append(self.model.text.decode(request.output))
                arm.num_right += question.is_right(arm.answers[-1])
        return arm

    def read_documents(self, server: Server) -> None:
        """Computes every document once, with its first question."""
        for prompt in self.prompts[: len(self.asked.documents)]:
            self.answer(server, prompt)

    def answer(self, server: Server, prompt: str) -> Request:
        request = Request(self.model.text.encode(prompt), ANSWER_TOKENS, stop_tokens=self.model.text.stops)
        for _ in server.stream(request):
            pass
        return request

    def pages_of_one(self) -> int:
        """Of the longest prompt and its answer: no other document has room beside it."""
        longest = max(len(self.model.text.encode(prompt)) for prompt in self.prompts)
        return (longest + ANSWER_TOKENS) // PAGE_TOKENS + 1


def table(arms: Sequence[Arm]) -> Table:
    num_asked = len(arms[0].answers)
    shown = Table("", "right", "as without", *TIERS, "computed")
    shown.title = f"{num_asked} questions (guessing: {GUESSED} right), and where the prompt tokens came from"
    for i, arm in enumerate(arms):
        is_same = "" if i < 2 else "yes" if arm.answers == arms[1].answers else "NO"
        hits = arm.hit_tokens
        tokens = (f"{n:,}" for n in (*hits.values(), arm.prompt_tokens - sum(hits.values())))
        shown.add_row(arm.title, f"{arm.num_right}/{num_asked}", is_same, *tokens)
    return shown


def figures(arms: Sequence[Arm]) -> dict[str, Any]:
    uncached = arms[1]
    return {
        "questions": len(uncached.answers),
        "guessed": GUESSED,
        "threshold": THRESHOLD,
        "is_above_chance": uncached.num_right >= THRESHOLD,
        "answers_identical": all(arm.answers == uncached.answers for arm in arms[1:]),
        "arms": {
            arm.title: {
                "right": arm.num_right,
                "prompt_tokens": arm.prompt_tokens,
                "hit_tokens": arm.hit_tokens,
                "seconds": round(arm.seconds, 1),
                "answers": arm.answers,
            }
            for arm in arms
        },
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="file *.gguf, Llama or Gemma 3 (default: fetches SmolLM2)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    args = parser.parse_args(argv)
    console = Console(stderr=args.json == "-")
    try:
        prepare_json(args.json)
        model = open_model(args.model, SHAPE, console)
        with tempfile.TemporaryDirectory(prefix="jaxcache-accuracy-") as folder:
            arms = Exam(model, load(), console).run(Path(folder))
    except ERRORS as error:
        show_error(error)
        return 2
    found = {"model": model.path.stem, **figures(arms)}
    console.print(table(arms))
    if not found["is_above_chance"]:
        console.print(f"fewer than {THRESHOLD} are right: equal answers of this model say little")
    write_json(args.json, found)
    return 0 if found["answers_identical"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
