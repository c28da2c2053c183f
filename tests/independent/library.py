"""The texts of a run: what requests begin with, so that they meet in the tree, part, and come back."""

from __future__ import annotations

from random import Random

from tests.independent.setting import Setting

MAX_TEXTS = 12


class Library:
    """Texts that were computed before. In a calm run the same few stay; otherwise newer ones take their places."""

    def __init__(self, setting: Setting, rng: Random):
        self.setting = setting
        self.rng = rng
        self.page = setting.config.page_tokens
        self._texts = [self.words(setting.max_prompt) for _ in range(6 if setting.is_calm else 2)]

    def words(self, count: int) -> list[int]:
        return [self.rng.randrange(self.setting.vocabulary) for _ in range(count)]

    def any(self) -> list[int]:
        return self.rng.choice(self._texts)

    def prompt(self) -> list[int]:
        """The beginning of something that was there before, and something new, or part of something else."""
        rng, page = self.rng, self.page
        old = self.any()
        if rng.random() < (0.8 if self.setting.is_calm else 0.2):
            return old + self.words(1)
        cut = rng.randint(0, min(len(old), self.setting.max_prompt - 1))
        if rng.random() < 0.6:
            cut = cut // page * page
        more = rng.randint(1, 3 * page)
        tail = self.words(more) if rng.random() < 0.6 else self.any()[cut : cut + more]
        return (old[:cut] + (tail or self.words(1)))[: self.setting.max_prompt]

    def remember(self, tokens: list[int]) -> None:
        if len(self._texts) < MAX_TEXTS:
            self._texts.append(tokens)
        elif not self.setting.is_calm and self.rng.random() < 0.3:
            self._texts[self.rng.randrange(MAX_TEXTS)] = tokens
