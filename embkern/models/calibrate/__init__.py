"""Calibrate a model: measure how its output depends on its embedding table, on text or on its own samples."""

from .kinds import kind_of
from .on_samples import CalibrationTooLongError, self_calibrate
from .on_text import calibrate, check_calibration, weights_fingerprint

__all__ = [
    "CalibrationTooLongError",
    "calibrate",
    "check_calibration",
    "kind_of",
    "self_calibrate",
    "weights_fingerprint",
]
