"""The house rules, read from the source: who may import whom, who may wait, how long things may get."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("counterpoint", "cluster", "actors", "jobs")
FORBIDDEN = {
    "counterpoint": {"ray", "actors", "jobs", "cluster"},
    "cluster": {"counterpoint", "actors", "jobs"},
    "actors": {"jobs"},
    "jobs": set[str](),
}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}
FILE_LINES, FUNCTION_LINES = 400, 60
MAY_WAIT = {"cluster/waiting.py"}
MAY_PRINT = {"jobs/config.py"}

Check = Callable[[str, ast.Module], Iterator[str]]


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted name of every module a file imports, at its top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imports(path: str, tree: ast.Module) -> Iterator[str]:
    """Say which import goes against counterpoint <- actors <- jobs, with cluster apart."""
    for name in imported(tree):
        if name.startswith("."):
            yield f"{path} imports {name} relatively; name the package"
        elif name.partition(".")[0] in FORBIDDEN[path.partition("/")[0]]:
            yield f"{path} imports {name}"


def waiting(path: str, tree: ast.Module) -> Iterator[str]:
    """Say where Ray is waited for outside the one module whose waits all end."""
    if path in MAY_WAIT:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ray.get", "ray.wait"):
            yield f"{path}:{node.lineno} calls {ast.unparse(node.func)}; use cluster.waiting"
        if isinstance(node, ast.ImportFrom) and node.module == "ray":
            names = {alias.name for alias in node.names} & {"get", "wait"}
            yield from (
                f"{path}:{node.lineno} imports {name} from ray; use cluster.waiting" for name in names
            )


def printing(path: str, tree: ast.Module) -> Iterator[str]:
    """Say where a library prints; only a job's result line may."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and path not in MAY_PRINT:
            yield f"{path}:{node.lineno} prints; use logging"


def lengths(path: str, tree: ast.Module) -> Iterator[str]:
    """Say which file or function has grown too long."""
    last = max((node.end_lineno or 0 for node in ast.walk(tree) if isinstance(node, ast.stmt)), default=0)
    if last > FILE_LINES:
        yield f"{path} has {last} lines, more than {FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{path}:{node.lineno} {node.name} has {length} lines, more than {FUNCTION_LINES}"


def names(path: str, _: ast.Module) -> Iterator[str]:
    """Say which file or folder has a name that tells nothing."""
    yield from (
        f"{path}: {part!r} says nothing" for part in Path(path).with_suffix("").parts if part in VAGUE
    )


def documented(path: str, tree: ast.Module) -> Iterator[str]:
    """Say which public module, class or function lacks a docstring."""
    if tree.body and not ast.get_docstring(tree):
        yield f"{path} has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        overload = any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)
        if not node.name.startswith("_") and not overload and not ast.get_docstring(node):
            yield f"{path}:{node.lineno} {node.name} has no docstring"


def offences(root: Path, check: Check) -> list[str]:
    """Return what `check` says about every source file of the packages below `root`."""
    found = []
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            found += list(check(path, ast.parse(file.read_text(encoding="utf-8"), path)))
    return found


CHECKS: list[Check] = [imports, waiting, printing, lengths, names, documented]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rules(check: Check) -> None:
    assert offences(ROOT, check) == []


def test_there_is_a_house_to_check() -> None:
    for package in PACKAGES:
        assert list((ROOT / package).rglob("*.py")), f"{package} has no source file"


LONG = "\n".join(["def run() -> int:", *["    x = 1"] * 60])
BAD_FILES = [
    (imports, "counterpoint/a.py", "import ray.train"),
    (imports, "counterpoint/a.py", "def run():\n    from actors.panel import Panel"),
    (imports, "counterpoint/a.py", "import importlib\nimportlib.import_module('cluster.storage')"),
    (imports, "cluster/a.py", "from counterpoint import heads"),
    (imports, "actors/a.py", "import jobs.config as config"),
    (imports, "jobs/a.py", "from . import config"),
    (waiting, "actors/a.py", "import ray\nray.get(x)"),
    (waiting, "jobs/deep/a.py", "def run():\n    return ray.wait([x])"),
    (waiting, "cluster/a.py", "from ray import get"),
    (printing, "counterpoint/a.py", "print('x')"),
    (lengths, "jobs/a.py", LONG),
    (lengths, "jobs/a.py", "x = 1\n" * 401),
    (names, "cluster/utils/a.py", "x = 1"),
    (names, "actors/common.py", "x = 1"),
    (documented, "actors/a.py", "x = 1"),
    (documented, "actors/a.py", "'''Doc.'''\nclass Panel:\n    pass"),
]


@pytest.mark.parametrize(("check", "path", "source"), BAD_FILES)
def test_a_broken_rule_is_found(tmp_path: Path, check: Check, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    found = offences(tmp_path, check)
    assert len(found) == 1
    assert path in found[0]


GOOD_FILES = [
    (imports, "jobs/a.py", "import counterpoint.heads, cluster.storage, actors.panel, ray"),
    (imports, "actors/a.py", "import rayon, jobs_of_others"),
    (waiting, "cluster/waiting.py", "ray.get(x)"),
    (waiting, "actors/a.py", "store.get(x)\nevent.wait()"),
    (printing, "jobs/config.py", "print('{}')"),
    (lengths, "jobs/a.py", LONG.replace("    x = 1\n", "", 1)),
    (names, "actors/commons.py", "x = 1"),
    (documented, "actors/a.py", "'''Doc.'''\n@overload\ndef get():\n    pass\ndef _own():\n    pass"),
]


@pytest.mark.parametrize(("check", "path", "source"), GOOD_FILES)
def test_a_kept_rule_is_not_found(tmp_path: Path, check: Check, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert offences(tmp_path, check) == []
