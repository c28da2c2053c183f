"""The ladder: the same requests in five arms, each of which must answer as the first does.

    off        no cache                                   what must come out
    cold       a new cache on an empty storage            finds what the requests share among themselves
    warm       the same cache, the same requests again    finds all of it on the device
    reloaded   again, after the device lost its pages     in host memory
    restarted  a new cache on the same storage            in storage

Every request goes through the reference serving loop. Its prompt is a document, which others share, and a question:

    |--- real text --- " The owl code is: owl " 47 "." --- real text ---|--- So the owl code is: owl ---|
    0                                           ^ Needle.at             Document.num_tokens

`python -m tests.models.ladder MODEL FOLDER FILE` serves the last arm in a process of its own.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jaxcache
from models.decoder import WINDOW, DecoderConfig, make_extend
from models.layer_plan import LayerPlan
from models.loading import load_model
from models.serve import BatchShape, Request, Server
from models.text import load_text
from tests import strict_jax
from tests.models.serving import PAGE_TOKENS, Answer, Rig, WrongAnswer, check_equal, emptied, serve

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen3", "qwen3_moe", "llama", "gemma3", "gpt_oss")  # their tiny models in tests/goldens
# A model of 135M parameters answers this. No tiny prompt ends with a page: asked again, it would find less at first.
LEAD, QUESTION = " The {0} code is: {0} ", "\n\nSo the {0} code is: {0} "
CODE_TOKENS = 2
CHUNKED = BatchShape(prefill_rows=2, chunk_tokens=32, decode_rows=4, table_pages=80)
WHOLE = BatchShape(prefill_rows=2, chunk_tokens=256, decode_rows=4, table_pages=80)
TINY_PAGES = {"page_tokens": PAGE_TOKENS, "device_pages": 256, "host_pages": 512}  # room for all that is asked
PUBLISHED = BatchShape(prefill_rows=2, chunk_tokens=128, decode_rows=4, table_pages=72)
PUBLISHED_PAGES = {"page_tokens": 16, "device_pages": 192, "host_pages": 320, "prefetch_host_share": 1.0}

Encode = Callable[[str], Sequence[int]]
Submit = Callable[[Server, list[Request]], None]
Spoil = Callable[["ListeningServer"], None]
NOTHING: Mapping[str, Spoil] = {}


# ---- prompts


@dataclass(frozen=True)
class Needle:
    """at: where its code begins in the document, in tokens"""

    name: str
    at: int


@dataclass(frozen=True)
class Document:
    """The first tokens of a file, some of them overwritten by needles."""

    file: str
    num_tokens: int
    needles: tuple[Needle, ...]

    def tokens(self, encode: Encode, bos: Sequence[int], codes: Mapping[str, int]) -> np.ndarray:
        text = (ROOT / self.file).read_text()
        tokens = np.array([*bos, *encode(text)][: self.num_tokens], np.int32)
        assert len(tokens) == self.num_tokens
        last_stop = len(bos)
        for needle in self.needles:
            lead, code = encode(LEAD.format(needle.name)), encode(f"{codes[needle.name]}")
            start = needle.at - len(lead)
            told = [*lead, *code, *encode(".")][: len(tokens) - start]
            assert start >= last_stop and len(code) == CODE_TOKENS, f"{needle}: no room"
            last_stop = start + len(told)
            tokens[start:last_stop] = told
        return tokens


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question about one needle of a document, after the document."""

    document: Document
    needle: Needle
    code: int
    tokens: np.ndarray


