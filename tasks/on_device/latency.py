"""Scenario ``latency``: one query at a time, all variants and a canary in one process, in interleaved slices.

A round gives every engine one slice, in an order shuffled anew. A slice begins with a short untimed re-warm,
because the engine before has taken the caches. The canary is a small fixed network of our own, not one of the
variants: it moves only when the machine does, so a variant that drifts cannot hide behind itself.
Rounds are the unit of evidence: queries of one slice resemble each other, and the slices of a round share the
machine's mood.
"""

import array
import gc
import os
import random
import time
from typing import Any, Callable, Dict, List, Sequence, Tuple

from jetway.tasks.on_device import machine, outputs, passport, statistics, tensors

CANARY = "canary"
# Four rounds a third is the least that gives each third a median worth comparing.
MIN_ROUNDS = 12
# Share of a slice's length that is spent untimed after each switch.
REWARM_RATIO = 0.1
# Going on after a drift adds a third of the planned rounds: a passing one loses its weight, and a step in the
# second half of the planned session still lies behind the first third after three extensions. Going on among
# other processes adds as many rounds as were planned, or fewer when the calm ones suffice.
EXTENSION_RATIO = 1.0 / 3.0
# The canary alone may move this many times further than a variant may move against it: a neighbour on the
# other hyperthread of a core slows everything alike, by half and more, and leaves the ratios as they are.
MACHINE_DRIFT_FACTOR = 4.0
# A round counts when in none of its slices we waited longer than this for a core that another process held.
# The scheduler says so, not the latencies: nothing is left out for being slow.
MAX_WAITING_RATIO = 0.25

clock_ns = getattr(time, "perf_counter_ns", None) or (lambda: int(time.perf_counter() * 1e9))
Progress = Callable[[Dict[str, Any]], None]


class Entrant:
    """An engine in the session: its timed queries, and what they come to in each slice."""

    def __init__(self, name: str, run: Callable[[], Any]) -> None:
        self.name = name
        self.run = run
        self.latencies_ns = array.array("q")
        self.slice_counts = []  # type: List[int]
        self.slice_medians_ns = []  # type: List[float]
        self.slice_timed_ns = []  # type: List[int]
        self.slice_waiting_ratios = []  # type: List[float]

    def warm_up(self, runs: int) -> None:
        for _ in range(runs):
            self.run()

    def run_slice(self, slice_ns: int) -> None:
        """One re-warm, then queries back to back until the slice is over; at least one of each."""
        self._rewarm(clock_ns() + int(slice_ns * REWARM_RATIO))
        first, waited_ns = len(self.latencies_ns), machine.waited_for_cpu_ns()
        run, record, now = self.run, self.latencies_ns.append, clock_ns
        started_ns = now()
        end_ns = started_ns + slice_ns
        while True:
            before = now()
            run()
            after = now()
            record(after - before)
            if after >= end_ns:
                break
        waited_ns = machine.waited_for_cpu_ns() - waited_ns
        self._close_slice(self.latencies_ns[first:], waited_ns / (after - started_ns))

    def _rewarm(self, end_ns: int) -> None:
        self.run()
        while clock_ns() < end_ns:
            self.run()

    def _close_slice(self, latencies_ns: Sequence[int], waiting_ratio: float) -> None:
        self.slice_counts.append(len(latencies_ns))
        self.slice_medians_ns.append(statistics.median(latencies_ns))
        self.slice_timed_ns.append(sum(latencies_ns))
        self.slice_waiting_ratios.append(waiting_ratio)

    def queries(self, rounds: Sequence[int]) -> int:
        return sum(self.slice_counts[index] for index in rounds)

    def timed_ns(self, rounds: Sequence[int]) -> int:
        return sum(self.slice_timed_ns[index] for index in rounds)

    def medians_ns(self, rounds: Sequence[int]) -> List[float]:
        return [self.slice_medians_ns[index] for index in rounds]


