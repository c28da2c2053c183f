"""The simulation runs the engine of the product: it fails when one piece of that is wrong.

Storage I/O, what is known of one transfer, who waits for a host page, and the copies between device and host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from jaxcache.engine.host_page_order import HostPageOrder
from jaxcache.engine.storage_io import StorageIO, _Pages
from jaxcache.engine.storage_operation import StorageOperation
from jaxcache.engine.transfer_engine import TransferEngine
from jaxcache.testing import simulation
from jaxcache.testing.simulation import Settings, Simulation
from tests.core.test_mutations import Mutation, mutate

MESH = (2, 1, 1)
NUM_STEPS = 600
SEEDS = range(12)
UNITS = {"storage_unit_pages": 4}
FEW_HOST_PAGES = {"host_pages": 30}

MUTATIONS = (
    # ---- storage I/O
    Mutation(
        "a STORE does not wait for the backup that fills its pages",
        StorageIO,
        "_start_store",
        "after = order.before_read(move.src_page_ids[batch])",
        "after = []",
    ),
    Mutation(
        "a value has the key of its first page",
        StorageIO,
        "_store",
        "page_keys[value.stop - 1]",
        "page_keys[value.start]",
        UNITS,
    ),
    Mutation(
        "the name of a value does not say how many pages it holds",
        StorageIO,
        "_store_value",
        "cell.name, len(page_ids))",
        "cell.name, 1)",
        UNITS,
    ),
    Mutation(
        "all pages of a value are the first one's",
        StorageIO,
        "_store_value",
        "cell.values(share.rows, page_ids)",
        "cell.values(share.rows, page_ids[:1].repeat(len(page_ids)))",
        UNITS,
    ),
    Mutation("a page that storage lacks is taken for good", StorageIO, "_fetch_page", "return False", "continue"),
    Mutation(
        "a FETCH reads all pages into the first one",
        StorageIO,
        "_fetch",
        "move.page_keys[i], page_ids[i]",
        "move.page_keys[i], page_ids[batch.start]",
        {"storage_unit_pages": 1},
    ),
    Mutation(
        "of a value the first pages are taken, whichever are wanted",
        StorageIO,
        "_fetch_value",
        "slice(wanted.start - held.start, wanted.stop - held.start)",
        "slice(0, len(wanted))",
        UNITS,
    ),
    Mutation(
        "a value that storage lacks is taken for good", StorageIO, "_fetch_value", "return False", "continue", UNITS
    ),
    Mutation("a transfer that has ended is kept", StorageIO, "forget", "del self._live[transfer_id]", "pass"),
    Mutation(
        "pages that were not delivered are never let go of", _Pages, "job_ended", "elif not job.done():", "elif False:"
    ),
    Mutation(
        "a job breaks where pages are missing, which looks like a failing storage",
        StorageIO,
        "_query",
        "int((~good).sum())",
        "int(good.all() or [])",
    ),
    # ---- one transfer
    Mutation(
        "a transfer is quiet as soon as it is done",
        StorageOperation,
        "status",
        "self._is_done(), self._num_open == 0",
        "self._is_done(), self._is_done()",
    ),
    Mutation("good pages behind a bad one count", StorageOperation, "status", "_num_leading(good)", "int(good.sum())"),
    Mutation(
        "a transfer of several jobs ends with the first",
        StorageOperation,
        "add_job",
        "self._num_open += 1",
        "self._num_open = 1",
    ),
    # ---- host pages
    Mutation(
        "a writer does not wait for the writer before it",
        HostPageOrder,
        "before_write",
        "self._writers_of(pages) + ",
        "",
        FEW_HOST_PAGES,
    ),
    Mutation(
        "a reader does not wait for the writer",
        HostPageOrder,
        "before_read",
        "page_ids.tolist()",
        "page_ids.tolist()[:0]",
    ),
    Mutation(
        "a writer is not noted", HostPageOrder, "add_writer", "self._writers |= dict.fromkeys(pages, job)", "pass"
    ),
    # ---- copies
    Mutation(
        "a load-back is scattered before it has come",
        TransferEngine,
        "_scatter_arrived",
        "self._wait_for([load.job])",
        "pass",
    ),
    Mutation(
        "a backup is no writer of its pages",
        TransferEngine,
        "_back_up_chunk",
        "order.add_writer(dst, self._submit",
        "_ = (dst, self._submit",
    ),
    Mutation(
        "all pieces of a load-back go to the first pages",
        TransferEngine,
        "_load_back",
        "move.dst_page_ids[piece]",
        "move.dst_page_ids[: piece.stop - piece.start]",
    ),
)


def first_failure(seeds: Sequence[int]) -> tuple[int, Exception] | None:
    """The first seed that fails, and how."""
    for seed in seeds:
        try:
            Simulation(Settings(MESH, NUM_STEPS, seed)).run()
        except simulation.FAILURES as error:
            return seed, error
    return None


@pytest.fixture(autouse=True)
def setup(request, monkeypatch) -> Iterator[None]:
    """Of the mutation: fields of the config."""
    make, fields = simulation.make_config, request.getfixturevalue("mutation").setup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "make_config", lambda *args: replace(make(*args), **fields))
        yield


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_simulation_notices_that(mutation, monkeypatch):
    mutate(monkeypatch, mutation)
    found = first_failure(SEEDS)
    assert found is not None, f"{len(SEEDS)} seeds pass although {mutation.name}"
    monkeypatch.undo()
    assert first_failure([found[0]]) is None
