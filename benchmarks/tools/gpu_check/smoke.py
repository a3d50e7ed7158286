"""Stages 1 and 5: every kernel at every shape and dtype, and kernels with other tiles, against float64.

A kernel is right if its error against float64 is at most twice plain torch's (or one rounding of the result),
a second call gives the same bits, and a CUDA graph replayed on other inputs gives the result of a call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

from .lines import KERNEL, TILE
from .workers import NOT_RUN, RIGHT, WRONG, Work

PROCESSES = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the choice of cases."""
    parser.add_argument("--tiles", action="store_true", help="the hand-picked tiles of stage 5")


def key_of(options: argparse.Namespace) -> str:
    """Return the key of the lines of these cases."""
    return TILE if options.tiles else KERNEL


def cases_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the cases by name: those that need no compilation first, odd shapes last."""
    from .kernels import cases
    from .stand_in import place_of
    from .tiles import tile_cases

    place = place_of(options.rehearse)
    found = list((tile_cases if options.tiles else cases)(place))
    found.sort(key=lambda case: (case.kernel.backend == "triton", case.shape_name == "odd"))
    return {case.name: case for case in found}


def _prepare(options: argparse.Namespace) -> Callable[[str], tuple[dict[str, Any], str | None]]:
    from .stand_in import place_of

    place, found = place_of(options.rehearse), cases_of(options)
    return lambda name: judged_line(found[name], place)


def facts_of(case: Any) -> dict[str, str]:
    """Return the columns of the table that a case belongs to."""
    kernel = f"{case.kernel.backend} {case.kernel.name}"
    return {"kernel_name": kernel, "dtype": case.dtype, "shape": str(case.shape)}


def judged_line(case: Any, place: Any) -> tuple[dict[str, Any], str | None]:
    """Return the line of one case, and why the process cannot continue, if so."""
    line: dict[str, Any] = facts_of(case)
    lost = None
    if reason := place.unavailable(case.kernel.op, case.kernel.backend):
        return {**line, "status": NOT_RUN, "why": reason}, None
    from .place import deterministic

    try:
        with deterministic():
            faults = judge(case, place, line)
    except Exception as error:  # a failing kernel does not stop the checks of the others
        from ...machine import first_line

        faults, lost = [first_line(error)], place.lost()
    if faults:
        line.update(status=WRONG, why="; ".join(faults))
    if not lost:
        place.release()
    return {"status": RIGHT, **line}, lost


def judge(case: Any, place: Any, line: dict[str, Any]) -> list[str]:
    """Return the faults of a kernel; the figures are added to ``line``."""
    import torch

    from ...runner import DTYPES, relative_error
    from .place import poisoned

    problem, dtype = case.problem(place), DTYPES[case.dtype]
    with poisoned():
        first = problem.call()
        place.synchronize()
    results = [each.clone() for each in first]
    faults, worst = [], 0.0
    for index, (got, native, exact) in enumerate(
        zip(results, problem.plain(dtype), problem.plain(torch.float64), strict=True)
    ):
        if got.shape != exact.shape or got.dtype != native.dtype:
            faults.append(f"result {index}: {got.dtype} {tuple(got.shape)} in place of {tuple(exact.shape)}")
        elif exact.numel():
            error, theirs = relative_error(got, exact), relative_error(native, exact)
            rounding = torch.finfo(got.dtype).eps / 2  # on few values plain torch may be more exact by chance
            allowed = max(2 * theirs, rounding) + problem.tiny
            worst = max(worst, error / allowed)
            if not error <= allowed:
                faults.append(f"result {index}: error {error:.1e}, plain torch's is {theirs:.1e}")
    line["error_over_allowed"] = round(worst, 3)
    again = problem.call()
    place.synchronize()
    if not _equal(results, again):
        faults.append("a second call gave other bits")
    other = case.problem(place, seed=1)
    replayed = place.replay(problem.call, lambda: problem.change(other))
    if not _equal(replayed, problem.call()):
        faults.append(f"the {place.replays} gave other bits than a call")
    if _equal(results, replayed):
        faults.append(f"the {place.replays} did not read the new inputs")
    line["replayed_by"] = place.replays
    return faults


def _equal(some: Iterable[Any], others: Iterable[Any]) -> bool:
    import torch

    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


WORK = Work(
    module="smoke",
    description=__doc__,
    key=key_of,
    names=lambda options: list(cases_of(options)),
    prepare=_prepare,
    processes=PROCESSES,
    options=add_options,
)

if __name__ == "__main__":
    sys.exit(WORK.main(sys.argv[1:]))