class ReloadedEntrant(Entrant):
    """An engine that is in memory for its own slices alone. ``load`` gives its timed call and what unloads it."""

    def __init__(self, name: str, load: Callable[[], Tuple[Callable[[], Any], Callable[[], None]]]) -> None:
        super().__init__(name, lambda: None)
        self.load = load
        self.warmup_runs = 0

    def warm_up(self, runs: int) -> None:
        """Remembers how often to warm up: a load takes that away."""
        self.warmup_runs = runs

    def run_slice(self, slice_ns: int) -> None:
        self.run, unload = self.load()
        try:
            super().warm_up(self.warmup_runs)
            super().run_slice(slice_ns)
        finally:
            self.run = lambda: None
            unload()


class Session:
    """Rounds over all entrants, until each has its evidence and none drifts, or patience is at its end."""

    def __init__(self, entrants: Sequence[Entrant], request: Dict[str, Any], progress: Progress) -> None:
        self.entrants = list(entrants)
        self.variants = [entrant for entrant in entrants if entrant.name != CANARY]
        self.canary = next(entrant for entrant in entrants if entrant.name == CANARY)
        self.request = request
        self.progress = progress
        self.order = random.Random(request["seed"])
        # Short sessions get shorter slices, not fewer rounds.
        self.slice_s = min(request["slice_s"], request["min_duration_s"] / MIN_ROUNDS)
        self.rounds = 0
        self.extensions = 0
        self.deadline_s = time.monotonic() + request["max_duration_s"]

    def run(self) -> None:
        for entrant in self.entrants:
            entrant.warm_up(self.request["warmup_runs"])
        while self.evidence(self.all_rounds()) < 1.0 and not self.timed_out():
            self._run_round()
        planned = self.rounds
        while self.doubts() and self.extensions < self.request["max_extensions"] and not self.timed_out():
            self.extensions += 1
            if self._disturbances():
                self._extend(planned, until_calm=True)
            else:
                self._extend(max(1, int(planned * EXTENSION_RATIO)))

    def _extend(self, rounds: int, until_calm: bool = False) -> None:
        for _ in range(rounds):
            self._run_round()
            if self.timed_out() or (until_calm and not self._disturbances()):
                return

    def _run_round(self) -> None:
        text = "round {}".format(self.rounds + 1)
        if self.extensions:
            text += ", extension {}: {}".format(self.extensions, "; ".join(self.doubts()))
        self.progress({"done": self.evidence(self.all_rounds()), "total": 1.0, "text": text})
        for entrant in self.order.sample(self.entrants, len(self.entrants)):
            entrant.run_slice(int(self.slice_s * 1e9))
        self.rounds += 1

    def all_rounds(self) -> List[int]:
        return list(range(self.rounds))

    def calm_rounds(self) -> List[int]:
        """Rounds that no other process disturbed: whose every slice had the CPU nearly to itself."""
        return [
            index
            for index in range(self.rounds)
            if max(entrant.slice_waiting_ratios[index] for entrant in self.entrants) <= MAX_WAITING_RATIO
        ]

    def counted_rounds(self) -> List[int]:
        """The calm rounds; all of them where the calm ones are too few, and the session is invalid anyway."""
        calm = self.calm_rounds()
        return calm if self.evidence(calm) >= 1.0 else self.all_rounds()

    def evidence(self, rounds: Sequence[int]) -> float:
        """Share of the evidence asked for that these rounds hold, by the variant that has the least."""
        shares = [len(rounds) / MIN_ROUNDS]
        for variant in self.variants:
            shares.append(variant.queries(rounds) / self.request["min_queries"])
            shares.append(variant.timed_ns(rounds) / (self.request["min_duration_s"] * 1e9))
        return float(min(1.0, min(shares)))

    def timed_out(self) -> bool:
        return bool(time.monotonic() >= self.deadline_s)

    def drift_ratio(self, entrant: Entrant) -> float:
        """Of a variant, against the canary; of the canary, by itself."""
        rounds = self.counted_rounds()
        canary = self.canary.medians_ns(rounds)
        if entrant is self.canary:
            return statistics.drift_ratio(canary)
        return statistics.drift_ratio(statistics.relative_medians(entrant.medians_ns(rounds), canary))

    def doubts(self) -> List[str]:
        """A sentence for each reason why the session so far is not valid."""
        return self._drifts() + self._disturbances() + self._shortfalls()

    def _drifts(self) -> List[str]:
        limit = self.request["max_drift_ratio"]
        template = "{} drifted by {:.1%}{}, first third to last (limit {:.1%})"
        found = []
        for variant in self.variants:
            drift = self.drift_ratio(variant)
            if drift > limit:
                found.append(template.format(variant.name, drift, " against the canary", limit))
        drift, limit = self.drift_ratio(self.canary), limit * MACHINE_DRIFT_FACTOR
        if drift > limit:
            found.append(template.format("the machine, by its canary,", drift, "", limit))
        return found

    def _disturbances(self) -> List[str]:
        if self.evidence(self.calm_rounds()) >= 1.0 or self.evidence(self.all_rounds()) < 1.0:
            return []
        return [
            "other processes held the CPU in {} of {} rounds, for more than {:.0%} of a slice: stop them, or "
            "run again later".format(self.rounds - len(self.calm_rounds()), self.rounds, MAX_WAITING_RATIO)
        ]

    def _shortfalls(self) -> List[str]:
        """What is missing for each variant when time ran out."""
        rounds = self.all_rounds()
        return [
            "{} has {} of {} queries and {:.1f} of {:.1f} s in the time there was: raise "
            "benchmark.timeout_s".format(
                variant.name,
                variant.queries(rounds),
                self.request["min_queries"],
                variant.timed_ns(rounds) / 1e9,
                self.request["min_duration_s"],
            )
            for variant in self.variants
            if variant.queries(rounds) < self.request["min_queries"]
            or variant.timed_ns(rounds) < self.request["min_duration_s"] * 1e9
        ]


