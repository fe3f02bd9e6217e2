"""The architecture as a test: imports point one way, files stay small, nothing from disk is executed."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["kernels", "comm", "parallel", "train", "launch"]
FILES = [path for folder in ORDER for path in sorted((ROOT / folder).glob("**/*.py"))]
NEEDS_ONLY_TORCH = {"torch", "numpy", "triton", "scipy", "numba", "armillary"}
STANDARD = set(__import__("sys").stdlib_module_names)
EXECUTES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "numpy.load", "os.system"}
OBJECT_COLLECTIVES = ("_object", "_object_list")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a thing comes from"
            yield node.module or ""


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_files():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    room = ORDER.index(path.relative_to(ROOT).parts[0])
    for name in imports(parse(path)):
        parts = name.split(".")
        assert parts[0] not in ORDER, f"{name}: import armillary.{name}; two names would be two modules"
        if parts[0] == "armillary":
            assert ORDER.index(parts[1]) <= room, f"{name_of(path)} imports {name}, which stands above it"
            if ORDER[room] == "comm" and parts[1] == "kernels":
                assert parts[2] == "quantise", f"{name_of(path)} imports {name}; comm takes the quantisers only"
        elif room < ORDER.index("train"):
            assert parts[0] in NEEDS_ONLY_TORCH | STANDARD, f"{name_of(path)} imports {name}; it may need only torch"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").glob("**/*.py"))], ids=name_of)
def test_files_and_functions_stay_small(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 500, f"{name_of(path)} has {lines} lines"
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{name_of(path)}: {node.name} has {length} lines"


def test_the_median_file_is_short():
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES)
    assert lengths[len(lengths) // 2] < 200


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_from_disk_is_executed(path):
    tree = parse(path)
    for name in imports(tree):
        assert name.split(".")[0] not in EXECUTES, f"{name_of(path)} imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in FORBIDDEN_CALLS, f"{name_of(path)}:{node.lineno} calls {called}"
        assert options.get("shell") != "True", f"{name_of(path)}:{node.lineno} starts a shell"
        assert options.get("allow_pickle", "False") == "False", f"{name_of(path)}:{node.lineno}"
        assert options.get("trust_remote_code", "False") == "False", f"{name_of(path)}:{node.lineno}"
        if called in ("np.load", "np.memmap"):
            assert called != "np.load" or options.get("allow_pickle") == "False", f"{name_of(path)}:{node.lineno}"
        assert not called.endswith(OBJECT_COLLECTIVES), f"{name_of(path)}:{node.lineno} pickles between ranks"


def test_every_collective_goes_through_the_ledger():
    moving = {"all_reduce", "all_gather_into_tensor", "all_to_all_single", "broadcast", "reduce_scatter_tensor"}
    moving |= {"all_gather", "all_to_all", "reduce", "gather", "scatter", "send", "recv", "isend", "irecv"}
    for path in FILES:
        if path.name in ("collectives.py", "exchange.py"):
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                outside = ast.unparse(node.func.value) in ("dist", "torch.distributed") and node.func.attr in moving
                assert not outside, f"{name_of(path)}:{node.lineno} moves bytes past the ledger"


def test_no_folder_shadows_another_package():
    assert not [folder for folder in ORDER if (ROOT / folder / "__init__.py").exists()]
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize("path", [*FILES, *ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))], ids=name_of)
def test_every_file_that_is_named_exists(path):
    for name in re.findall(
        rf"\b(?:{'|'.join(ORDER)}|tests|configs|docs)/[a-z0-9_/-]+\.(?:py|toml|md|json|svg|png)\b", path.read_text()
    ):
        assert (ROOT / name).exists(), f"{name_of(path)} names {name}"


def test_every_file_in_the_picture_of_a_step_exists():
    text = (ROOT / "docs/images/one-step.svg").read_text()
    names = re.findall(rf"\b(?:{'|'.join(ORDER)})/[\w/]+\.py", text)
    assert len(names) > 20
    assert not [name for name in names if not (ROOT / name).exists()]