def documents(num_tokens: int, page_tokens: int, window_tokens: int) -> tuple[Document, Document]:
    """One of whole pages and one that ends inside a page; codes stand where being off by one would show."""
    part = num_tokens // 5 // page_tokens * page_tokens
    cut = num_tokens - page_tokens // 2 - 1
    window_start = cut // page_tokens * page_tokens - window_tokens + 1  # of a hit on all whole pages
    in_whole = (
        Needle("owl", part),  # a page's start
        Needle("fox", 2 * part + (page_tokens - CODE_TOKENS) // 2),  # a page's middle
        Needle("elk", 3 * part + page_tokens - 1),  # over a page's boundary
        Needle("cat", num_tokens - CODE_TOKENS),  # the last tokens that are shared
    )
    in_cut = (
        Needle("bee", part + page_tokens - CODE_TOKENS),  # a page's end
        Needle("hen", 2 * part - page_tokens),  # a page's start
        Needle("rat", window_start - CODE_TOKENS),  # right before the window
    )
    return Document("LICENSE", num_tokens, in_whole), Document("jaxcache/DESIGN.md", cut, in_cut)


def draw_codes(shared: Sequence[Document]) -> dict[str, int]:
    """Two digits for every needle, all different."""
    names = [needle.name for document in shared for needle in document.needles]
    numbers = np.random.default_rng(0).choice(np.arange(10, 100), len(names), replace=False)
    return dict(zip(names, numbers.tolist(), strict=True))


def prompts(
    encode: Encode, bos: Sequence[int], shared: Sequence[Document], codes: Mapping[str, int]
) -> tuple[Prompt, ...]:
    """A question about every needle; documents take turns."""
    made = []
    for document in shared:
        tokens = document.tokens(encode, bos, codes)
        for turn, needle in enumerate(document.needles):
            name = needle.name
            question = encode(QUESTION.format(name))
            prompt = np.concatenate([tokens, np.array(question, np.int32)])
            made.append((turn, Prompt(document, needle, codes[name], prompt)))
    return tuple(prompt for _, prompt in sorted(made, key=lambda item: item[0]))


# ---- what is served, and how


@dataclass(frozen=True)
class Ladder:
    """A model on a mesh and what it is asked.

    recode:  the prompts with other codes, by name
    choices: of CacheConfig
    decode:  tokens -> text
    """

    rig: Rig
    prompts: tuple[Prompt, ...]
    recode: Callable[[Mapping[str, int]], tuple[Prompt, ...]]
    shape: BatchShape
    choices: Mapping[str, Any]
    decode: Callable[[Sequence[int]], str]
    num_decode: int = 8

    @contextmanager
    def server(self, storage: jaxcache.Storage | None, **choices: Any) -> Iterator[ListeningServer]:
        """With a cache of its own."""
        with self.rig.cache(storage, **{**self.choices, **choices}) as cache:
            namespace = cache.new_namespace(model="ladder")
            yield ListeningServer(cache, self.rig.extend, self.rig.params, namespace, self.shape)

    def ask(self, server: ListeningServer, submit: Submit) -> list[Answer]:
        requests = [Request(prompt.tokens, self.num_decode) for prompt in self.prompts]
        submit(server, requests)
        return [server.answer(request) for request in requests]

    def whole_pages(self, num_tokens: int) -> int:
        """Their tokens."""
        return num_tokens // self.choices["page_tokens"] * self.choices["page_tokens"]

    def most_cached(self, prompt: Prompt) -> int:
        """Tokens of a prompt that are found where all of it is cached."""
        return self.whole_pages(len(prompt.tokens) - 1)


class ListeningServer(Server):
    """Keeps the logits that every token of a request was drawn from."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.heard: dict[Request, list[np.ndarray]] = defaultdict(list)

    def _append_tokens(self, requests: list[Request], logits: np.ndarray) -> None:
        for request, row in zip(requests, logits, strict=True):
            self.heard[request].append(row)
        super()._append_tokens(requests, logits)

    def answer(self, request: Request) -> Answer:
        hits = request.hit_tokens or {}
        return Answer(np.stack(self.heard[request]), request.output, (hits["device"], hits["host"], hits["storage"]))


def together(server: Server, requests: list[Request]) -> None:
    """As many at once as there are rows."""
    serve(server, requests)


def one_by_one(server: Server, requests: list[Request]) -> None:
    for request in requests:
        serve(server, [request])


@functools.cache
def golden_rig(family: str, mesh: Mesh) -> Rig:
    cfg, params = load_model(ROOT / "tests/goldens" / family, mesh, jnp.float32)
    return Rig(mesh, params, make_extend(cfg, mesh, PAGE_TOKENS), cfg)


def tiny(family: str, mesh: Mesh, shape: BatchShape = CHUNKED, **choices: Any) -> Ladder:
    """The tiny model of a family; a token is a byte."""
    rig = golden_rig(family, mesh)
    shared = documents(200, PAGE_TOKENS, _window_tokens(rig.model))
    recode = functools.partial(prompts, _bytes, (), shared)
    return Ladder(rig, recode(draw_codes(shared)), recode, shape, {**TINY_PAGES, **choices}, _text)


def published(path: Path, mesh: Mesh) -> Ladder:
    """A published model with its own tokenizer, and documents of about 1,000 tokens."""
    text = load_text(path)
    cfg, params = load_model(path, mesh, jnp.float32)
    page_tokens = PUBLISHED_PAGES["page_tokens"]
    shared = documents(1008, page_tokens, _window_tokens(cfg))
    bos = () if text.bos is None else (text.bos,)

    def encode(piece: str) -> list[int]:
        return text.tokenizer.encode(piece, add_special_tokens=False).ids

    rig = Rig(mesh, params, make_extend(cfg, mesh, page_tokens), cfg)
    recode = functools.partial(prompts, encode, bos, shared)
    return Ladder(rig, recode(draw_codes(shared)), recode, PUBLISHED, PUBLISHED_PAGES, text.decode)


def _bytes(text: str) -> list[int]:
    return list(text.encode())


def _text(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def _window_tokens(cfg: DecoderConfig) -> int:
    """What the needles are placed for where a model has no window."""
    return cfg.window_tokens if WINDOW in LayerPlan(cfg).kept else 8


# ---- the arms


def off(ladder: Ladder) -> list[Answer]:
    with ladder.server(None, caching=False, host_pages=0) as server:
        return ladder.ask(server, together)


def climb(
    ladder: Ladder, open_storage: Callable[[], jaxcache.Storage], submit: Submit, spoil: Mapping[str, Spoil] = NOTHING
) -> dict[str, list[Answer]]:
    """The arms with a cache, in order. spoil: mutations, each made right before its arm"""
    arms = first_process(ladder, open_storage(), submit, spoil)
    with ladder.server(open_storage()) as server:
        if "restarted" in spoil:
            spoil["restarted"](server)
        arms["restarted"] = ladder.ask(server, submit)
    return arms


def first_process(
    ladder: Ladder, storage: jaxcache.Storage, submit: Submit, spoil: Mapping[str, Spoil] = NOTHING
) -> dict[str, list[Answer]]:
    """The arms before the restart; all that can be stored is stored then."""
    arms = {}
    with ladder.server(storage) as server:
        for arm in ("cold", "warm", "reloaded"):
            if arm == "reloaded":
                server.pools = emptied(server.cache, server.namespace, server.pools)
            if arm in spoil:
                spoil[arm](server)
            arms[arm] = ladder.ask(server, submit)
        server.pools = server.cache.drain(server.pools)
    return arms


def check_answers(ladder: Ladder, arms: Mapping[str, list[Answer]], want: list[Answer]) -> None:
    """Raises WrongAnswer, which names arm and needle, unless every arm answers as it does without a cache."""
    for arm, answers in arms.items():
        for prompt, got, miss in zip(ladder.prompts, answers, want, strict=True):
            try:
                check_equal(got, miss)
            except WrongAnswer as error:
                raise WrongAnswer(f"{arm}, {prompt.needle}: {error}") from error


def main(model: str, folder: str, file: str) -> None:
    """model: a family, or a path. file: gets the answers (`read_answers`)"""
    strict_jax.configure()
    mesh = jaxcache.one_device_mesh()
    ladder = tiny(model, mesh) if model in FAMILIES else published(Path(model), mesh)
    with ladder.server(jaxcache.FileStorage(folder)) as server:
        answers = ladder.ask(server, one_by_one)
    logits, tokens, hits = zip(*((answer.logits, answer.tokens, answer.hits) for answer in answers), strict=True)
    np.savez(file, logits=logits, tokens=tokens, hits=hits)


def read_answers(file: Path) -> list[Answer]:
    with np.load(file) as arrays:
        rows = zip(arrays["logits"], arrays["tokens"].tolist(), arrays["hits"].tolist(), strict=True)
        return [Answer(logits, tokens, tuple(hits)) for logits, tokens, hits in rows]


if __name__ == "__main__":
    main(*sys.argv[1:])
