"""Which tensors' features each predicted quantizer of a model reads, and whose summaries."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dqa_plugins.errors import InvalidMethod
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.sites import iter_quantizers

from .augment import augmentation
from .session import INPUT, Forwards, Listener

HISTORY = 3  # quantized tensors before, whose summaries the extended mode reads


def resolve_site(wanted: str, names: Sequence[str], inputs: int) -> list[str]:
    """The sites that one entry of QPP(sites=...) names.

    Args:
        wanted: "input", "input.<k>", a quantized site, or a module with quantized sites inside.
        names: of the quantized sites, in order of execution.
        inputs: how many inputs of the model can be read without a quantizer on them.

    Raises:
        InvalidMethod: nothing matches.
    """
    if wanted == INPUT and (inputs or f"{INPUT}.0" in names):
        return [f"{INPUT}.0"]
    if wanted in names or (wanted.startswith(INPUT + ".") and wanted[6:].isdigit() and int(wanted[6:]) < inputs):
        return [wanted]
    inside = [name for name in names if name.startswith(wanted + ".")]
    if not inside:
        known = [*([INPUT] if inputs else []), *names]
        raise InvalidMethod(
            f"QPP(sites=...): '{wanted}' is no quantized site, and no module that contains one. Sites are "
            f"{', '.join(map(repr, known[:12]))}{', ...' if len(known) > 12 else ''}."
        )
    return [inside[-1]]


def connect(quantizers: Sequence[ActivationQuantizer], inputs: int = 1) -> Forwards | None:
    """Tell the predicted quantizers of a model which site and whose summaries they read.

    Args:
        quantizers: all of the model, named, in order of execution, in the observe state.
        inputs: how many inputs of the model can be read without a quantizer on them.

    Returns:
        the sessions of calibration, to be attached to the model; None if no quantizer of the model is predicted.

    Raises:
        InvalidMethod: a site's name matches nothing.
    """
    predicted = [q for q in quantizers if q.method.source == "predicted"]
    if not predicted:
        return None
    names = [q.name for q in quantizers]
    read: dict[str, set[str]] = {}
    before_it: list[ActivationQuantizer] = []  # predicted quantizers that leave a summary
    for quantizer in predicted:
        predictor, source = quantizer.predictor, quantizer.method.prediction
        if predictor is None:
            raise TypeError(f"{quantizer.label} has no predictor")
        wanted = [s for w in source.sites or (predicted[0].name,) for s in resolve_site(w, names, inputs)]
        before = names[: names.index(quantizer.name) + 1]
        reachable = [s for s in wanted if s in before or (s.startswith(INPUT + ".") and s not in names)]
        # the last one before; model inputs that are no quantized site come first
        site = max(reachable, key=lambda s: before.index(s) if s in before else -1) if reachable else ""
        if site.startswith(INPUT + ".") and quantizer.name.startswith(INPUT + "."):
            site = quantizer.name  # one input says nothing of another
        extended = source.mode == "extended"
        predictor.connect(site, tuple(q.name for q in before_it[-HISTORY:]) if extended else ())
        if extended:
            before_it.append(quantizer)
        if site:
            read.setdefault(site, set()).add(source.mode)
    return Forwards(_listen(quantizers, read), augmentation(predicted), calibrating=True)


def link(model: nn.Module) -> nn.Module:
    """Connect the QPP quantizers of a model that got its state from a state_dict or a pickle. Changes it in place.

    Converted FX and PT2E models have the predictions as edges of their graph and do not need it. A model in the middle
    of its calibration goes on with it.

    Returns:
        the model.
    """
    quantizers = [quantizer for _, quantizer in iter_quantizers(model)]
    read: dict[str, set[str]] = {}
    for quantizer in quantizers:
        if quantizer.predictor is not None and quantizer.predictor.site:
            read.setdefault(quantizer.predictor.site, set()).add(quantizer.predictor.mode)
    predicted = [quantizer for quantizer in quantizers if quantizer.predictor is not None]
    if predicted:
        calibrating = any(quantizer.state == "observe" for quantizer in predicted)
        forwards = Forwards(_listen(quantizers, read), augmentation(predicted), calibrating=calibrating)
        forwards.attach(model)
    return model


def _listen(quantizers: Sequence[ActivationQuantizer], read: dict[str, set[str]]) -> tuple[tuple[str, str], ...]:
    """Let each site that is read take its features; returns the (site, mode) that are inputs of the model."""
    names = {quantizer.name for quantizer in quantizers}
    for quantizer in quantizers:
        modes = tuple(sorted(read.get(quantizer.name, ())))
        quantizer.listener = Listener(modes) if modes else None
    return tuple((site, mode) for site in read if site not in names for mode in sorted(read[site]))
