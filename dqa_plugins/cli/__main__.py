"""Arguments, output and exit codes of the command line.

Exit codes: 0, done; 1, done, and something that was looked at is not as it should be; 2, wrong arguments or a typed
error, which is one sentence on stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dqa_plugins import DQAError, __version__

from . import doctor, inspection, networks
from .answer import Answer


def parser() -> argparse.ArgumentParser:
    """What `dqa-plugins --help` prints."""
    top = argparse.ArgumentParser("dqa-plugins", description="Low-bit activation quantization: look, compare, export.")
    top.add_argument("--version", action="version", version=__version__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    shared.add_argument("--verbose", action="store_true", help="log what is done to stderr")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    command = commands.add_parser("inspect", parents=[shared], help="what is in a file of ours")
    command.add_argument("path", type=Path, help="a packed frame, rank table, method, config entry or saved state_dict")
    command.set_defaults(run=lambda options: inspection.inspect(options.path))

    command = commands.add_parser("doctor", parents=[shared], help="versions against what was tested, kernels, threads")
    command.set_defaults(run=lambda options: doctor.doctor())

    command = commands.add_parser("compare", parents=[shared], help="one network under several methods")
    command.add_argument("network", help="module:factory; it returns (model, calibration, evaluate)")
    command.add_argument("methods", nargs="+", help="dqa:bits=3,granularity=channel and the like")
    command.add_argument("--room", default="fx", help="fx, pt2e, brevitas or nncf (default: fx)")
    command.add_argument("--weight-bits", type=int, default=8, help="0 leaves weights float (default: 8)")
    command.add_argument("--no-progress", action="store_true")
    command.set_defaults(run=networks.compare)

    command = commands.add_parser("export", parents=[shared], help="write a converted model to a file")
    command.add_argument("network", help="module:factory; it returns (converted model, example inputs)")
    command.add_argument("path", type=Path, help="the file: .onnx, .xml (OpenVINO) or .pt2 (torch.export)")
    command.add_argument("--form", default="float", help="of ONNX: float or qdq (default: float)")
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
    print(json.dumps(answer.data) if options.json else answer.text)
    return 0 if answer.good else 1


if __name__ == "__main__":
    sys.exit(main())
