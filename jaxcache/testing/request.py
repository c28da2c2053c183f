"""One request of the simulated serving loop: the same on every rank, with a sequence, a ticket and a lease on each."""

from __future__ import annotations

import random

import numpy as np

from jaxcache.core.lease import Lease
from jaxcache.core.prefetch import Ticket
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import Sequence


class Request:
    """tokens: the prompt and what was generated. num_output: tokens still to generate.

    random: everything that this request does by chance, so that leaving out another request changes nothing here
    """

    def __init__(self, tokens: list[int], sequences: list[Sequence], num_output: int, seed: int):
        self.tokens = tokens
        self.sequences = sequences
        self.num_output = num_output
        self.random = random.Random(seed)
        self.tickets: list[Ticket | None] = [None] * len(sequences)
        self.leases: list[Lease] = []
        self.num_computed = 0
        self.written: list[int] = []  # where model steps ended since the last insert
        self.tables: list[dict[str, np.ndarray]] = []  # page tables that the loop uses, on each rank
        for sequence in sequences[1:]:  # equal tokens have equal keys: hashed once
            sequence.keys = sequences[0].keys

    @property
    def space(self) -> int:
        """Which of the scenario's namespaces it is in."""
        return int(self.sequences[0].namespace.fields["salt"])

    @property
    def has_running_prefetch(self) -> bool:
        return self.tickets[0] is not None and not self.tickets[0].done

    def extend(self, tokens: list[int]) -> None:
        """Generated text."""
        self.tokens += tokens
        self.num_output -= len(tokens)
        for sequence in self.sequences:
            sequence.extend(tokens)

    def forget_lease(self) -> None:
        """It was released, or has ended."""
        self.leases, self.tickets = [], [None] * len(self.sequences)
        self.written.clear()
        self.tables.clear()

    def grown_tables(self) -> list[dict[str, np.ndarray]]:
        """The page tables that the loop has read, on each rank; what has been added since it adds itself."""
        if not self.tables:
            self.tables = [dict(lease.page_tables) for lease in self.leases]
        for lease, tables in zip(self.leases, self.tables, strict=True):
            for name, now in lease.page_tables.items():
                num_pages = len(tables[name])
                if len(now) > num_pages:
                    tables[name] = np.concatenate([tables[name], now[num_pages:]])
        return self.tables

    def prefetch(self, cores: list[PrefixCache]) -> None:
        self.tickets = [core.prefetch(sequence) for core, sequence in zip(cores, self.sequences, strict=True)]

    def cancel(self, cores: list[PrefixCache]) -> None:
        """Its prefetch, if there is one."""
        for core, ticket in zip(cores, self.tickets, strict=True):
            if ticket is not None:
                core.cancel(ticket)
        self.tickets = [None] * len(cores)
