# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Chat with a prefix cache
#
# A chat sends the whole conversation with every question: the document at its top, all questions and all answers so
# far. A model that begins anew each time computes the same keys and values again and again. `jaxcache` keeps them: on
# the device, in host memory and in storage. A request then computes only what nobody computed before.
#
# Here a small real model (SmolLM2, 135 million parameters) answers questions about documents of this repository. You
# see how long the first token takes, how the tiers fill, what the tree looks like, and why a prompt misses. It needs no
# GPU, fetches 93 MB the first time, and runs for about two minutes on two cores.
#
# To go through it cell by cell, run `make setup` and open it with the Python of `.venv`. `make notebook` runs all of it
# and writes the outputs. The file to edit is `chat_with_a_prefix_cache.py`.

# %%
import tempfile
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np

import jaxcache
from models import demo, fetch
from models.conversation import PAGE_TOKENS, Conversation, LocalModel

model = LocalModel(fetch.fetch(fetch.SMOLLM2), jaxcache.one_device_mesh(), demo.SHAPE)
print(f"{model.cfg.num_layers} layers, at most {model.max_tokens:,} tokens in a prompt and its answer")

# %% [markdown]
# ## The documents
#
# Every conversation begins with a system message that holds the document. We take the first thousand tokens or less, so
# that two cores need only a few seconds.

# %%
ANSWER_TOKENS = 24


def document(file: str, start: int, stop: int) -> str:
    return demo.SYSTEM + demo.Document(file, start, stop, ()).text


README = document("README.md", 0, 2600)
LICENSE = document("LICENSE", 300, 4300)
DESIGN = document("jaxcache/DESIGN.md", 0, 3500)
QUESTIONS = ("What is jaxcache?", "Where do the KV pages stay?", "How do I try it?", "Do I need a GPU?")

for name, text in {"README": README, "LICENSE": LICENSE, "DESIGN": DESIGN}.items():
    print(f"{name}: {len(model.text.encode(text)):,} tokens")

# %% [markdown]
# ## Without a cache
#
# `models/conversation.py` has the two classes that this needs: a `LocalModel` makes servers, and a `Conversation` asks
# one of them and streams the answer. Behind them is the reference serving loop, `models/serve.py`.
#
# The model is tiny, and many of its answers are wrong. What counts here is that they stay the same.


# %%
@dataclass
class Arm:
    """Answers in the order of the questions: texts, times to first token, and where the prompts' tokens came from."""

    texts: list[str] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    sources: list[dict[str, int]] = field(default_factory=list)

    def ask(self, talk: Conversation, question: str) -> None:
        print(f"> {question}")
        for piece in talk.ask(question, ANSWER_TOKENS):
            print(piece, end="", flush=True)
        self.texts.append(talk.messages[-1]["content"])
        self.ttft_ms.append(talk.last.ttft_ms)
        hits = talk.last.hit_tokens
        self.sources.append(hits | {"computed": len(talk.last.prompt) - sum(hits.values())})
        told = ", ".join(f"{num:,} {source}" for source, num in self.sources[-1].items() if num)
        print(f"\n    {len(talk.last.prompt):,} tokens ({told}), first token after {talk.last.ttft_ms:,.0f} ms\n")


DEVICE_PAGES, HOST_PAGES = 96, 128  # of 16 tokens: small, so that they fill

server = model.server(device_pages=DEVICE_PAGES, caching=False)
without = Arm()
talk = Conversation(model, server, README)
for question in QUESTIONS:
    without.ask(talk, question)
server.cache.close()

# %% [markdown]
# ## With a cache
#
# The same questions again. Now the pages of a conversation stay on the device; copies go to host memory, and from there
# to storage, which is a folder here. The device has room for one conversation and a half.
#
# (If you interrupt an answer in the middle of a call of the cache, that cache ends, since it may be half changed. Run
# the cells from here on again.)

# %%
folder = tempfile.TemporaryDirectory()


def new_server():
    return model.server(
        jaxcache.FileStorage(folder.name),
        device_pages=DEVICE_PAGES,
        host_pages=HOST_PAGES,
        prefetch_policy=jaxcache.PrefetchPolicy.WAIT_COMPLETE,  # nobody else is served meanwhile
        events=True,  # for the picture of the tree
    )


server = new_server()
cached = Arm()
talk = Conversation(model, server, README)
for question in QUESTIONS:
    cached.ask(talk, question)

# %% [markdown]
# The first question computes the document. The later ones find it, with all that was said before, and compute little
# more than the new question.


