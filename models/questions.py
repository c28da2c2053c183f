"""Questions whose answers stand once in a long text: what a model is asked when arms of accuracy are compared.

    python -m models.questions [--seed 0] [--out models/questions.json]

    |-- licence --| The secret code of Grace is 4711. |-- licence --| ... x 12 | Once more: The secret code of Grace is
    |---------------- document: the prefix that questions share ---------------|--------------- ending --------------|

The text is this repository's LICENSE (Apache-2.0), of which the committed file holds a copy. Both documents speak of
the same names and give them other codes, so pages of the wrong one give wrong answers.

The form of the question was chosen on seeds 91 and 92 without a cache. Seed 0 and the rest were fixed before any arm
ran: an answer is right if it begins with the code. Without the document that is a chance of 1 in 9,000. Who guesses
among the codes of the document has 2 of 24 right, and THRESHOLD or more with a probability of 1e-5.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMITTED = Path(__file__).parent / "questions.json"
SOURCE, SOURCE_SHA256 = "LICENSE", "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karin", "Louis")
NUM_DOCUMENTS = 2
PIECE_CHARS = 250  # of licence before every code: 760 tokens a document
SENTENCE = "The secret code of {name} is {code}."
ENDING = "\nOnce more: The secret code of {name} is"  # to be continued: a model needs no chat template
GUESSED = NUM_DOCUMENTS  # right answers of who guesses among the codes of the document
THRESHOLD = 10
ANSWER_TOKENS = 6


@dataclass(frozen=True)
class Question:
    """document: its number; offset: of the sentence that gives the code, in characters of the document"""

    document: int
    name: str
    code: str
    offset: int

    @property
    def ending(self) -> str:
        return ENDING.format(name=self.name)

    def is_right(self, answer: str) -> bool:
        return re.match(rf"\s*{self.code}(?!\d)", answer) is not None


@dataclass(frozen=True)
class QuestionSet:
    documents: tuple[str, ...]
    questions: tuple[Question, ...]  # of the documents in turn

    def prompt(self, question: Question) -> str:
        return self.documents[question.document] + question.ending


def load(path: Path = COMMITTED) -> QuestionSet:
    told = json.loads(path.read_text())
    return QuestionSet(tuple(told["documents"]), tuple(Question(**one) for one in told["questions"]))


def make(seed: int) -> dict[str, Any]:
    """What the file holds: the same for the same seed, whatever the Python."""
    source = (ROOT / SOURCE).read_bytes()
    if (digest := hashlib.sha256(source).hexdigest()) != SOURCE_SHA256:
        raise ValueError(
            f"{SOURCE} has sha256 {digest}, not {SOURCE_SHA256}: the questions were made from another text"
        )
    pieces = textwrap.wrap(" ".join(source.decode().split()), PIECE_CHARS)
    rng = random.Random(seed)
    documents, questions = [], []
    for number in range(NUM_DOCUMENTS):
        start = number * len(pieces) // NUM_DOCUMENTS
        document, asked = _document(number, pieces[start : start + len(NAMES)], rng)
        documents.append(document)
        questions.append(asked)
    in_turn = [vars(question) for asked in zip(*questions, strict=True) for question in asked]
    return {"source": f"{SOURCE} (Apache-2.0)", "seed": seed, "documents": documents, "questions": in_turn}


def _document(number: int, pieces: Sequence[str], rng: random.Random) -> tuple[str, list[Question]]:
    """(text, questions in the order of the text). Of rng only `random` is used: every Python draws the same."""
    text, questions = "", []
    for name, piece in zip(sorted(NAMES, key=lambda _: rng.random()), pieces, strict=True):
        text += piece + "\n"
        code = str(1000 + int(rng.random() * 9000))
        questions.append(Question(number, name, code, len(text)))
        text += SENTENCE.format(name=name, code=code) + "\n"
    return text, questions


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.questions", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s, that of the committed file)")
    parser.add_argument("--out", type=Path, default=COMMITTED, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        args.out.write_text(json.dumps(make(args.seed), indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
