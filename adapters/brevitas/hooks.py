"""What of Brevitas is touched; `host.hooks` checks that it is still there.

- Export handlers are registered with the managers of its exports. A manager matches the class of a proxy exactly; for
  an unknown one it warns, then fails with "'NoneType' object is not callable" (0.13.4).
- `calibration_mode.__enter__` and `__exit__` get a wrapper that follows channel axes from layer to layer, and starts
  the predictions of QPP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brevitas
from brevitas.export.inference.manager import InferenceManager
from brevitas.export.onnx.qonnx.manager import QONNXManager
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager
from brevitas.export.torch.qcdq.manager import TorchQCDQManager
from brevitas.graph import calibrate

from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.host import hooks
from dqa_plugins.host.hooks import Hook, Host, check_version, require

from .handlers import PluginInferenceHandler, QCDQHandler, QONNXHandler, TorchQCDQHandler
from .names import AxisTracker
from .predict import start

TESTED = "0.13.4"

# The dynamo managers inherit the lists of these.
_HANDLERS = {
    InferenceManager: PluginInferenceHandler,
    StdQCDQONNXManager: QCDQHandler,
    QONNXManager: QONNXHandler,
    TorchQCDQManager: TorchQCDQHandler,
}


def _enter_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def __enter__(self: Any) -> Any:
        result = original(self)
        self._dqa_axes = AxisTracker() if self.enabled else None
        if self._dqa_axes is not None:
            self._dqa_axes.__enter__()
        self._dqa_predicted = start(self.model) if self.enabled else None
        return result

    return __enter__


def _exit_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def __exit__(self: Any, *error: Any) -> Any:
        # a mode that was entered before this room was imported has neither
        axes, predicted = getattr(self, "_dqa_axes", None), getattr(self, "_dqa_predicted", None)
        if axes is not None:
            axes.__exit__(*error)
        if predicted is not None:
            predicted.leave(interrupted=error[0] is not None)
        return original(self, *error)

    return __exit__


def install() -> None:
    """Register the handlers and wrap calibration_mode; a second call changes nothing.

    Raises:
        FrameworkMismatch: another version of Brevitas, or a hook is gone.
    """
    host = Host("brevitas", str(brevitas.__version__), TESTED, "Brevitas", "use another adapter")
    check_version(host, strict=True)
    mode: Any = require(calibrate, "calibration_mode", host)
    finalize: Any = require(calibrate, "finalize_collect_stats", host, ("module",))
    if "init_scale" not in finalize.__code__.co_names:
        raise FrameworkMismatch(
            f"brevitas {host.version} no longer calls init_scale when calibration_mode is left: nothing would tell our "
            f"quantizers that calibration is over. {host.way_out}."
        )
    wrapped = [
        Hook(mode, "__enter__", ("self",), _enter_hook),
        Hook(mode, "__exit__", ("self", "type", "value", "traceback"), _exit_hook),
    ]
    hooks.install(wrapped, host, strict=True)
    for manager, handler in _HANDLERS.items():
        if handler not in manager.handlers:
            manager.handlers.append(handler)
