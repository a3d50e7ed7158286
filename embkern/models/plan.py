"""The plan of a compression: which tables of a model, at which size, and what is known of their rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import METHODS
from ..methods.base import check_table
from ..methods.calibration import Calibration
from ..methods.metric_allocation import calibration_of_head
from ..methods.shared_core import shared_tensor_trains
from ..recipe import Recipe
from ..tables import Table
from ..text.prior import normalized, vocabulary_prior
from .find_table import ModelTable, find_table, input_or_none
from .select_tables import find_tables
from .static_embeddings import check_bag, find_bag, is_static
from .swap import check_installable
from .table_parts import CORE_OF

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_CALIBRATED = "none, as it measures the input table and an output head over the same tokens only"


class Knowledge(NamedTuple):
    """What is known of the rows of a table.

    Attributes:
        frequencies: how often each row is read, or predicted by a head, (rows,) float64; None for not known.
        read: which rows a text reads, (rows,) bool; None for not known.
        calibration: what the model's output depends on, in place of the input table's; None without one.
    """

    frequencies: Tensor | None
    calibration: Calibration | None
    read: Tensor | None = None


@dataclass
class TablePlan:
    """How a table of a model is compressed.

    Attributes:
        table: where it is.
        recipe: the recipe with the ratio of this table.
        of_tokens: whether the table has a row per token, as those of positions do not.
        calibrated: whether a calibration of the model measures this table.
        partners: the plans of all tables that share a central core, this one among them.
    """

    table: ModelTable
    recipe: Recipe
    of_tokens: bool
    calibrated: bool
    partners: list[TablePlan] = field(default_factory=list)
    made: Table | None = None  # with the partners, before it is asked for

    def knowledge(
        self, frequencies: Tensor | None, calibration: Calibration | None, read: Tensor | None = None
    ) -> Knowledge:
        """Return what token frequencies and a calibration of the model say about this table.

        Args:
            frequencies: relative frequencies (V,) of the tokens; None takes those of the calibration, or
                without one an estimate from the order of the ids.
            calibration: that of the model, or None.
            read: which tokens (V,) a text has, or None.

        Raises:
            ValueError: the recipe leaves out rows that are not read, and nothing tells which these are.
        """
        check_unseen([self], known=read is not None)
        V = len(self.table.weight)
        if read is not None:
            read = F.pad(read, (0, max(0, V - len(read))))[:V].repeat_interleave(self.table.segments)
        own = calibration if self.calibrated and self.recipe.calibrated else None
        if own is not None and self.table.role == "head":
            if own.head_moment is not None:
                return Knowledge(*calibration_of_head(own, frequencies), read)
            own = None
        if not self.of_tokens:
            return Knowledge(None, own)
        if frequencies is None and own is not None:
            return Knowledge(None, own, read)
        if frequencies is None:
            frequencies = vocabulary_prior(None, V)
        elif len(frequencies) != V:
            frequencies = normalized(F.pad(frequencies, (0, max(0, V - len(frequencies))))[:V])
        return Knowledge(frequencies.repeat_interleave(self.table.segments), own, read)

    def compress(self, known: Knowledge, **run: Any) -> Table:
        """Return the compressed rows of the table.

        Args:
            known: what ``knowledge`` returned.
            run: further arguments of the method (``progress``, ``checkpoint``, ...).

        Raises:
            ValueError: the ratio cannot be reached, or an option is wrong; the message names the table unless
                it is that of the input.
        """
        if self.partners:
            if self.made is None:
                compress_together(self.partners)
            made, self.made = self.made, None
            assert made is not None
            return made
        try:
            return self.recipe.factorize(
                self.table.rows,
                known.frequencies,
                read=known.read,
                calibration=known.calibration,
                tied=self.table.tied,
                **run,
            )
        except ValueError as error:
            raise self.named(error) from None

    def check(self) -> None:
        """Raise ValueError unless the table can be compressed by the recipe and used by the model."""
        check_installable(self.table, self.recipe)
        try:
            check_table(self.table.rows)
        except ValueError as error:
            raise self.named(error) from None

    def named(self, error: ValueError) -> ValueError:
        """Return an error that names the table unless it is the input table."""
        return error if self.table.role in ("input", "bag") else ValueError(f"{self.table.root}: {error}")


def plan_tables(model: PreTrainedModel, recipe: Recipe) -> list[TablePlan]:
    """Return the plans of the tables that a recipe selects, by default of the input table.

    Raises:
        UnsupportedModelError: a table cannot be replaced, or a name in the recipe selects none.
        ValueError: a table is not finite.
    """
    if is_static(model):
        check_bag(recipe)
        plans = [TablePlan(find_bag(model), recipe, True, False)]
    elif recipe.tables is None:
        plans = [TablePlan(find_table(model), recipe, True, True)]
    else:
        sizes, own = _vocabularies(model), getattr(input_or_none(model), "weight", None)
        plans = [
            TablePlan(
                table,
                recipe.with_ratio(ratio),
                of_tokens=table.role != "other" or len(table.weight) in sizes,
                calibrated=table.role != "other" and own is not None and table.weight.shape == own.shape,
            )
            for table, ratio in find_tables(model, recipe.tables)
        ]
        if not plans[0].recipe.makes_packed_tables:
            for plan in plans:
                plan.table.segments = 1
    options = METHODS[recipe.method].options(**recipe.options)
    for plan in plans:
        if not plan.of_tokens:
            plan.recipe = plan.recipe.for_all_rows()
        plan.check()
        if len(plans) > 1 and getattr(options, "share_core", False):
            plan.partners = plans
    return plans


def compress_together(plans: list[TablePlan]) -> None:
    """Compress tables with one central core; each plan then has its table, and all but one name its owner."""
    ratios = [float(plan.recipe.ratio or 1) for plan in plans]
    tables = shared_tensor_trains(
        [plan.table.rows for plan in plans], ratio=ratios, **plans[0].recipe.options
    )
    for plan, table in zip(plans, tables, strict=True):
        owned = {} if plan is plans[0] else {CORE_OF: plans[0].table.root}
        plan.made = dataclasses.replace(table, facts={**table.facts, **owned}, check=False)


def _vocabularies(model: PreTrainedModel) -> set[int]:
    """Return the numbers of rows that tables with a row per token have."""
    config, own = model.config.get_text_config(), input_or_none(model)
    sizes = {getattr(config, name, None) for name in ("vocab_size", "vocab_size_per_layer_input")}
    return {size for size in (*sizes, getattr(own, "num_embeddings", None)) if size}


def tokens_read(
    read: Tensor | None, calibration: Calibration | None, model: PreTrainedModel
) -> Tensor | None:
    """Return which tokens are read, (V,) bool, with those that a model's config names, as for padding.

    Args:
        read: those that a text has, (V,) bool; None takes those that the calibration read, if all was text:
            the model's own samples do not tell what will be read.
        calibration: what was read to measure the model; None without one.
        model: the model.

    Returns:
        None if nothing tells which tokens are read.
    """
    if read is None and calibration is not None and calibration.on_text:
        read = calibration.inputs > 0
    config = getattr(model, "config", None)
    if read is None or config is None:
        return read
    text = config.get_text_config()
    named = [value for name, value in text.to_dict().items() if name.endswith("_token_id")]
    ids = [each for value in named for each in (value if isinstance(value, list) else [value])]
    own = torch.tensor(
        [each for each in ids if type(each) is int and 0 <= each < len(read)], dtype=torch.int64
    )
    return read.index_fill(0, own, True)


def check_unseen(plans: list[TablePlan], *, known: bool) -> None:
    """Raise ValueError if a recipe leaves out the tokens that are not read, and it is not known which are."""
    for plan in plans:
        if not known and plan.of_tokens and plan.recipe.leaves_rows_out:
            raise ValueError(
                f"unseen: expected counts of text (count_text, counts) or a calibration on text with "
                f"{plan.recipe.options['unseen']!r}, from which rows follow that are not read, got neither"
            )


def calibration_serves(plans: list[TablePlan], *, asked: bool) -> bool:
    """Return whether a calibration of the model serves one of the plans.

    Raises:
        ValueError: it serves none, and was asked for.
    """
    serves = any(plan.calibrated for plan in plans)
    if asked and not serves:
        raise ValueError(f"calibration: expected none: {NOT_CALIBRATED}")
    return serves


def token_rows(model: PreTrainedModel, plans: list[TablePlan]) -> int:
    """Return the number of tokens of a model: the rows of the input table, or else of a planned one."""
    own = getattr(input_or_none(model), "num_embeddings", None)
    return own or max((len(plan.table.weight) for plan in plans if plan.of_tokens), default=1)
