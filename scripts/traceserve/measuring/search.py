"""The search for the best serving configuration: candidates race the best so far, in alternating slices.

A shared machine's speed varies from minute to minute. So figures of different minutes are never
compared: a candidate and the best so far run in parallel and are measured alternately, and only their ratio
counts. A candidate wins if the ratios' mean, less their scatter, is above 1; else the earlier one stays.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Protocol, Sequence

import numpy as np
from traceserve_runtime.errors import TraceserveError

from traceserve.archives.model_config import Serving
from traceserve.errors import ServerError
from traceserve.measuring.candidates import Setting
from traceserve.measuring.load_generator import Result, nearest_rank

MARGIN = 1.03  # smaller gains are not worth a change
ROUNDS = 6
_FEWEST = 3  # rounds before anything can win
_HOPELESS = 0.75  # loses after a single round
_LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Student's t, one-sided at 99 %, by the number of rounds: of about ten candidates none should win by chance.
_T = {3: 6.96, 4: 4.54, 5: 3.75, 6: 3.36}


@dataclass(frozen=True)
class Goal:
    """The greatest throughput with this many connections; with `p99` (seconds), with at most as many as it allows."""

    connections: int
    p99: Optional[float] = None


class Site(Protocol):
    """The place where candidates are measured."""

    def measure(self, serving: Serving, connections: int, seed: int) -> Result:
        """Measure for a while; starts the candidate's server if needed. Raises TraceserveError."""
        ...

    def close(self, serving: Serving) -> None:
        """Stop the candidate's server."""
        ...


@dataclass
class Trial:
    """A candidate and its measurements: a row of the table."""

    serving: Serving
    connections: int
    results: List[Result] = field(default_factory=list)  # with these connections
    relative: Optional[float] = None  # its throughput, relative to the archive's own configuration
    failure: Optional[str] = None
    remark: str = ""

    @property
    def throughput(self) -> float:
        """Requests per second, of the median slice."""
        return statistics.median(result.throughput for result in self.results)

    def percentile(self, p: float) -> float:
        """Return the latency in seconds that `p` percent of all measured requests did not exceed (nearest rank); infinity
        if there is none."""
        latencies = np.concatenate([result.latencies for result in self.results] or [np.empty(0)])
        return nearest_rank(np.sort(latencies), p) if latencies.size else math.inf


def judge(ratios: Sequence[float], noise: float = 0.0) -> Optional[bool]:
    """Return whether the candidate won, by the ratios of its rates to the best's; None: keep measuring.

    `noise` is the scatter of such ratios' logarithms in earlier races: a few may agree by chance.
    """
    if ratios[0] < _HOPELESS or (len(ratios) > 1 and max(ratios) < 1):  # most candidates: save the time for others
        return False
    if len(ratios) < _FEWEST:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    error = max(noise, statistics.stdev(logs)) / math.sqrt(len(logs))
    if mean >= math.log(MARGIN) and mean > _T[len(logs)] * error:
        return True
    if mean + error < math.log(MARGIN) or len(ratios) >= ROUNDS:
        return False
    return None


