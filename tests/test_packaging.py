"""The wheel and the editable install hold the same packages, and the core imports nothing but torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dqa_plugins
from dqa_plugins.errors import missing

ROOT = Path(__file__).parents[1]


def run(code: str, *paths: Path) -> str:
    """Run code in a fresh process, outside of the repository, with some folders first on the path."""
    prefix = f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}; "
    done = subprocess.run(
        [sys.executable, "-c", prefix + code], capture_output=True, text=True, cwd="/", check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_package_under_one_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"dqa_plugins/{'adapters/' if base == 'adapters' else ''}{path.relative_to(ROOT / base)}"
        for base in ("dqa_plugins", "adapters")
        for path in (ROOT / base).rglob("*.py")
    }
    assert sources <= names, f"missing from the wheel: {sorted(sources - names)}"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dqa_plugins"}
    assert "dqa_plugins/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_installed_wheel_quantizes(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "import torch, dqa_plugins.adapters.fx as fx; "
        "from torch.ao.quantization.quantize_fx import prepare_fx, convert_fx; "
        "m = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()).eval(); x = torch.randn(2, 3, 4, 4); "
        "p = prepare_fx(m, fx.dqa_qconfig, (x,)); p(x); convert_fx(p)(x); print(fx.__file__)"
    )
    assert run(code, tmp_path).splitlines()[-1].startswith(str(tmp_path))


def test_the_editable_install_finds_the_adapters_in_their_folder() -> None:
    import dqa_plugins.adapters

    assert Path(dqa_plugins.adapters.__file__).is_relative_to(ROOT)
    assert run("import dqa_plugins.adapters.fx as f; print(f.__name__)") == "dqa_plugins.adapters.fx"


def test_the_core_imports_no_framework_and_no_adapter() -> None:
    code = (
        "import dqa_plugins, dqa_plugins.report; bad = ('torchao', 'brevitas', 'nncf', 'openvino', 'onnx', "
        "'onnxruntime', 'onnxscript', 'matplotlib', 'rich', 'sklearn', 'dqa_plugins.adapters'); "
        "print([m for m in bad if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_a_missing_package_is_asked_for_by_an_extra_that_brings_it() -> None:
    """In the words that work for a checkout: no index has the package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = [
        [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        for path in [*(ROOT / "dqa_plugins").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "missing"
    ]
    assert len(calls) >= 5
    for package, extra, purpose in calls:
        assert any(requirement.startswith(package) for requirement in extras[extra]), (package, extra)
        message = str(missing(package, extra, purpose))
        assert f"pip install -e '.[{extra}]'" in message, message
        assert "dqa-plugins[" not in message, message


def test_the_version_is_the_changelogs_newest() -> None:
    versions = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert any(f"[{dqa_plugins.__version__}]" in line for line in versions), versions