# %%
COLORS = {"device": "#0072b2", "host": "#d55e00", "storage": "#009e73", "computed": "#bbbbbb"}


def plot_first_token(arms: dict[str, Arm]) -> None:
    _, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    width = 0.8 / len(arms)
    for i, (title, arm) in enumerate(arms.items()):
        turns = np.arange(len(arm.ttft_ms)) + 1
        bars = axes.bar(turns + (i - (len(arms) - 1) / 2) * width, arm.ttft_ms, width, label=title)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_xticks(turns)
    axes.set_xlabel("turn")
    axes.set_ylabel("time to first token [ms]")
    axes.legend(frameon=False, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right"]].set_visible(False)
    plt.show()


plot_first_token({"without a cache": without, "with a cache": cached})
found = sum(num for sources in cached.sources for tier, num in sources.items() if tier != "computed")
print(f"{found:,} of {sum(sum(sources.values()) for sources in cached.sources):,} prompt tokens were found")
print("the answers are the same" if cached.texts == without.texts else "THE ANSWERS DIFFER")

# %% [markdown]
# ## The tiers fill
#
# More readers come, with other documents. After each answer the reader thinks, and what is to be stored is stored
# (`drain`). The least recently used pages leave the device, later host memory; in storage they stay.


# %%
def pages_used() -> dict[str, int]:
    stats = server.cache.stats()
    tiers = {tier: stats["pages"][tier]["full"]["resident"] for tier in ("device", "host")}
    return tiers | {"storage": stats["counters"]["stored_pages"]}


readers = {"README": README, "LICENSE": LICENSE, "DESIGN": DESIGN}
schedule = (
    ("README", "Who is it for?"),
    ("LICENSE", "What is this licence about?"),
    ("LICENSE", "What is a Contribution?"),
    ("DESIGN", "What is this design about?"),
    ("README", "Does it work on several GPUs?"),
    ("DESIGN", "What is a tier?"),
    ("LICENSE", "Who is the Licensor?"),
)
server.pools = server.cache.drain(server.pools)
used, shared = [pages_used()], Arm()
for name, question in schedule:
    print(f"[{name}] ", end="")
    shared.ask(Conversation(model, server, readers[name]), question)
    server.pools = server.cache.drain(server.pools)
    used.append(pages_used())


# %%
def plot_tiers(names: list[str], sources: list[dict[str, int]], used: list[dict[str, int]]) -> None:
    """Left: pages in each tier after each request; right: where each prompt's tokens came from."""
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for tier in used[0]:
        left.plot([pages[tier] for pages in used], color=COLORS[tier], marker="o", label=tier)
    for tier, capacity in (("device", DEVICE_PAGES), ("host", HOST_PAGES)):
        left.axhline(capacity, color=COLORS[tier], linestyle=":", label=f"room of {tier}")
    left.set_ylim(0)
    left.set_xlabel("requests after the first conversation")
    left.set_ylabel(f"pages of {PAGE_TOKENS} tokens")
    left.legend(frameon=False, fontsize=8)
    bottom = np.zeros(len(sources))
    for source, color in COLORS.items():
        tokens = np.array([request[source] for request in sources])
        right.bar(range(1, len(sources) + 1), tokens, bottom=bottom, color=color, label=source)
        bottom += tokens
    right.set_xticks(range(1, len(sources) + 1), names, fontsize=8)
    right.set_ylabel("prompt tokens by source")
    right.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    plt.show()


plot_tiers([f"{i}\n{name}" for i, (name, _) in enumerate(schedule, 1)], shared.sources, used)

# %% [markdown]
# ## The tree
#
# All prompts hang in one radix tree: what two prompts have in common is there once. A cache tells what comes and goes
# on device and host as events (`take_events`), for routers that send a request to the replica that has its prefix. Each
# page names the page before it, so the events are enough to draw the tree: a square is a page, a row is what follows a
# fork, and the text is how it begins. What is on the device and in host memory is drawn as on the device.
#
# The documents part after the first page, with the beginning of the system message; their questions part where the
# document ends.


# %%
@dataclass
class Page:
    """parent: key of the page before it; tiers: device, host; none: it is in storage only"""

    parent: bytes
    tokens: np.ndarray
    tiers: set[str]


def follow(tree: dict[bytes, Page], events: list) -> None:
    """Brings the tree, by page key, up to date."""
    for event in events:
        if isinstance(event, jaxcache.BlockStored):
            parent = event.parent_key
            for key, tokens in zip(event.page_keys, event.token_ids.reshape(-1, event.page_tokens), strict=True):
                tree.setdefault(key, Page(parent, tokens, set())).tiers.add(event.tier.name.lower())
                parent = key
        elif isinstance(event, jaxcache.BlockRemoved):
            for key in event.page_keys:
                tree[key].tiers.discard(event.tier.name.lower())
        else:
            tree.clear()


def branches(tree: dict[bytes, Page]) -> list[tuple[int, int, list[Page]]]:
    """(row of the fork, pages before it, pages) by row; the first branch of a fork goes on in the fork's row."""
    children: dict[bytes, list[bytes]] = {}
    for key, page in tree.items():
        children.setdefault(page.parent, []).append(key)
    rows, waiting = [], [(0, 0, key) for parent, keys in children.items() if parent not in tree for key in keys]
    while waiting:
        above, start, key = waiting.pop()
        pages = []
        while key is not None:
            pages.append(tree[key])
            key, *others = children.get(key, [None])
            waiting += [(len(rows), start + len(pages), other) for other in reversed(others)]
        rows.append((above, start, pages))
    return rows


def plot_tree(tree: dict[bytes, Page]) -> None:
    rows = branches(tree)
    _, axes = plt.subplots(figsize=(11, 0.6 + 0.28 * len(rows)), layout="constrained")
    squares: dict[str, list[tuple[int, int]]] = {"device": [], "host": [], "storage": []}
    for row, (above, start, pages) in enumerate(rows):
        axes.plot([start - 0.5, start - 0.5], [above, row], color="gray", linewidth=0.8, zorder=0)
        for i, page in enumerate(pages):
            squares[min(page.tiers, default="storage")].append((start + i, row))
        begin = " ".join(model.text.decode(pages[0].tokens.tolist()).split())
        axes.text(start + len(pages), row, begin[:48], fontsize=7, va="center")
    for tier, at in squares.items():
        axes.scatter([x for x, _ in at], [y for _, y in at], marker="s", s=20, color=COLORS[tier], label=tier)
    axes.set_xlim(-1, 1.45 * max(start + len(pages) for _, start, pages in rows))
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlabel(f"pages of {PAGE_TOKENS} tokens from the beginning of the prompt")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right", "left"]].set_visible(False)
    plt.show()


tree: dict[bytes, Page] = {}
follow(tree, server.cache.take_events())
plot_tree(tree)

# %% [markdown]
# ## Why a prompt misses
#
# `explain` says of any prompt what a request would find, and why not more. It changes nothing.
#
# First, a new question about a document that is there. The hit ends with the last whole page that is the same; what
# follows was never computed.


# %%
def why(system: str, question: str) -> None:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    tokens = model.text.encode(model.text.chat(messages))
    print(server.cache.explain(server.cache.sequence(tokens, server.namespace)))


why(LICENSE, "May I sell the work?")

# %% [markdown]
# With another word at the very beginning nothing can be used: the keys and values of a token depend on all tokens
# before it. So what changes from prompt to prompt (a date, a name) belongs at the end.

# %%
why(LICENSE.replace("helpful", "friendly", 1), "May I sell the work?")

# %% [markdown]
# A prompt whose pages have left memory: when, and why ("room" was needed for another request). Storage still has them,
# but `explain` does not look there: a request asks storage by name for what memory lacks.

# %%
why(README, QUESTIONS[0])

# %% [markdown]
# ## After a restart
#
# The server ends and a new one begins. Device and host memory are empty, so `explain` finds nothing; storage has
# everything.

# %%
server.pools = server.cache.drain(server.pools)
server.cache.close()
server = new_server()
why(README, QUESTIONS[0])

# %% [markdown]
# All the same the document is not computed again: the first question fetches its pages from storage.

# %%
restarted = Arm()
talk = Conversation(model, server, README)
for question in QUESTIONS:
    restarted.ask(talk, question)
server.cache.close()
folder.cleanup()

# %%
arms = {"without a cache": without, "with a cache": cached, "after a restart": restarted}
plot_first_token(arms)
print("the answers are the same" if restarted.texts == without.texts else "THE ANSWERS DIFFER")

# %% [markdown]
# ## Where to go on
#
# * `make chat` is a chat in the terminal with the same model; `/why` is `explain`.
# * `make demo` does the comparison above with more readers.
# * `models/serve.py` is the serving loop, to be copied; `README.md` says what the cache asks of a loop.
