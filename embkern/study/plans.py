"""Which rows a study has, and what each of them depends on."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

from ..evaluate.language_model import no_perplexity
from ..experiments.dependencies import frequencies_code, method_code, model_fingerprint, text_fingerprint
from ..experiments.engine import key_of
from ..methods import METHODS
from .measures import MEASURES
from .rows import DENSE
from .spec import StudyOptions
from .subject import Subject


@dataclass(frozen=True)
class Plan:
    """A row to be measured.

    Attributes:
        measure: a name in ``MEASURES``.
        method: as the user wrote it, such as ``svd:center=true``; ``dense`` for the dense model.
        ratio: bytes of the table over bytes of what replaces it, as asked for.
        depends: everything the result follows from; the row's id is its hash.
    """

    measure: str
    method: str
    ratio: float | None
    depends: dict[str, Any]

    @functools.cached_property
    def id(self) -> str:
        """12 hexadecimal digits, the same for the same dependencies."""
        return key_of(self.depends)


def plan_rows(options: StudyOptions, subject: Subject) -> list[Plan]:
    """Return the rows of a study in the order in which they are measured."""
    common = {
        "model": model_fingerprint(options.model, getattr(subject.model.config, "_commit_hash", None)),
        "counts": [text_fingerprint(each) for each in (options.counts, *options.count_text) if each],
        "seed": options.seed,
        "device": subject.weight.device.type,
    }
    # What each requested measure depends on besides the model and the method.
    inputs: dict[str, dict[str, Any]] = {"model": {}, "table": {}, "lookup": {}}
    if subject.tied:
        inputs["head"] = {}
    inputs["neighbors"] = {"words": subject.words}
    if options.text is not None:
        inputs["sentences"] = {"text": text_fingerprint(options.text)}
    if options.dataset is not None:
        inputs["perplexity"] = {"dataset": text_fingerprint(options.dataset), "protocol": options.protocol}
    if options.keep_models:
        inputs["saved"] = {}

    def plan(measure: str, method: str, ratio: float | None, made_by: dict[str, Any]) -> Plan:
        code = {"code_of_measure": MEASURES[measure].code(), "code_of_frequencies": frequencies_code()}
        return Plan(
            measure, method, ratio, {"measure": measure, **made_by, **inputs[measure], **common, **code}
        )

    plans = [
        plan(name, DENSE, None, {"method": DENSE})
        for name, measure in MEASURES.items()
        if name in inputs and measure.of_dense is not None
    ]
    if no_perplexity(subject.model):
        inputs.pop("perplexity", None)  # the dense model's row gives the reason
    for spec, ratio in itertools.product(options.specs(), options.ratios):
        made_by: dict[str, Any] = {
            "method": spec.name,
            "options": spec.options,
            "ratio": ratio,
            "code_of_method": method_code(spec.name),
        }
        if options.fisher is not None and METHODS[spec.name].of_fisher is not None:
            made_by["fisher"] = text_fingerprint(options.fisher)
        plans += [
            plan(name, spec.text, ratio, made_by)
            for name, measure in MEASURES.items()
            if name in inputs and measure.of_candidate is not None
        ]
    return plans