class ServingSearch:
    """Races over one setting after another, until none helps or the time is up."""

    def __init__(
        self,
        site: Site,
        goal: Goal,
        settings: Sequence[Setting],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.site, self.goal, self.settings, self.clock = site, goal, settings, clock
        self.deadline = clock() + seconds
        self.levels = [n for n in _LEVELS if n < goal.connections] + [goal.connections]
        self.trials: Dict[Serving, Trial] = {}
        self.best: Trial
        self.in_time = True
        self._wins = 0
        self._variances: List[float] = []  # of the logarithms of ratios, per race
        self._need = 0.0  # seconds per race

    def run(self, starts: Sequence[Serving]) -> Trial:
        """Return the best trial, starting with the first of `starts` that answers; raises the last one's error if none
        does.

        If the goal is a p99 that none reached, the trial with the best p99; see `reaches`.
        """
        first = self._begin(starts)
        turned = True
        while turned and self.in_time:
            before = self.best
            for setting in self.settings:
                self._turn(setting)
            turned = self.best is not before
        self._confirm(first)
        self._keep_to_goal()
        if not self.reaches(self.best):
            self._fall_back()
        return self.best

    def reaches(self, trial: Trial) -> bool:
        """Return whether it answers as fast as the goal demands."""
        return self.goal.p99 is None or trial.percentile(99) <= self.goal.p99

    def _begin(self, starts: Sequence[Serving]) -> Trial:
        for serving in starts:
            trial = self.trials[serving] = Trial(serving, self.goal.connections, relative=1.0)
            started = self.clock()
            self._measure(trial, 0)
            measured = self.clock()
            if not trial.failure and self._measure(trial, 1):
                self._need = measured - started + 2 * _FEWEST * (self.clock() - measured)
                self._fit(trial, len(self.levels) - 1)
            if not trial.failure:
                self.best = trial
                return trial
        raise ServerError(f"the archive is not served, whatever its configuration: {trial.failure}")

    def _turn(self, setting: Setting) -> None:
        for ladder in setting(self.best.serving):
            won = False
            for serving in ladder:
                if not self._try(serving):
                    break
                won = True
            if won and len(ladder) > 1:
                return  # the other direction leads back

    def _try(self, serving: Serving) -> bool:
        """Return whether a candidate beat the best so far; if so, it becomes the best."""
        if serving in self.trials:
            return False
        # After a win, keep time for a last race against the archive's own configuration.
        self.in_time = self.deadline - self.clock() > self._need * (2 if self._wins else 1)
        if not self.in_time:
            return False
        self._keep_to_goal()
        trial = self.trials[serving] = Trial(serving, self.best.connections)
        self._fit(trial, self.levels.index(self.best.connections))
        won = not trial.failure and self._race(trial, self.best)
        if won:
            self._wins += 1
        loser, self.best = (self.best, trial) if won else (trial, self.best)
        self.site.close(loser.serving)
        return won

    def _race(self, trial: Trial, best: Trial) -> bool:
        by_goal = self._by_goal(trial, best)
        if by_goal is not None:
            return by_goal
        for_rate = self.reaches(best)
        ratios: List[float] = []
        verdict: Optional[bool] = None
        while verdict is None and (not ratios or self.clock() < self.deadline):
            failed = self._in_turn(trial, best, len(ratios))
            if failed is not None:
                return failed is best
            one, other = trial.results[-1], best.results[-1]
            ratios.append(one.throughput / other.throughput if for_rate else other.percentile(99) / one.percentile(99))
            verdict = judge(ratios, math.sqrt(statistics.mean(self._variances or [0.0])))
        if len(ratios) > 1:
            self._variances.append(statistics.variance(map(math.log, ratios)))
        gain = statistics.geometric_mean(ratios)
        if for_rate and best.relative is not None:
            trial.relative = best.relative * gain
        if verdict and for_rate and not self.reaches(trial):
            trial.remark = "misses the p99"
            return False
        trial.remark = _remark(verdict, gain, "rate" if for_rate else "p99")
        return bool(verdict)

    def _by_goal(self, trial: Trial, best: Trial) -> Optional[bool]:
        """Return whether the trial won, if only one of the two reaches the goal; None if they must alternate."""
        if self.reaches(trial) and not self.reaches(best):  # it may have been luck
            all(self._measure(trial, 2 + n) for n in range(_FEWEST))
        if not trial.failure and self.reaches(trial) == self.reaches(best):
            return None
        trial.remark = f"{'reaches' if self.reaches(trial) else 'misses'} the p99"
        return not trial.failure and self.reaches(trial)

    def _in_turn(self, trial: Trial, best: Trial, turn: int) -> Optional[Trial]:
        """Measure both, alternating which is first; returns the one that failed, if any."""
        pair = (best, trial) if turn % 2 else (trial, best)
        return next((each for each in pair if not self._measure(each, 2 + turn)), None)

    def _measure(self, trial: Trial, seed: int) -> bool:
        try:
            result = self.site.measure(trial.serving, trial.connections, seed)
        except TraceserveError as error:
            trial.failure = error.message
        else:
            if result.errors or not result.requests:
                reasons = ", ".join(f"{count} x {reason}" for reason, count in result.errors.items())
                trial.failure = f"requests failed: {reasons or 'none was answered'}"
            trial.results.append(result)
        if trial.failure:
            self.site.close(trial.serving)
        return not trial.failure

    def _fit(self, trial: Trial, level: int) -> None:
        """Set the trial's connections to those with the greatest rate within the p99; one if none is within it."""
        kept: Optional[Trial] = None
        missed = len(self.levels)  # the lowest level that misses the p99
        while self.goal.p99 is not None and level < missed:
            trial.connections, trial.results = self.levels[level], []
            if not self._measure(trial, level):
                return
            if self.reaches(trial):
                if kept is not None and trial.throughput < MARGIN * kept.throughput:
                    break
                kept = Trial(trial.serving, trial.connections, trial.results)
                level += 1
            elif kept is not None or level == 0:
                break
            else:
                missed = level
                # A busy server's latency is proportional to its connections.
                wanted = trial.connections * self.goal.p99 / trial.percentile(99)
                level = max([0] + [i for i in range(level) if self.levels[i] <= wanted])
        if kept is not None:
            trial.connections, trial.results = kept.connections, kept.results

    def _keep_to_goal(self) -> None:
        """Reduce the best's connections if later measurements show that it misses the p99."""
        best = self.best
        while not self.reaches(best) and best.connections > 1:
            level = self.levels.index(best.connections) - 1
            best.connections, best.results = self.levels[level], []
            if not all(self._measure(best, seed) for seed in range(2)):
                return

    def _fall_back(self) -> None:
        """If the best misses the p99 after all, return to one that reached it and does again, or to the nearest."""
        others = [trial for trial in self.trials.values() if not trial.failure and self.reaches(trial)]
        for trial in sorted(others, key=lambda trial: trial.throughput, reverse=True)[:_FEWEST]:
            if all(self._measure(trial, seed) for seed in range(_FEWEST)) and self.reaches(trial):
                self.best = trial
                return
            self.site.close(trial.serving)
        self.best = min(
            (t for t in self.trials.values() if not t.failure), key=lambda t: t.percentile(99), default=self.best
        )

    def _confirm(self, first: Trial) -> None:
        """Race the result of several races against their starting point."""
        winner = self.best
        if self._wins > 1 and self.reaches(winner) and self.reaches(first):
            if self._race(winner, first):
                winner.remark += ", again in a last race"
            else:
                self.best = first
                winner.remark += " in a last race"
        for trial in (winner, first):
            self.site.close(trial.serving)


def _remark(verdict: Optional[bool], gain: float, what: str) -> str:
    if verdict is None:
        return "the time was up"
    if verdict or gain < 1 / MARGIN:
        return ("better " if verdict else "worse ") + what
    return "within noise"
