"""A chat in the terminal with a small real model, over the serving loop and its cache.

    python -m models.chat [--model FILE.gguf] [--storage FOLDER]

/why      what the cache would find of the last prompt, and why not more
/stats    where the tokens of all prompts so far came from
/restart  a new cache: device and host memory are empty, storage stays
/quit     ends, as does the end of the input

Ctrl-C ends an answer; a second one, or one at the prompt, ends the program.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

import jaxcache
from models.command import ERRORS, open_model, show_error
from models.conversation import Conversation, LocalModel
from models.serve import TIERS, BatchShape, Server

SHAPE = BatchShape(prefill_rows=1, chunk_tokens=128, decode_rows=1, table_pages=256)
DEVICE_PAGES, HOST_PAGES = 512, 1024
ANSWER_TOKENS = 256


class Chat:
    """One conversation, and the server that answers. It is the same conversation after a restart."""

    def __init__(self, model: LocalModel, storage: Path, console: Console):
        self.model, self.folder, self.console = model, storage, console
        self.sources: Counter[str] = Counter()  # of all prompt tokens
        self.server = self._server()
        self.talk = Conversation(model, self.server)

    def _server(self) -> Server:
        storage = jaxcache.FileStorage(self.folder)
        wait = jaxcache.PrefetchPolicy.WAIT_COMPLETE  # nobody else is served meanwhile
        return self.model.server(storage, device_pages=DEVICE_PAGES, host_pages=HOST_PAGES, prefetch_policy=wait)

    def say(self, question: str) -> None:
        """Streams the answer, until the first Ctrl-C."""
        try:
            with _first_interrupt() as is_interrupted:
                for piece in self.talk.ask(question, ANSWER_TOKENS, lambda: not is_interrupted()):
                    self.console.print(Text(piece), end="", soft_wrap=True)
            self.console.print(" [dim](ended)[/]" if is_interrupted() else "")
        except ValueError as error:
            self.console.print(Text(str(error), style="red"), soft_wrap=True)
            return
        self._note()

    def _note(self) -> None:
        request = self.talk.last
        if request is None or request.hit_tokens is None:
            return
        hits = {tier: request.hit_tokens[tier] for tier in TIERS}
        self.sources.update(hits | {"computed": len(request.prompt) - sum(hits.values())})
        found = ", ".join(f"{n:,} from {tier}" for tier, n in hits.items() if n) or "nothing found"
        after = f"; first token after {request.ttft_ms:,.0f} ms" if request.output else ""
        self.console.print(Text(f"{len(request.prompt):,} tokens: {found}{after}", style="dim"))

    def why(self) -> None:
        if self.talk.last is None:
            self.console.print("nothing was asked yet")
            return
        cache = self.server.cache
        sequence = cache.sequence(self.talk.last.prompt, self.server.namespace)
        self.console.print(Text(str(cache.explain(sequence))), soft_wrap=True)

    def stats(self) -> None:
        for source in TIERS:
            self.console.print(f"prompt tokens from {source}: {self.sources[source]:,}")
        self.console.print(f"prompt tokens computed: {self.sources['computed']:,}")

    def restart(self) -> None:
        """Waits until everything is stored."""
        self.close()
        self.server = self.talk.server = self._server()
        self.console.print("device and host memory are empty now; storage is as it was")

    def close(self) -> None:
        self.server.pools = self.server.cache.drain(self.server.pools)
        self.server.cache.close()

    def run(self) -> None:
        """Reads lines until there are no more."""
        commands = {"/why": self.why, "/stats": self.stats, "/restart": self.restart}
        while True:
            try:
                line = read_line(self.console, "[bold]> [/]").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line == "/quit":
                return
            if line in commands:
                commands[line]()
            elif line.startswith("/"):
                self.console.print(f"{line}: only {', '.join([*commands, '/quit'])} are known")
            elif line:
                self.say(line)


def read_line(console: Console, prompt: str) -> str:
    """The next line that is typed. EOFError at the end; KeyboardInterrupt for a Ctrl-C, whenever it comes: `input`
    sleeps through one that comes just before it begins to wait, or that the system hands to another thread."""
    if not sys.stdin.isatty():
        return console.input(prompt)
    console.print(prompt, end="")
    told, tell = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(tell)
    try:
        select.select([sys.stdin, told], [], [])
    finally:
        signal.set_wakeup_fd(before)
        os.close(tell)
        os.close(told)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


@contextmanager
def _first_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether there was a Ctrl-C. It is only noted, since an exception inside a call of the cache would end serving;
    the second one is raised."""
    interrupts = []

    def note(number: int, frame: object) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="file *.gguf, Llama or Gemma 3, with a chat template (default: fetches SmolLM2)"
    )
    parser.add_argument(
        "--storage", type=Path, help="folder that keeps pages for the next time (default: a temporary one)"
    )
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    folder = args.storage or Path(tempfile.mkdtemp(prefix="jaxcache-chat-"))
    try:
        chat = Chat(open_model(args.model, SHAPE, console), folder, console)
        console.print("Ask something. /why, /stats, /restart, /quit; Ctrl-C ends an answer.")
        chat.run()
        chat.close()
    except ERRORS as error:
        show_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if args.storage is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
