"""What an installed Diptych must not break, and must not need."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ("services", "router", "kernels", "loadtest")


def imported_packages(path: Path) -> set[str]:
    """Top-level names of everything that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_kernels_looks_nothing_like_the_one_of_that_name_on_pypi() -> None:
    """transformers probes a package `kernels` by name and version: ours must not pass for it."""
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(r"20\d\d\.(0[1-9]|1[0-2])\.\d+", version), "a calendar version"


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code) == "False"


@pytest.mark.parametrize("package", RUNTIME)
def test_runtime_code_does_not_import_transformers(package: str) -> None:
    users = [path for path in (ROOT / package).rglob("*.py") if "transformers" in imported_packages(path)]
    assert users == []


def test_a_gateway_loads_no_torch_and_a_worker_loads_no_web_framework() -> None:
    loaded = "import sys; print(sorted({'torch', 'fastapi', 'transformers'} & set(sys.modules)))"
    assert run_python(f"import services.gateway.main; {loaded}") == "['fastapi']"
    assert run_python(f"import services.worker.main; {loaded}") == "[]"


def test_every_runtime_import_is_a_declared_dependency() -> None:
    """What the development environment happens to have must not be needed on a user's machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["worker"]]
    names = {re.split(r"[<>=\[ ]", requirement)[0].replace("-", "_") for requirement in declared}
    # Where the import's name is not the distribution's, and what comes along with a declared one.
    names |= {"google", "google_crc32c", "grpc", "prometheus_client", "pydantic_core", "starlette", *RUNTIME}
    used = {
        name
        for package in RUNTIME
        for path in (ROOT / package).rglob("*.py")
        for name in imported_packages(path)
    }
    development_only = {"grpc_tools", "_typeshed"}  # the generator of protobuf code; types
    assert used - names - set(sys.stdlib_module_names) - development_only == set()
