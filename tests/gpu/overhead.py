"""Verb of the GPU tests: what the latency scenario's loop adds to a query, against the same calls in a row."""

import statistics

from jetway.tasks.on_device import sessions
from jetway.tasks.on_device.latency import Entrant, clock_ns

ROUNDS = 20
SLICE_NS = 250_000_000


def run(request, progress):
    """Slices of both take turns, so that both meet the same clocks. Ratios are of means, times of medians."""
    session, inputs = sessions.opened_with_inputs(sessions.checked(request["entry"]))
    query = session.query(inputs)
    entrant = Entrant("timed", query)
    entrant.warm_up(200)
    ratios = []
    for _ in range(ROUNDS):
        first = len(entrant.latencies_ns)
        entrant.run_slice(SLICE_NS)
        timed = entrant.latencies_ns[first:]
        ratios.append(statistics.mean(timed) / plain_ns(query, len(timed)))
    p50_ms = statistics.median(entrant.latencies_ns) / 1e6
    session.close()
    return {
        "p50_ms": p50_ms,
        "overhead_ratio": statistics.median(ratios) - 1,
        "queries": len(entrant.latencies_ns),
    }


def plain_ns(query, count):
    """Mean time of a query when nothing is between two of them."""
    for _ in range(count // 10):
        query()
    started_ns = clock_ns()
    for _ in range(count):
        query()
    return (clock_ns() - started_ns) / count
