"""Intervals of rates and one paired test, for reports of how often something was right.

A rate is `accepted` of `n`. Intervals are 95 % and two-sided.

It does not know what was counted.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from scipy.stats import binomtest

CONFIDENCE = 0.95


def rate(accepted: int, n: int) -> dict[str, Any]:
    """{"n", "accepted", "rate", "interval": [low, high]}, the interval being Wilson's (1927, doi:10.2307/2276774).

    Rate and interval are None for n = 0. Raises ValueError unless 0 <= accepted <= n.
    """
    if not 0 <= accepted <= n:
        raise ValueError(f"a rate needs 0 <= accepted <= n, got {accepted} of {n}")
    if not n:
        return {"n": 0, "accepted": 0, "rate": None, "interval": None}
    low, high = binomtest(accepted, n).proportion_ci(CONFIDENCE, method="wilson")
    return {"n": n, "accepted": accepted, "rate": accepted / n, "interval": [float(low), float(high)]}


def mean_rate(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"rate", "interval"} of the plain mean of independent rates (each as `rate` gives it).

    The interval is put together from the distances between each rate and the ends of its own interval, squared and
    summed (MOVER: Zou 2008, doi:10.1002/sim.3095). Unlike a normal approximation it has a width where all is right.
    Raises ValueError for no rates, or one over nothing.
    """
    if not rates or any(not entry["n"] for entry in rates):
        raise ValueError(f"a mean rate needs rates of n >= 1 each, got n = {[entry['n'] for entry in rates]}")
    count, mean = len(rates), sum(entry["rate"] for entry in rates) / len(rates)
    below = sqrt(sum((entry["rate"] - entry["interval"][0]) ** 2 for entry in rates)) / count
    above = sqrt(sum((entry["interval"][1] - entry["rate"]) ** 2 for entry in rates)) / count
    return {"rate": mean, "interval": [mean - below, mean + above]}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """McNemar's exact test (1947, doi:10.1007/BF02295996) of two answers to each question, True where right.

    -> {"n", "gained": wrong then right, "lost": right then wrong, "p": two-sided, "errors_removed": the share of the
    first's errors that the second has fewer, None where the first has none}. Raises ValueError for unequal lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"McNemar's test pairs two answers to each question, got {len(first)} and {len(second)}")
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    errors = len(first) - sum(map(bool, first))
    p = float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    removed = (gained - lost) / errors if errors else None
    return {"n": len(first), "gained": gained, "lost": lost, "p": p, "errors_removed": removed}
