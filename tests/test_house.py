"""The rules of the house, read off the source: where unstable packages are imported, what stays pure, file sizes."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("finecap_ray", "serve", "jobs")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# Package -> the only places that import it.
HOMES = {
    "vllm": ("finecap_ray/sampling/", "serve/"),
    "trl": ("finecap_ray/training/trainer.py", "finecap_ray/training/trl_without_vllm.py"),
    "open_clip": ("finecap_ray/scorers/",),
}
PURE = [
    "finecap_ray/training/advantages.py",
    "finecap_ray/rewards/self_retrieval.py",
    "finecap_ray/rewards/combine.py",
    "finecap_ray/evaluation/probes.py",
    "finecap_ray/bags/mining.py",
    "finecap_ray/bags/curriculum.py",
    "finecap_ray/evaluation/retrieval.py",
    "finecap_ray/evaluation/ranking.py",
    "finecap_ray/evaluation/pools.py",
    "finecap_ray/evaluation/captions.py",
    "finecap_ray/evaluation/objects.py",
    "finecap_ray/evaluation/finecapeval.py",
    "finecap_ray/evaluation/warrant.py",
    "finecap_ray/report/page.py",
]
# What Ray Data's own workers load to read rows: there are many of them, and each would spend 10 s on model code.
LIGHT = ["finecap_ray/bags/stream.py", "finecap_ray/sources/importer.py", "finecap_ray/sources/examples.py"]
TOP_LEVEL = {
    *("finecap_ray", "jobs", "serve", "tests", "docs", "benchmarks", "tools", "requirements"),
    *("cluster.yaml", "pyproject.toml", "README.md", "Makefile", "LICENSE", "NOTICE"),
}
LONGEST_FILE = 420  # lines; "a file past ~400 lines is a sign that a room is missing"


def imports(path: Path) -> set[str]:
    """Dotted names a file imports, inside functions too; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_through(path: Path, seen: set[Path]) -> set[str]:
    """What a file imports, and what the files of this package that it imports do in turn."""
    names = imports(path)
    for name in sorted(names):
        parts = name.split(".")
        packages = [ROOT.joinpath(*parts[: count + 1], "__init__.py") for count in range(len(parts))]
        for inner in (*packages, ROOT.joinpath(*parts).with_suffix(".py")):
            if inner.is_file() and inner not in seen:
                seen.add(inner)
                names |= imports_through(inner, seen)
    return names


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", HOMES)
def test_an_unstable_package_is_imported_at_home_alone(package):
    strangers = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if package in packages(imports(path)) and not path.relative_to(ROOT).as_posix().startswith(HOMES[package])
    ]
    assert not strangers, f"{package} belongs into {' or '.join(HOMES[package])}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_no_engine(module):
    assert not packages(imports_through(ROOT / module, set())) & {"ray", "vllm", "trl"}


@pytest.mark.parametrize("module", LIGHT)
def test_readers_of_rows_load_no_model_code(module):
    assert not packages(imports_through(ROOT / module, set())) & {"torch", "transformers", "open_clip", "timm", "vllm"}


def test_the_start_of_the_interpreter_imports_nothing_else():
    # Every process of the environment imports these two, through finecap_torchvision.pth.
    assert imports(ROOT / "finecap_ray/__init__.py") == set()
    assert imports(ROOT / "finecap_ray/torchvision_on_cpu.py") <= {"sys", "torch"}


def test_no_file_is_too_long():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES + tests}
    assert not {path.name: length for path, length in lengths.items() if length > LONGEST_FILE}


def test_no_room_is_called_utils():
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_jobs_have_no_logic_of_their_own():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "jobs").glob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > 60}


def test_nothing_enters_at_the_top_level():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked can't be told")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_files_whose_tests_start_engines_are_named_where_they_are_shared_out(request, engines):
    """Else both processes of `make test` start them."""
    for item in request.session.items:
        for name in engines.keys() & set(item.fixturenames):
            assert item.path.relative_to(ROOT / "tests").as_posix() in engines[name]
