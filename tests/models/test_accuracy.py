"""Questions about a long text have equal answers wherever the text comes from, and wrong ones if it is another text.

Quick: the questions themselves, and the command with random weights. Slow: SmolLM2; `make test-gemma`: Gemma 3 270M.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jaxcache
from models import accuracy, fetch, questions
from models.accuracy import Arm, Exam
from models.conversation import PAGE_TOKENS, LocalModel
from models.questions import NAMES, SENTENCE, THRESHOLD, Question, QuestionSet
from models.serve import Server
from tests.models.tiny_gguf import write_tiny_gguf

ARMS = ("question alone", "without a cache", "cold", "device", "host", "after a restart")
TIER_OF = {"cold": "device", "device": "device", "host": "host", "after a restart": "storage"}

# ---- the questions


def test_the_committed_questions_are_what_the_script_makes(tmp_path):
    assert questions.main(["--out", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == questions.COMMITTED.read_bytes()


def test_every_answer_stands_once_in_its_document_where_the_file_says():
    asked = questions.load()
    assert len(asked.questions) == len({question.code for question in asked.questions}) == 2 * len(NAMES)
    for question in asked.questions:
        document = asked.documents[question.document]
        assert document.startswith(SENTENCE.format(name=question.name, code=question.code), question.offset)
        assert sum(text.count(question.code) for text in asked.documents) == 1
        assert question.code not in question.ending and question.name in question.ending


def test_documents_speak_of_the_same_names_and_are_asked_about_in_turn():
    asked = questions.load()
    names = [{q.name for q in asked.questions if q.document == number} for number in range(len(asked.documents))]
    assert names == [set(NAMES)] * 2
    assert all(a.document != b.document for a, b in pairwise(asked.questions))


def test_another_seed_gives_other_codes_in_the_same_text():
    made, other = questions.make(0), questions.make(1)
    assert {q["code"] for q in made["questions"]} != {q["code"] for q in other["questions"]}
    assert made["documents"][0].split("\n")[::2] == other["documents"][0].split("\n")[::2]


def test_another_licence_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "LICENSE").write_text("MIT")
    monkeypatch.setattr(questions, "ROOT", tmp_path)
    assert questions.main(["--out", str(tmp_path / "questions.json")]) == 2
    assert "LICENSE has sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [(" 4711.", True), ("4711", True), (" 4711\nThe", True), (" 47110", False), (" 471", False), (" not 4711", False)],
)
def test_right_is_what_begins_with_the_code(answer, is_right):
    assert Question(0, "Alice", "4711", 0).is_right(answer) is is_right


def test_guessing_does_not_reach_the_threshold():
    n, chance = 2 * len(NAMES), 1 / len(NAMES)
    tail = sum(math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(THRESHOLD, n + 1))
    assert n * chance == questions.GUESSED
    assert tail < 2e-5


# ---- the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def few_questions(monkeypatch) -> QuestionSet:
    """Two about each document, of which there is only the beginning."""
    asked = questions.load()
    few = QuestionSet(tuple(text[:400] for text in asked.documents), asked.questions[:4])
    monkeypatch.setattr(accuracy, "load", lambda: few)
    monkeypatch.setattr(accuracy, "PAGES", 80)
    return few


def test_the_command_compares_all_arms(tiny, tmp_path, few_questions, capsys):
    figures = tmp_path / "figures.json"
    assert accuracy.main(["--model", str(tiny), "--json", str(figures)]) == 0
    shown, told = capsys.readouterr().out, json.loads(figures.read_text())
    assert told["model"] == "tiny" and told["answers_identical"] and not told["is_above_chance"]
    assert tuple(told["arms"]) == ARMS
    for title in ARMS:
        arm = told["arms"][title]
        check_sources(title, arm["hit_tokens"], arm["prompt_tokens"])
        assert title in shown
    assert "fewer than 10 are right" in shown


def check_sources(title: str, hits: dict[str, int], prompts: int) -> None:
    """What was cached came from the tier that the arm is about, but for a page or so that the device had room for."""
    tier = TIER_OF.get(title)
    if tier is None:
        assert not any(hits.values()), title
    else:
        assert hits[tier] >= (0.4 if title == "cold" else 0.9) * prompts, title
        assert sum(hits.values()) - hits[tier] <= 0.05 * prompts, title


def test_the_command_says_when_answers_differ(tiny, few_questions, monkeypatch, capsys):
    ask = Exam.ask

    def confused(exam, title, server, *how):
        if title == "device":
            confuse_documents(exam, server)
        return ask(exam, title, server, *how)

    monkeypatch.setattr(Exam, "ask", confused)
    assert accuracy.main(["--model", str(tiny)]) == 1
    assert "NO" in capsys.readouterr().out


def confuse_documents(exam: Exam, server: Server) -> None:
    """From now on a prompt finds the pages of the other document, as if both had one key."""
    heads = [exam.model.text.encode(document) for document in exam.asked.documents]
    num_tokens = (min(len(head) for head in heads) - 1) // PAGE_TOKENS * PAGE_TOKENS
    mine, other = (head[:num_tokens] for head in heads)
    sequence = server.cache.sequence

    def confused(tokens: np.ndarray, namespace: jaxcache.Namespace) -> jaxcache.Sequence:
        found = other if np.array_equal(tokens[:num_tokens], mine) else mine
        return sequence(np.concatenate([found, tokens[num_tokens:]]), namespace)

    server.cache.sequence = confused


def test_the_command_names_a_file_that_is_none(tmp_path, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert accuracy.main(["--model", str(tmp_path / "broken.gguf")]) == 2
    assert "broken.gguf: no GGUF file, or truncated" in capsys.readouterr().err.replace("\n", "")


# ---- published weights

SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]
GEMMA = [pytest.mark.gemma, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=[pytest.param("smollm2", marks=SLOW), pytest.param("gemma3_270m", marks=GEMMA)])
def exam(request) -> Exam:
    is_smollm2 = request.param == "smollm2"
    path = fetch.fetch(fetch.SMOLLM2) if is_smollm2 else request.getfixturevalue("gemma3_270m")
    model = LocalModel(path, jaxcache.one_device_mesh(), accuracy.SHAPE)
    return Exam(model, questions.load(), Console(quiet=True))


@pytest.fixture(scope="module")
def arms(exam, tmp_path_factory) -> dict[str, Arm]:
    return {arm.title: arm for arm in exam.run(tmp_path_factory.mktemp("storage"))}


def test_without_a_cache_a_model_answers_far_above_chance(arms):
    assert tuple(arms) == ARMS
    assert arms["question alone"].num_right == 0
    assert arms["without a cache"].num_right >= THRESHOLD


@pytest.mark.parametrize("title", TIER_OF)
def test_answers_are_equal_from_every_tier(arms, title):
    assert arms[title].answers == arms["without a cache"].answers
    assert arms[title].num_right == arms["without a cache"].num_right
    check_sources(title, arms[title].hit_tokens, arms[title].prompt_tokens)


@pytest.mark.mutation
@pytest.mark.parametrize(
    ("exam", "title"),
    [
        *(pytest.param("smollm2", title, marks=SLOW) for title in ("device", "host", "after a restart")),
        pytest.param("gemma3_270m", "device", marks=GEMMA),
    ],
    indirect=["exam"],
)
def test_pages_of_the_other_document_give_its_answers(exam, tmp_path, title):
    """The mutation: else equal answers would prove little.

    With windows on the device only: a confused prompt leaves what was stored or evicted where no window is resumable,
    and computes its own document again.
    """
    few = Exam(exam.model, QuestionSet(exam.asked.documents, exam.asked.questions[:8]), exam.console)
    other = {(question.document, question.name): question for question in exam.asked.questions}
    storage = jaxcache.FileStorage(tmp_path) if title == "after a restart" else None
    options = {"device_pages": few.pages_of_one()} if title == "host" else {}
    with few.serving(storage, **options) as server:
        few.read_documents(server)
        server.pools = server.cache.drain(server.pools)
        confuse_documents(few, server)
        arm = few.ask(title, server, few.prompts, accuracy.forget if storage else accuracy.keep)
    wrong = [other[1 - question.document, question.name] for question in few.asked.questions]
    assert arm.hit_tokens[TIER_OF[title]] >= 0.7 * arm.prompt_tokens  # in `host` the device has the first one's
    assert arm.num_right == 0
    assert sum(question.is_right(answer) for question, answer in zip(wrong, arm.answers, strict=True)) >= 4
