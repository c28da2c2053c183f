"""The recall task served by the real loop: as many answers are right wherever the prefix comes from, and few if any of
it is wrong.

    without a cache    the model alone
    device             the prefix of each table was computed before, by a request of its own
    host               the same, and the device has lost it; its pools are zero
    storage            a new cache on the same storage
    restarted          a new cache on the same folder, opened again

Questions are asked in rounds, one about each table at once. Before each round the nearer tiers are emptied, so all
whole pages of every prefix come from the tier that the arm is about.
"""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxcache
from models import decoder, recall, train_recall
from models.layer_plan import FULL, STATE, WINDOW
from models.recall import Exam
from models.serve import TIERS, BatchShape, Request, Server
from tests import strict_jax
from tests.models.ladder import ListeningServer
from tests.models.serving import PAGE_TOKENS, Rig, emptied, serve

COMMITTED = Path(__file__).parents[1] / "goldens" / "recall"
SHAPE = BatchShape(prefill_rows=4, chunk_tokens=48, decode_rows=16, table_pages=14)
PAGES = {"device_pages": 640, "host_pages": 1280}  # room for all tables and what is asked about them
CACHED_TOKENS = recall.PREFIX_TOKENS // PAGE_TOKENS * PAGE_TOKENS
CLEAN, WRONG = 0.94, 0.6  # exact match: at least, less than
ARMS = {"device": "device", "host": "host", "storage": "storage", "restarted": "storage"}  # and their tiers
MESHES = ((1, 1, 1), (2, 2, 1), (1, 2, 2))
QUICK = "window"  # a model takes seconds to compile

Prepare = Callable[[Server, int], None]  # before a round, by its number


@functools.cache
def rig_on(mesh: Mesh, model: str) -> Rig:
    cfg, params = recall.load(model, COMMITTED / f"{model}.npz", mesh)
    return Rig(mesh, params, decoder.make_extend(cfg, mesh, PAGE_TOKENS), cfg)


@functools.cache
def exam_of(is_quick: bool) -> Exam:
    """256 questions: eight about each of 32 tables; quick: 32, four about each of eight."""
    exam = Exam.draw(7, 32, 8)
    return replace(exam, prefixes=exam.prefixes[:8], asked=exam.asked[:8, :4]) if is_quick else exam


@contextmanager
def serving(rig: Rig, storage: jaxcache.Storage | None = None, **choices) -> Iterator[ListeningServer]:
    with rig.cache(storage, **{**PAGES, **choices}) as cache:
        yield ListeningServer(cache, rig.extend, rig.params, cache.new_namespace(model="recall"), SHAPE)


# ---- the task and its models


def test_the_answers_follow_from_the_table():
    exam = Exam.draw(3, 5, 4)
    for table, prefix in enumerate(exam.prefixes):
        pairs = [divmod(int(token) - recall.FIRST_PAIR, recall.NUM_KEYS) for token in prefix[1 : recall.TABLE_TOKENS]]
        after = dict(pairs)
        assert len(after) == recall.NUM_PAIRS and prefix[0] == recall.BOS
        assert len({int(key) for key in exam.asked[table, :, 1]}) == 4
        for asked, answer, places in zip(exam.asked[table], exam.answers[table], exam.places[table], strict=True):
            text = [*prefix.tolist(), *asked.tolist()]
            assert asked[0] == recall.ASK
            for place in places:
                assert pairs[place][0] == text[-1]
                text.append(after[text[-1]])
            text.append(text[-recall.LAG])
            assert text[-recall.ANSWER_TOKENS :] == answer.tolist()
            assert len(text) - 1 - recall.LAG < CACHED_TOKENS


