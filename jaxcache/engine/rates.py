"""What this process has measured: how fast the loop computes tokens, and storage brings them.

    a hit of n tokens in storage pays if  n * seconds per token fetched  <  n * seconds per token computed

Both are of many requests together: the loop computes several prompts in a step, and all threads of storage fetch; how
long one request waits for its own fetch is no measure, since that passes while others are served.

One process's answer is its own. Ranks agree on the least of the ends that they name for a QUERY, so one that would
rather compute is enough. Every PROBE_EVERY-th hit is fetched all the same: what was slow once may be fast again.
"""

from __future__ import annotations

from collections.abc import Callable

MEMORY = 0.2  # weight of the newest measurement
PROBE_EVERY = 16
MIN_PREFILL_TOKENS = 16  # of a step that says how fast tokens are computed; a step that only decodes says nothing of it


class Rates:
    """Serving thread only. compute_s, fetch_s: seconds per token, None where nothing was measured.

    now: seconds
    """

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self.compute_s: float | None = None
        self.fetch_s: float | None = None
        self._step_start: float | None = None
        self._num_prefilled = 0

    def step(self, is_busy: bool) -> None:
        """A step begins. is_busy: requests run, so that the time since the last one was spent on them."""
        now = self._now()
        if self._step_start is not None and is_busy and self._num_prefilled >= MIN_PREFILL_TOKENS:
            self.compute_s = _mixed(self.compute_s, (now - self._step_start) / self._num_prefilled)
        self._step_start, self._num_prefilled = now, 0

    def prefills(self, num_tokens: int) -> None:
        """So many tokens of a prompt are computed in this step."""
        self._num_prefilled += num_tokens

    def fetched(self, num_tokens: int, seconds: float) -> None:
        """A FETCH has brought so many tokens."""
        if num_tokens:
            self.fetch_s = _mixed(self.fetch_s, seconds / num_tokens)

    def pays(self, query_id: int) -> bool:
        """Whether what a QUERY has found is worth fetching."""
        if self.compute_s is None or self.fetch_s is None:
            return True
        return self.fetch_s < self.compute_s or query_id % PROBE_EVERY == 0


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + MEMORY * (new - old)
