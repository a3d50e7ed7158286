"""Stages 3 and 5: the times of what was right, one kernel at a time, with its floor and their ratio.

Every call has the same inputs, so that those that fit in the L2 cache are read from there. The floor is the
time of the least bytes at the measured rate of copies or of the least operations at that of products,
whichever is longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from .lines import TIMED_KERNEL, TIMED_TILE, environment_of, read_lines
from .smoke import add_options, cases_of, key_of
from .workers import NOT_RUN, RIGHT, Work

ORDER = ("aligned", "few", "odd")  # what matters most comes first


def _key(options: argparse.Namespace) -> str:
    return TIMED_TILE if options.tiles else TIMED_KERNEL


def _names(options: argparse.Namespace) -> list[str]:
    """Return the cases that were right: 16-bit ones first, aligned before odd."""
    key = key_of(options)
    right = {line[key] for line in read_lines(options.results, key) if line["status"] == RIGHT}
    found = [case for name, case in cases_of(options).items() if name in right]
    found.sort(key=lambda case: (ORDER.index(case.shape_name), case.dtype == "fp32"))
    return [case.name for case in found]


def _prepare(options: argparse.Namespace) -> Callable[[str], tuple[dict[str, Any], str | None]]:
    from .stand_in import place_of

    place, found = place_of(options.rehearse), cases_of(options)
    ceilings = environment_of(options.results)
    return lambda name: timed_line(found[name], place, ceilings)


def timed_line(case: Any, place: Any, ceilings: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the line with a case's time, and why the process cannot continue, if so."""
    from embkern.experiments.timing import quantiles

    from ...machine import first_line

    line: dict[str, Any] = {}
    try:
        problem = case.problem(place)
        times, timer = place.time(problem.timed or problem.call)
        figures = quantiles(times)
        line.update(p50=figures["median"], p20=figures["p20"], p80=figures["p80"], timer=timer)
        floor = floor_of(problem.least_bytes, problem.least_flops, case.dtype, ceilings)
        if floor is not None:
            line.update(floor=round(floor, 3), ratio=round(figures["median"] / floor, 2))
    except Exception as error:  # a failed timing does not affect the others
        return {"status": NOT_RUN, "why": first_line(error)}, place.lost()
    place.release()
    return line, None


def floor_of(least_bytes: float, least_flops: float, dtype: str, ceilings: dict[str, Any]) -> float | None:
    """Return microseconds; None where the ceilings were not measured."""
    products = ceilings.get("gflops")
    if not products:
        return None
    product = products.get(dtype) or products["fp32"]
    return max(least_bytes / ceilings["copy_gbps"], least_flops / product) / 1e3


WORK = Work(
    module="timings",
    description=__doc__,
    key=_key,
    names=_names,
    prepare=_prepare,
    options=add_options,
)

if __name__ == "__main__":
    sys.exit(WORK.main(sys.argv[1:]))
