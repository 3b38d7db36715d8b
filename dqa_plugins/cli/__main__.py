"""Arguments, output and exit codes of the command line.

Exit codes: 0, done; 1, done, and something that was looked at is not as it should be; 2, wrong arguments or a typed
error, which is one sentence on stderr; 3, an exception of the network's own code, with its traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqa_plugins import DQAError, __version__

from . import doctor, inspection, networks
from .answer import Answer

_EPILOG = """examples:
  dqa-plugins doctor
  dqa-plugins inspect ranks.json
  dqa-plugins compare mynet:factory direct:bits=4 dqa:bits=3 --room pt2e
  dqa-plugins export mynet:converted model.onnx --form qdq

exit codes:
  0  done
  1  done, and something is not as it should be: a version that was not tested,
     a method that cannot be had
  2  wrong arguments, or an error in one sentence on stderr
  3  the network's own code raised; its traceback is on stderr
"""
_COMPARE = """Quantize one network by each method, and print score, bits per activation, sites
and time.

NETWORK is module:function, found from the current folder; the function returns
(model, calibration, evaluate): a float model in eval mode, what a DataLoader
yields, and a function model -> score, the higher the better.

METHOD is direct, dqa, noisyquant or dense_sparse, with fields behind a colon:
dqa:bits=3,granularity=channel. The field qparams=qpp predicts the parameters.
"""
_EXPORT = """Write a converted model to a file that needs neither this package nor the
model's code.

NETWORK is module:function, found from the current folder; the function returns
(converted model, example inputs).
"""
_INSPECT = """Say what a file holds, told by its content: a packed activation (everything in
it is decoded), a rank table, a method or config entry in JSON, or a saved
state_dict with quantizers (.pt, .safetensors). Nothing is unpickled.
"""
_DOCTOR = """Hold the versions that are installed against those that were tested; say which
processor features, kernels and threads compute here. Exit code 1 where a
package is missing or was not tested.
"""


def parser() -> argparse.ArgumentParser:
    """What `dqa-plugins --help` prints."""
    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    about = "Low-bit activation quantization: look at files and versions, compare methods, export networks."
    top = argparse.ArgumentParser("dqa-plugins", description=about, epilog=_EPILOG, **raw)
    top.add_argument("--version", action="version", version=__version__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    shared.add_argument("--verbose", action="store_true", help="log what is done to stderr")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, short: str, long: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[shared], help=short, description=long, **raw)

    command = add("inspect", "what is in a file of ours", _INSPECT)
    command.add_argument("path", type=Path, metavar="FILE", help="to look at")
    command.set_defaults(run=lambda options: inspection.inspect(options.path))

    command = add("doctor", "versions against what was tested, kernels, threads", _DOCTOR)
    command.set_defaults(run=lambda options: doctor.doctor())

    command = add("compare", "one network under several methods", _COMPARE)
    command.add_argument("network", metavar="NETWORK", help="module:function")
    command.add_argument("methods", metavar="METHOD", nargs="+", help="one or more")
    command.add_argument("--room", default="fx", help="the framework: fx, pt2e, brevitas or nncf (default: fx)")
    command.add_argument("--weight-bits", type=int, default=8, metavar="N", help="0 leaves weights float (default: 8)")
    command.add_argument("--no-progress", action="store_true", help="no progress bar on stderr (--json: none either)")
    command.set_defaults(run=networks.compare)

    command = add("export", "write a converted model to a file", _EXPORT)
    command.add_argument("network", metavar="NETWORK", help="module:function")
    command.add_argument("path", type=Path, metavar="FILE", help=".onnx, .xml (OpenVINO) or .pt2 (torch.export)")
    command.add_argument("--form", choices=("float", "qdq"), default="float", help="of ONNX: qdq has integer weights")
    command.add_argument("--static-batch", action="store_true", help="keep the batch size of the example inputs")
    command.set_defaults(run=networks.export)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        answer: Answer = options.run(options)
    except (DQAError, OSError) as error:
        print(f"dqa-plugins {options.command}: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 3
    print(json.dumps(_finite(answer.data), allow_nan=False) if options.json else answer.text)
    return 0 if answer.good else 1


def _finite(value: Any) -> Any:
    """The same, with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
