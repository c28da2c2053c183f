"""A node of the tree: a run of whole pages of one namespace, and what is known about it."""

from __future__ import annotations

from typing import Any

import numpy as np

FULL = 0  # the index of full attention among the components: it is the tree itself


class Node:
    """A run of pages. start = parent.end, end: positions in tokens.

    pages, pins, resident_children: one entry per residency (see core/pages.py); pages[r] is None where nothing is
    ready_step:  the step from which loaded-back pages may be read
    ends_here:   leases and load-backs that end at this node
    hits:        admits that found it
    last_used:   order of uses (-1: generated text, the first to leave)
    is_output:   generated text, not (yet) part of a prompt
    priority:    the highest that it was inserted with
    account:     the account that its pages are on (see core/limits/tenants.py); of the root, for all below
    retained:    retentions that keep its full attention on the device
    use:         what the profile of reuse says of it, if there is one
    keys:        page keys, once somebody needed them
    """

    __slots__ = (
        "account",
        "children",
        "edge",
        "end",
        "ends_here",
        "first_page",
        "hits",
        "id",
        "is_output",
        "keys",
        "last_used",
        "pages",
        "parent",
        "pins",
        "priority",
        "ready_step",
        "resident_children",
        "retained",
        "use",
    )

    def __init__(self, id: int, parent: Node | None, edge: Any, first_page: bytes, end: int, num_residencies: int):
        self.id = id
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.edge = edge
        self.first_page = first_page
        self.end = end
        self.pages: list[np.ndarray | None] = [None] * num_residencies
        self.pins = [0] * num_residencies
        self.resident_children = self.pins.copy()
        self.ready_step = 0
        self.ends_here = 0
        self.hits = 0
        self.last_used = 0
        self.is_output = False
        self.priority = 0
        self.account: int = 0 if parent is None else parent.account
        self.retained = 0
        self.use: Any = None
        self.keys: list[bytes] | None = None

    @property
    def start(self) -> int:
        return self.end - len(self.edge) // 4

    def __repr__(self) -> str:
        return f"Node({self.id}, [{self.start}, {self.end}))"
