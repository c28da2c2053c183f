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
# # A hybrid model and its states
#
# Nemotron-H and Qwen3-Next have a few layers with attention, and many with a *recurrent state*: it holds all that such
# a layer remembers of the tokens so far, and every token changes it. Pages of keys and values can be cut anywhere; a
# state cannot. To resume a conversation at token n one needs the state exactly there, so it must have been kept.
#
# Here a tiny Nemotron-H serves conversations on a mesh of eight CPU devices (cp2 x tp2 x pp2). You see where states are
# kept, what a prompt lacks that finds its pages and not the state, and a snapshot that goes on on other meshes. The
# weights are random, a token is a byte, and the answers mean nothing: what counts is that they stay the same. It takes
# about two minutes on two cores and fetches nothing.
#
# `make notebook NOTEBOOK=a_hybrid_and_its_states` runs all of it and writes the outputs. The file to edit is
# `a_hybrid_and_its_states.py`.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported
os.environ["JAX_PLATFORMS"] = "cpu"

import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxcache
from models.decoder import components, init_params, make_extend
from models.families import TINY
from models.fleet import make_mesh
from models.serve import BatchShape, Request, Server

PAGE_TOKENS = 16
SHAPE = BatchShape(prefill_rows=2, chunk_tokens=64, decode_rows=4, table_pages=64)
PAGES = {"full": 128, "state": 16}  # of a state there are few: each is as large as many pages
cfg = TINY["tiny-nemotron-h"]
print("layers:", ", ".join(cfg.layer_kinds))

# %% [markdown]
# ## What the cache is told
#
# A model says what each kind of layer keeps (`keeps`, in `models/families/nemotron_h.py`); from it follow the
# components that the cache is made of. A state lies on the ranks by heads (`tp`) and layers (`pp`); over `cp` it is the
# same.

# %%
for component in components(cfg, PAGE_TOKENS, "float32"):
    for field in component.fields:
        print(f"{component.name:6} {field.name:7} {field.shape!s:26} {field.axes}")


class Replica:
    """The model on a mesh, its cache, and the reference serving loop."""

    def __init__(self, shape: tuple[int, int, int], folder: Path | None = None):
        self.mesh = make_mesh(shape)
        config = jaxcache.CacheConfig(page_tokens=PAGE_TOKENS, device_pages=PAGES, host_pages=PAGES, events=True)
        self.cache = jaxcache.Cache(components(cfg, PAGE_TOKENS, "float32"), self.mesh, config)
        params = init_params(cfg, self.mesh, seed=0, dtype=jnp.float32)
        namespace = self.cache.new_namespace(model="tiny-nemotron-h", weights_version="seed 0")
        self.server = Server(self.cache, make_extend(cfg, self.mesh, PAGE_TOKENS), params, namespace, SHAPE)
        if folder is not None:
            self.server.pools = self.cache.restore(folder)

    def ask(self, text: bytes, answer_tokens: int = 20) -> bytes:
        """The answer; prints how many tokens of the prompt were found."""
        request = Request(np.frombuffer(text, np.uint8).astype(np.int32), answer_tokens)
        output = bytes(token % 256 for token in self.server.stream(request))
        found = sum(request.hit_tokens.values())
        print(f"{len(text):4} tokens, {found:4} found, {len(text) - found:3} computed   ...{text[-24:].decode()!r}")
        return output

    def explain(self, text: bytes) -> None:
        tokens = np.frombuffer(text, np.uint8).astype(np.int32)
        print(self.cache.explain(self.cache.sequence(tokens, self.server.namespace)))


# %% [markdown]
# ## A conversation
#
# Three turns. The answer is put into the next prompt as text of our own, so that the prompts are the same whatever the
# model says.

# %%
TABLE = b"A table of harbours and their tides, hour by hour, as the pilots wrote them down. " * 4
TURNS = (b"When is high water in Bristol?", b"And in Hull, the day after?", b"Which of the two is deeper?")

replica = Replica((2, 2, 2))
said, answers = TABLE, []
for question in TURNS:
    said += b"\nQ: " + question + b"\nA: "
    answers.append(replica.ask(said))
    said += b"It is written in the table."

# %% [markdown]
# Each turn finds all whole pages of the prompt before: chunks of a prefill end at its last whole page
# (`lease.next_stop`), and the state there is kept.
#
# ## The tree, and the states in it
#
# The events of a cache say what is where. Each page names the page before it; a state belongs to the page at whose end
# it was made.


# %%
def follow(events: list, tree: dict[bytes, dict]) -> dict[bytes, dict]:
    """By page key: the key before it, its tokens, and what is there, as (component, tier)."""
    for event in events:
        if isinstance(event, jaxcache.BlockStored):
            parent = event.parent_key
            for key, tokens in zip(event.page_keys, event.token_ids.reshape(-1, PAGE_TOKENS), strict=True):
                page = tree.setdefault(key, {"parent": parent, "tokens": tokens, "there": set()})
                page["there"].add((event.component, event.tier.name.lower()))
                parent = key
        elif isinstance(event, jaxcache.BlockRemoved):
            for key in event.page_keys:
                tree[key]["there"].discard((event.component, event.tier.name.lower()))
        else:
            tree.clear()
    return tree


