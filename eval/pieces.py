"""One piece of a comparison: looked up in the journal, or measured and written down, or noted as failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from .failures import Failures
from .journal import NO_JOURNAL, Journal
from .progress import Advance
from .runs import Run


@dataclass
class Pieces:
    """What happens to every piece of a comparison.

    journal: of what is already measured. failures: takes note of runs that fail, and the others go on;
    without it a failure is raised. advance: told how many steps are done, whatever became of them.
    """

    journal: Journal = NO_JOURNAL
    failures: Failures | None = None
    advance: Advance = lambda steps: None

    def measure(self, run: Run, compute: Callable[[], Any], *, steps: int = 1, **piece: Any) -> Any | None:
        """The result of one piece of ``run``, of so many steps: the journal's, or what ``compute`` gives.

        Args:
            run: whose piece it is. Its config is part of the key, its name is not.
            compute: measures it; what it returns is what the journal can keep.
            steps: of the progress bar.
            piece: the key, with what tells this piece from the run's others.

        Returns:
            None if the run fails in this piece, or failed before.
        """
        result = None
        if not self.failed(run):
            key = {**piece, "config": run.describe()["config"]}
            result = self.journal.get(**key)
            if result is None:
                with nullcontext() if self.failures is None else self.failures.catch(run):
                    result = compute()
                if result is not None:
                    self.journal.put(result, **key)
        self.advance(steps)
        return result

    def failed(self, run: Run) -> bool:
        """Whether ``run`` failed in an earlier piece."""
        return self.failures is not None and run in self.failures
