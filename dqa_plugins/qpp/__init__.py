"""QPP: quantization parameters predicted per sample from the network's input."""

from dqa_plugins.source import install_source

from .connect import connect, link
from .fit import fit
from .predictor import Predictor
from .report import QPPReport, qpp_report
from .session import Forwards, Session

install_source("predicted", Predictor)

__all__ = ["Forwards", "Predictor", "QPPReport", "Session", "connect", "fit", "link", "qpp_report"]
