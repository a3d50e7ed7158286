"""A study: several methods at several ratios, a cached row per measurement, and one report.

A row is a file of its own, named by a hash of what it depends on. A study that was interrupted resumes with
the rows that are missing, and one with another ratio or method measures what is new.
"""

from .comparison import compare, compare_row
from .result import Study
from .rows import Row
from .spec import StudyOptions
from .verdict import verdicts_of

__all__ = ["Row", "Study", "StudyOptions", "compare", "compare_row", "verdicts_of"]