def plot_tree(tree: dict[bytes, dict], title: str) -> None:
    """A row is what follows a fork; a square is a page, a dot in it a state at its end."""
    children: dict[bytes, list[bytes]] = {}
    for key, page in tree.items():
        children.setdefault(page["parent"], []).append(key)
    waiting = [(0, 0, key) for parent, keys in children.items() if parent not in tree for key in keys]
    rows, squares, dots, _ = 0, [], [], plt.figure(figsize=(10, 2.2), layout="constrained")
    while waiting:
        above, x, key = waiting.pop()
        plt.plot([x - 0.5, x - 0.5], [above, rows], color="gray", linewidth=0.8, zorder=0)
        while key is not None:
            there = {component for component, _ in tree[key]["there"]}
            squares += [(x, rows)] * ("full" in there)
            dots += [(x, rows)] * ("state" in there)
            text = "".join(chr(token) if 32 <= token < 127 else "." for token in tree[key]["tokens"])
            key, *others = children.get(key, [None])
            waiting += [(rows, x + 1, other) for other in reversed(others)]
            x += 1
        plt.text(x, rows, text, fontsize=7, va="center", parse_math=False)
        rows += 1
    plt.scatter(*zip(*squares, strict=True), marker="s", s=60, color="#56b4e9", label="page of keys and values")
    plt.scatter(*zip(*dots, strict=True), marker="o", s=18, color="#d55e00", label="state at its end")
    plt.ylim(rows - 0.5, -0.5)
    plt.xlim(-1, 1.15 * max(x for x, _ in squares) + 6)
    plt.yticks([])
    plt.xlabel(f"pages of {PAGE_TOKENS} tokens from the beginning")
    plt.title(title, fontsize=9)
    plt.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    plt.show()


tree = follow(replica.cache.take_events(), {})
plot_tree(tree, "after one conversation: its end, and the ends of its turns, have states")

# %% [markdown]
# ## Why a prompt misses
#
# Somebody else asks about the same table. Its pages are there, but nobody stopped where the two prompts part, so there
# is no state: nothing can be used. `explain` says what is missing, why, and what would make it.

# %%
other = TABLE + b"\nQ: What is the colour of the pilot's boat?\nA: "
replica.explain(other)

# %%
first = replica.ask(other)

# %% [markdown]
# That prefill stopped at the fork and left a state there (a branch point). So the next one who parts there finds all of
# the table.

# %%
third = TABLE + b"\nQ: How many pilots are there?\nA: "
second = replica.ask(third)
tree = follow(replica.cache.take_events(), tree)
plot_tree(tree, "after two more: the fork has a state")

# %% [markdown]
# ## The tiers
#
# A state is large: few fit, and the oldest leave first, on each tier by itself. Pages of full attention stay when a
# state leaves; what is lost is only where one can resume.


# %%
def plot_tiers(cache: jaxcache.Cache) -> None:
    stats = cache.stats()
    tiers = list(stats["pages"])
    _, axes = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    for ax, name in zip(axes, PAGES, strict=True):
        resident = [stats["pages"][tier][name]["resident"] for tier in tiers]
        ax.barh(tiers, [PAGES[name]] * len(tiers), color="#eeeeee")
        ax.barh(tiers, resident, color="#0072b2")
        ax.set_title(f"{name}: {stats['page_bytes'][name]:,} bytes each", fontsize=9)
    plt.show()


replica.server.pools = replica.cache.drain(replica.server.pools)
plot_tiers(replica.cache)

# %% [markdown]
# ## A snapshot, restored onto other meshes
#
# Tree, pages and states go to a folder, whole: without what a mesh pads and repeats. They come back on four ranks of
# `tp`, and on one device, where the same prompts find as much and get the same answers.

# %%
folder = tempfile.TemporaryDirectory()
replica.cache.snapshot(replica.server.pools, Path(folder.name) / "snapshot")
replica.cache.close()

prompts = (said + b"\nQ: Who wrote it?\nA: ", TABLE + b"\nQ: How many tides?\nA: ")
restored: dict[str, list[bytes]] = {}
for shape in ((1, 4, 1), (1, 1, 1)):
    name = "cp{} x tp{} x pp{}".format(*shape)
    print(name)
    again = Replica(shape, Path(folder.name) / "snapshot")
    restored[name] = [again.ask(prompt) for prompt in prompts]
    again.cache.close()
folder.cleanup()

# %%
one, two = restored.values()
print("the answers are the same" if one == two else "THE ANSWERS DIFFER")

# %% [markdown]
# ## Where to go on
#
# * README, "Add your model in 20 lines".
# * `make demo-trace MODEL=tiny-nemotron-h` serves an hour of a trace with this model.
# * `python -m benchmarks turns` measures what is lost where turns end, by page, grid and number of slots.
