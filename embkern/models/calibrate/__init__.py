"""Calibrate a model: measure how its output depends on its embedding table, on text or on its own samples."""

from .calibrate import calibrate, check_calibration, weights_fingerprint
from .kinds import kind_of
from .sampling import CalibrationTooLongError, self_calibrate

__all__ = [
    "CalibrationTooLongError",
    "calibrate",
    "check_calibration",
    "kind_of",
    "self_calibrate",
    "weights_fingerprint",
]
