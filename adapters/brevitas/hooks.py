"""What of Brevitas is touched, and the check that it is still there.

- Export handlers are registered with the managers of its exports. A manager matches the class of a proxy exactly; for
  an unknown one it warns, then fails with "'NoneType' object is not callable" (0.13.4).
- `calibration_mode.__enter__` and `__exit__` get a wrapper that follows channel axes from layer to layer, and starts
  the predictions of QPP.
"""

from __future__ import annotations

import functools
from typing import Any

import brevitas
from brevitas.export.inference.manager import InferenceManager
from brevitas.export.onnx.qonnx.manager import QONNXManager
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager
from brevitas.export.torch.qcdq.manager import TorchQCDQManager
from brevitas.graph import calibrate

from dqa_plugins.errors import FrameworkMismatch

from .handlers import PluginInferenceHandler, QCDQHandler, QONNXHandler, TorchQCDQHandler
from .naming import AxisTracker
from .predict import start

TESTED = "0.13"
MARK = "__dqa_plugins_hook__"

# The dynamo managers inherit the lists of these.
_HANDLERS = {
    InferenceManager: PluginInferenceHandler,
    StdQCDQONNXManager: QCDQHandler,
    QONNXManager: QONNXHandler,
    TorchQCDQManager: TorchQCDQHandler,
}


def check_version() -> None:
    """Raise unless this is a Brevitas that the adapter was tested with.

    Raises:
        FrameworkMismatch: it is not.
    """
    version = str(brevitas.__version__)
    if version.split(".")[:2] != TESTED.split("."):
        raise FrameworkMismatch(
            f"the Brevitas adapter stands on internals of brevitas {TESTED}.x; found {version}. "
            f"pip install 'brevitas=={TESTED}.*'."
        )
    for name in ("__enter__", "__exit__"):
        if not callable(getattr(getattr(calibrate, "calibration_mode", None), name, None)):
            raise FrameworkMismatch(f"brevitas.graph.calibrate.calibration_mode.{name} is gone in brevitas {version}.")
    code = getattr(getattr(calibrate, "finalize_collect_stats", None), "__code__", None)
    if code is None or "init_scale" not in code.co_names:
        raise FrameworkMismatch(
            f"brevitas {version} no longer calls init_scale when calibration_mode is left: nothing would tell our "
            "quantizers that calibration is over."
        )


def install() -> None:
    """Register the handlers and wrap calibration_mode; a second call changes nothing.

    Raises:
        FrameworkMismatch: another version of Brevitas, or a hook is gone.
    """
    check_version()
    for manager, handler in _HANDLERS.items():
        if handler not in manager.handlers:
            manager.handlers.append(handler)
    mode = calibrate.calibration_mode
    if getattr(mode.__enter__, MARK, False):
        return
    enter, leave = mode.__enter__, mode.__exit__

    @functools.wraps(enter)
    def __enter__(self: Any) -> Any:
        result = enter(self)
        self._dqa_axes = AxisTracker() if self.enabled else None
        if self._dqa_axes is not None:
            self._dqa_axes.__enter__()
        self._dqa_predicted = start(self.model) if self.enabled else None
        return result

    @functools.wraps(leave)
    def __exit__(self: Any, *error: Any) -> Any:
        if self._dqa_axes is not None:
            self._dqa_axes.__exit__(*error)
        if self._dqa_predicted is not None:
            self._dqa_predicted.leave(interrupted=error[0] is not None)
        return leave(self, *error)

    setattr(__enter__, MARK, True)
    mode.__enter__, mode.__exit__ = __enter__, __exit__