def measure(entrants: Sequence[Entrant], request: Dict[str, Any], progress: Progress) -> Dict[str, Any]:
    """One session. The request's keys are those of the verb.

    Returns the path of the samples (per engine: latencies in ns and the round of each), drift by engine,
    ``reasons`` why the session is not valid (none when it is), and how it went.
    """
    session = Session(entrants, request, progress)
    _run_without_garbage_collection(session)
    counted = set(session.counted_rounds())
    return {
        "samples": _write_samples(session, request["work_dir"]),
        "drift_ratios": {entrant.name: session.drift_ratio(entrant) for entrant in session.entrants},
        "reasons": session.doubts(),
        "rounds": session.rounds,
        "excluded_rounds": [index for index in session.all_rounds() if index not in counted],
        "extensions": session.extensions,
        "slice_s": session.slice_s,
    }


def _run_without_garbage_collection(session: Session) -> None:
    gc.collect()
    gc.disable()
    try:
        session.run()
    finally:
        gc.enable()


def _write_samples(session: Session, work_dir: str) -> Dict[str, Any]:
    folder = outputs.outputs_folder(work_dir)
    path = os.path.join(folder, "samples-{}-{}.safetensors".format(os.getpid(), clock_ns()))
    with tensors.TensorWriter(path) as writer:
        for entrant in session.entrants:
            _write_column(writer, entrant.name + ".latency_ns", "I64", entrant.latencies_ns)
            _write_column(writer, entrant.name + ".round", "I32", _round_of_each_query(entrant))
    return {"path": path, "sha256": passport.file_sha256(path), "size_bytes": os.path.getsize(path)}


def _round_of_each_query(entrant: Entrant) -> "array.array[int]":
    column = array.array("i")
    for index, count in enumerate(entrant.slice_counts):
        column.extend([index] * count)
    return column


def _write_column(writer: tensors.TensorWriter, name: str, dtype: str, values: "array.array[int]") -> None:
    writer.add_bytes(name, dtype, [len(values)], statistics.little_endian(values))
