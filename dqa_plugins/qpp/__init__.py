"""QPP: quantization parameters predicted per sample from the network's input."""

from .bus import Bus, connect
from .fit import fit
from .predictor import Predictor

__all__ = ["Bus", "Predictor", "connect", "fit"]
