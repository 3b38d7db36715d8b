"""The examples silence what the hosts say, and nothing of ours."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dqa_plugins.errors import DQAWarning
from examples.quiet import quiet_hosts

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("module", ["torch.nn.modules.module", "dqa_plugins.quantizer", "__main__"])
def test_our_warnings_are_shown_wherever_they_are_attributed_to(module: str) -> None:
    with warnings.catch_warnings(record=True) as shown:
        quiet_hosts()
        warnings.warn_explicit("act on this", DQAWarning, "file.py", 1, module=module)
        warnings.warn_explicit("the user's own", UserWarning, "file.py", 1, module="__main__")
    assert [str(w.message) for w in shown] == ["act on this", "the user's own"]


def test_the_hosts_are_not() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        quiet_hosts()
        for host in ("torch.ao.nn.quantized.reference", "torchao", "nncf.torch", "brevitas.nn"):
            warnings.warn_explicit("an observer is ignored", UserWarning, "file.py", 1, module=host)
        notice = "torch.ao.quantization is deprecated and will be removed in 2.10."
        warnings.warn_explicit(notice, DeprecationWarning, "file.py", 1, module="__main__")
        warnings.warn_explicit("torchaudio is another package", UserWarning, "file.py", 1, module="torchaudio")
    assert [str(w.message) for w in shown] == ["torchaudio is another package"]


def test_no_example_silences_everything() -> None:
    for path in EXAMPLES.rglob("*.py"):
        text = path.read_text()
        for silence in ('simplefilter("ignore")', 'filterwarnings("ignore")'):
            assert silence not in text, f"{path.name} silences with {silence}"