def test_the_same_seed_draws_the_same_questions():
    first, again, other = (Exam.draw(seed, 5, 4).answers for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_more_questions_than_keys_are_refused():
    with pytest.raises(ValueError, match="num_questions=24 must not exceed"):
        Exam.draw(0, 1, recall.NUM_PAIRS - recall.SHOTS + 1)


@pytest.mark.parametrize("model", recall.MODELS)
def test_the_committed_parameters_are_small(model):
    assert (COMMITTED / f"{model}.npz").stat().st_size <= 250_000


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=() if model == QUICK else pytest.mark.slow) for model in recall.MODELS]
)
def test_what_is_trained_is_what_is_served(make_mesh, model):
    """Whole rows, and Mamba2 in its quadratic form, give the logits of pages and states."""
    rig, exam = rig_on(make_mesh(), model), exam_of(is_quick=True)
    with serving(rig, caching=False, host_pages=0) as server:
        request = Request(exam.prompt(0, 0), recall.ANSWER_TOKENS)
        serve(server, [request])
        served = server.answer(request)
    tokens = np.concatenate([request.prompt, np.array(served.tokens, np.int32)])
    at = np.arange(len(request.prompt) - 1, len(tokens) - 1)
    trained = np.asarray(train_recall.logits(rig.model, jax.device_get(rig.params), tokens[None], at))[0]
    assert np.abs(trained - served.logits).max() < 1e-3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda arrays: arrays.pop("head"), "head has shape None"),
        (lambda arrays: arrays.update(norm=np.ones(3)), r"norm has shape \(3,\), not \(64,\)"),
        (lambda arrays: arrays.update(bias=np.ones(3)), r"bias has shape \(3,\), not None"),
    ],
)
def test_a_file_of_other_parameters_is_refused(tmp_path, make_mesh, change, told):
    with np.load(COMMITTED / "full.npz") as arrays:
        changed = dict(arrays)
    change(changed)
    np.savez(tmp_path / "changed.npz", **changed)
    with pytest.raises(ValueError, match=told):
        recall.load("full", tmp_path / "changed.npz", make_mesh())


def test_an_unknown_model_is_refused(make_mesh):
    with pytest.raises(ValueError, match="model='gru' is none of"):
        recall.load("gru", COMMITTED / "full.npz", make_mesh())


def test_a_number_of_steps_beyond_the_schedule_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_recall.main(["--model", "full", "--out", str(tmp_path / "full.npz"), "--steps", "0"])
    assert "--steps must be 1 to 500 for full" in capsys.readouterr().err


@pytest.mark.slow
def test_training_again_begins_alike(tmp_path, capsys):
    """Two steps; the command writes what `load` reads and says what it is worth: nothing yet. (optax mixes dtypes.)"""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for name in ("first", "second"):
            assert train_recall.main(["--model", "full", "--out", str(tmp_path / f"{name}.npz"), "--steps", "2"]) == 0
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    assert "exact match 0.000" in capsys.readouterr().out


# ---- arms


@dataclass(frozen=True)
class Arm:
    """answers: i32[tables, questions, ANSWER_TOKENS]; hits: cached tokens by tier, int[tables, questions, 3]"""

    answers: np.ndarray
    hits: np.ndarray

    def exact_match(self, exam: Exam) -> float:
        tables, questions, _ = self.answers.shape
        return (self.answers == exam.answers[:tables, :questions]).all(axis=-1).mean()


def ask(server: Server, exam: Exam, prepare: Prepare) -> Arm:
    rounds = []
    for number in range(exam.asked.shape[1]):
        prepare(server, number)
        prompts = [exam.prompt(table, number) for table in range(len(exam.prefixes))]
        rounds.append([Request(prompt, recall.ANSWER_TOKENS) for prompt in prompts])
        serve(server, rounds[-1])
    by_table = list(zip(*rounds, strict=True))
    hits = [[[(request.hit_tokens or {})[tier] for tier in TIERS] for request in row] for row in by_table]
    return Arm(np.array([[request.output for request in row] for row in by_table]), np.array(hits))


def keep(server: Server, number: int) -> None:
    """Everything stays where it is."""


def empty_device(server: Server, number: int) -> None:
    server.pools = emptied(server.cache, server.namespace, server.pools)


