"""A conversation with a model in this process: what the demo and the chat are made of.

LocalModel   weights, text and step programs, loaded once
Conversation messages so far; `ask` streams the answer's text
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxcache
from models.decoder import components, make_extend
from models.gguf_file import opened
from models.loading import load_model, weights_version
from models.serve import BatchShape, Request, Server
from models.text import load_text

PAGE_TOKENS = 16


class LocalModel:
    """A file *.gguf or a published folder on a mesh, in fp32. Raises ValueError as `load_model` and `load_text` do."""

    def __init__(self, path: Path, mesh: jax.sharding.Mesh, shape: BatchShape):
        self.path, self.mesh, self.shape = path, mesh, shape
        source = opened(path)
        self.text = load_text(source)
        self.cfg, self.params = load_model(source, mesh, jnp.float32)
        self.extend = make_extend(self.cfg, mesh, PAGE_TOKENS)

    def server(self, storage: jaxcache.Storage | None = None, **options: Any) -> Server:
        """A server with a cache of its own, compiled. options: of CacheConfig; close `server.cache` in the end"""
        config = jaxcache.CacheConfig(page_tokens=PAGE_TOKENS, **options)
        cache = jaxcache.Cache(components(self.cfg, PAGE_TOKENS, "float32"), self.mesh, config, storage=storage)
        namespace = cache.new_namespace(model=self.path.stem, weights_version=weights_version(self.path))
        server = Server(cache, self.extend, self.params, namespace, self.shape)
        server.warmup()
        return server

    @property
    def max_tokens(self) -> int:
        """Of a prompt and its answer."""
        return self.shape.table_pages * PAGE_TOKENS


class Conversation:
    """messages: what was said so far; last: the request of the last answer"""

    def __init__(self, model: LocalModel, server: Server, system: str | None = None):
        self.model, self.server = model, server
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.last: Request | None = None

    def ask(self, question: str, max_new_tokens: int, keep_going: Callable[[], bool] = lambda: True) -> Iterator[str]:
        """Pieces of the answer, as they come, until `keep_going` says no: so much was said then.

        Raises ValueError, and nothing was said, where the conversation is too long for the model's tables.
        """
        text = self.model.text
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = text.encode(text.chat(messages))
        if len(prompt) + max_new_tokens > self.model.max_tokens:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, and an answer of {max_new_tokens} more does not fit the "
                f"{self.model.max_tokens} tokens of a table: begin a new one"
            )
        request = self.last = Request(prompt, max_new_tokens, stop_tokens=text.stops)
        said = ""
        try:
            for _ in self.server.stream(request, keep_going):
                told = text.decode(request.output)
                if not told.endswith("\N{REPLACEMENT CHARACTER}"):  # the last character may be half there
                    yield told[len(said) :]
                    said = told
        finally:
            self.messages = [*messages, {"role": "assistant", "content": text.decode(request.output)}]
