"""Typed errors and warnings: each names the layer, the value and the way out.

Every error derives from `DQAError` and from the built-in that a caller would guess (ValueError, TypeError or
RuntimeError), so that both `except DQAError` and `except ValueError` work.
"""

from __future__ import annotations


class DQAError(Exception):
    """Base class of every error that this package raises on purpose."""


class InvalidMethod(DQAError, ValueError):
    """A field of a method has a value that the method cannot have (bits outside 2..8, extra_bits > bits, ...)."""


class InvalidArgument(DQAError, ValueError):
    """An argument of a call is wrong in itself: out of range, an unknown name, nothing where something is due."""


class NotAMethod(DQAError, TypeError):
    """Something other than Direct, DQA, NoisyQuant or DenseSparse was given where a method is expected."""


class UnsupportedCombination(DQAError, ValueError):
    """Each part is valid, but not together, or not in this framework."""


class UncalibratedQuantizer(DQAError, RuntimeError):
    """A quantizer was frozen, converted or run without having seen calibration data."""


class NonFiniteInput(DQAError, ValueError):
    """NaN or Inf reached a quantizer that observes."""


class UnsupportedInput(DQAError, TypeError):
    """A quantizer was fed something other than a floating-point tensor with a batch axis."""


class ChannelAxisError(DQAError, ValueError):
    """The channel axis does not exist in the tensor at hand, or is the batch axis."""


class ChannelMismatch(DQAError, ValueError):
    """The tensor at hand has another number of channels than the quantizer, the table or the vector."""


class DuplicateSites(DQAError, RuntimeError):
    """Two quantizers of a model have one name."""


class InvalidTarget(DQAError, ValueError):
    """A target is no class that the model has scores for."""


class StateMismatch(DQAError, ValueError):
    """A state_dict belongs to a quantizer with another method."""


class MissingDependency(DQAError, ImportError, RuntimeError):
    """An optional package is not installed; the message names the extra which brings it."""


class FrameworkMismatch(DQAError, RuntimeError):
    """The host framework lacks, or has changed, a hook that an adapter stands on."""


class RankLost(DQAError, RuntimeError):
    """Another process of the group has died, raised, or did not answer within the group's timeout."""


class RanksDiffer(DQAError, ValueError):
    """Processes that must agree hold different models, data or counts."""


class ExportFailed(DQAError, RuntimeError):
    """A model cannot be exported the way that was asked for."""


class DQAWarning(UserWarning):
    """Base class of the warnings that a user should act on."""


def missing(package: str, extra: str, purpose: str) -> MissingDependency:
    """The error for an optional dependency that is not installed.

    Args:
        package: the import name that failed.
        extra: the extra of dqa-plugins that brings it.
        purpose: what needs it, as the subject of the sentence.
    """
    # no index has dqa-plugins: pip install 'dqa-plugins[...]' would find nothing, or somebody else's package
    return MissingDependency(
        f"{purpose} needs '{package}', which is not installed. In a checkout of dqa-plugins: "
        f"pip install -e '.[{extra}]'; with a wheel: pip install 'WHEEL[{extra}]', WHEEL being the path of the file."
    )