def forget(server: Server, number: int) -> None:
    """Only storage keeps what it has."""
    server.pools = server.cache.drain(server.pools)
    server.cache.reset()


def compute_prefixes(server: Server, exam: Exam) -> None:
    serve(server, [Request(prefix, 1) for prefix in exam.prefixes])
    server.pools = server.cache.drain(server.pools)


@functools.cache
def uncached(mesh: Mesh, model: str, is_quick: bool) -> Arm:
    with serving(rig_on(mesh, model), caching=False, host_pages=0) as server:
        return ask(server, exam_of(is_quick), keep)


def climb(rig: Rig, exam: Exam, folder: Path, restart: Callable[[], Arm]) -> Iterator[tuple[str, Arm]]:
    """The arms with a cache."""
    with serving(rig) as server:
        compute_prefixes(server, exam)
        yield "device", ask(server, exam, keep)
        yield "host", ask(server, exam, empty_device)
    storage = jaxcache.FileStorage(folder)
    with serving(rig, storage) as server:
        compute_prefixes(server, exam)
    with serving(rig, storage) as server:
        yield "storage", ask(server, exam, forget)
    yield "restarted", restart()


def restarted(mesh: Mesh, model: str, is_quick: bool, folder: Path) -> Arm:
    """The last arm: a cache that finds only a folder."""
    with serving(rig_on(mesh, model), jaxcache.FileStorage(folder)) as server:
        return ask(server, exam_of(is_quick), forget)


def by_a_new_process(mesh: Mesh, model: str, folder: Path) -> Arm:
    shape = ",".join(map(str, mesh.devices.shape))
    file = folder.with_suffix(".npz")
    command = [sys.executable, "-m", __name__, model, shape, str(folder), str(file)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=600)
    with np.load(file) as arrays:
        return Arm(arrays["answers"], arrays["hits"])


