"""The document that `traceserve bench` writes, from its parts to the whole. Times are in milliseconds where named so."""

from __future__ import annotations

from typing import Dict, List, Optional, TypedDict


class Load(TypedDict):
    """The load of a measurement: connections that each send again once answered, or requests per second."""

    connections: int
    rate: Optional[float]


class ServerFigures(TypedDict):
    """A traceserve server's own figures: the means of a request's parts, tokens and padding; and its products, if known."""

    requests: int
    # Of a request, by part; None with continuous_batching, where TorchServe counts its times once per round.
    time_ms: Optional[Dict[str, float]]
    tokens: float
    padding_share: float
    operations: Optional[float]  # of a request's products


class Figures(Load):
    """One measurement, or the medians of several; latencies by percentile."""

    most_connections: int
    seconds: float
    requests: int
    throughput: float
    latency_ms: Dict[str, float]
    curve_ms: List[List[float]]  # percentile and latency
    errors: Dict[str, int]
    retried: int  # requests that were answered when they were sent again
    generator_cpu: float
    server: Optional[ServerFigures]


class Measurement(Figures):
    """One measurement of a subject."""

    subject: str


class Summary(Figures):
    """The medians of a subject's rounds at one load; errors and retried requests are summed."""

    subject: str
    throughput_range: List[float]


class Ratio(Load):
    """The first subject's medians divided by the second's."""

    throughput: float
    latency: Dict[str, float]


class Machine(TypedDict):
    """The machine facts that figures depend on."""

    processor: str
    cores: int
    system: str
    python: str


class Samples(TypedDict):
    """The file of the samples, and how many bodies it gave."""

    file: str
    bodies: int


class PlanFacts(TypedDict):
    """What was asked for."""

    loop: str
    connections: List[int]
    rate: Optional[float]
    seconds: float
    warm_up: float
    rounds: int
    seed: int
    retries: int
    check: bool


class Peak(TypedDict):
    """What this machine can compute at most: products of matrices of the archive's dtype, measured."""

    dtype: str
    operations_per_second: float


class BenchDocument(TypedDict):
    """The whole document."""

    traceserve: str
    date: str
    machine: Machine
    samples: Samples
    plan: PlanFacts
    subjects: List[str]
    peaks: Dict[str, Peak]  # by subject, of those whose arithmetic is known
    summary: List[Summary]
    ratios: List[Ratio]
    measurements: List[Measurement]