def main(model: str, shape: str, folder: str, file: str) -> None:
    """The new process. file: gets the arm"""
    strict_jax.configure()
    sizes = [int(size) for size in shape.split(",")]
    grid = np.asarray(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    arm = restarted(Mesh(grid, ("cp", "tp", "pp")), model, False, Path(folder))
    np.savez(file, answers=arm.answers, hits=arm.hits)


def check_hits(arm: Arm, tier: str) -> None:
    """All whole pages of every prefix came from there."""
    assert np.array_equal(np.unique(arm.hits.reshape(-1, 3), axis=0), [[CACHED_TOKENS * (tier == t) for t in TIERS]])


def cases() -> Iterator:
    yield pytest.param(QUICK, MESHES[0], True, id=f"{QUICK}-quick")
    for model, shape in itertools.product(recall.MODELS, MESHES):
        yield pytest.param(model, shape, False, id=f"{model}-{shape}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("model", "shape", "is_quick"), list(cases()))
def test_answers_are_right_from_every_tier(make_mesh, closing_lines, tmp_path, model, shape, is_quick):
    mesh, exam = make_mesh(*shape), exam_of(is_quick)
    want = uncached(mesh, model, is_quick)
    assert not want.hits.any()
    assert want.exact_match(exam) >= CLEAN
    figures = [f"without a cache {want.exact_match(exam):.3f}"]
    folder = tmp_path / "storage"
    restart = functools.partial(restarted, mesh, model, True, folder)
    if not is_quick:
        restart = functools.partial(by_a_new_process, mesh, model, folder)
    for name, arm in climb(rig_on(mesh, model), exam, folder, restart):
        check_hits(arm, ARMS[name])
        assert np.array_equal(arm.answers, want.answers), name
        figures.append(f"{name} {arm.exact_match(exam):.3f}")
    if not is_quick:
        closing_lines.append(f"recall, {model} on {shape}: exact match {', '.join(figures)}")


# ---- mutations


def page_of_second_hop(exam: Exam, table: int, number: int) -> int:
    """The page of the table that holds the pair which the second hop of a question reads."""
    return (1 + int(exam.places[table, number, 1])) // PAGE_TOKENS


def last_page(exam: Exam, table: int, number: int) -> int:
    """The last one that is cached: it holds the token LAG places back, and its end is where the state is."""
    return CACHED_TOKENS // PAGE_TOKENS - 1


def device_pages(server: Server, prefix: np.ndarray, component: str) -> np.ndarray:
    """Ids of the cached pages of a prefix on the device, or of the states after them; -1: there is none."""
    core, sequence = server.cache.core, server.cache.sequence(prefix, server.namespace)
    residency = next(r for r in core.tiers.device if r.component.name == component)
    ids = np.full(CACHED_TOKENS // PAGE_TOKENS, -1)
    for node, end in core.tiers.tree.walk(sequence, CACHED_TOKENS):
        pages = node.pages[residency.index]
        if pages is not None and component == STATE:
            ids[end // PAGE_TOKENS - 1] = pages[0] if end == node.end else -1
        elif pages is not None:
            places = ids[node.start // PAGE_TOKENS : end // PAGE_TOKENS]
            places[:] = pages[: len(places)]
    return ids


def of_the_next_table(component: str, part: Callable[[Exam, int, int], int]) -> Callable[[Exam, Server], Prepare]:
    """One page of each prefix on the device, or its state, is a copy of what the next table's is: another one in each
    round."""

    def mutation(exam: Exam, server: Server) -> Prepare:
        clean = {name: np.array(pool) for name, pool in server.pools[component].items()}

        def prepare(server: Server, number: int) -> None:
            ids = np.stack([device_pages(server, prefix, component) for prefix in exam.prefixes])
            mine = np.array([ids[table, part(exam, table, number)] for table in range(len(ids))])
            other = np.array([ids[table + 1 - len(ids), part(exam, table, number)] for table in range(len(ids))])
            assert min(*mine, *other) >= 0 and len({*mine}) == len(ids)
            edited = {}
            for name, pool in server.pools[component].items():
                pages = np.array(pool)
                pages[ids[ids >= 0]] = clean[name][ids[ids >= 0]]
                pages[mine] = clean[name][other]
                edited[name] = jax.device_put(pages, pool.sharding)
            server.pools = {**server.pools, component: edited}

        return prepare

    return mutation


def position_off_by_one(exam: Exam, server: Server) -> Prepare:
    extend = server.extend

    def shifted(params, pools, batch):
        return extend(params, pools, batch._replace(starts=batch.starts + (batch.num_new > 0)))

    server.extend = shifted
    return keep


WRONG_PAGE = of_the_next_table(FULL, page_of_second_hop)
MUTATIONS = {
    ("full", "wrong page"): WRONG_PAGE,
    ("full", "position off by one"): position_off_by_one,
    ("window", "wrong page"): WRONG_PAGE,
    ("window", "position off by one"): position_off_by_one,
    ("window", "stale window"): of_the_next_table(WINDOW, last_page),
    ("mamba", "state of another request"): of_the_next_table(STATE, last_page),
}


def mutation_cases() -> Iterator:
    for model, name in MUTATIONS:
        if model == QUICK:
            yield pytest.param(model, name, True, id=f"{model}-{name}-quick")
        yield pytest.param(model, name, False, id=f"{model}-{name}", marks=pytest.mark.slow)


@pytest.mark.mutation
@pytest.mark.parametrize(("model", "name", "is_quick"), list(mutation_cases()))
def test_few_answers_are_right_with(make_mesh, closing_lines, model, name, is_quick):
    """Of the device's; and nearly all of them are without the mutation: the same cache is asked before."""
    exam = exam_of(is_quick)
    with serving(rig_on(make_mesh(), model)) as server:
        compute_prefixes(server, exam)
        clean = ask(server, exam, keep)
        arm = ask(server, exam, MUTATIONS[model, name](exam, server))
    check_hits(arm, "device")
    assert clean.exact_match(exam) >= CLEAN
    assert arm.exact_match(exam) < WRONG
    if not is_quick:
        closing_lines.append(f"recall, {model} with {name}: exact match {arm.exact_match(exam):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
