"""The house rules as tests: layers, sizes, light imports, names of files and keys."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import luthier
from luthier.core import kinds
from luthier.core.registry import Registry

ROOT = Path(luthier.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
LAYERS = [
    "core",
    "config",
    "data model",
    "stages",
    "training infer",
    "evals inspection",
    "workflow",
    "serve webui",
    "run",
    "api",
    "cli",
    "__main__",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pyarrow", "rich", "pydantic", "gguf"}
HEAVY |= {"fastapi", "uvicorn", "starlette", "llguidance", "nicegui"}
OF_THE_SERVER = {"fastapi", "uvicorn", "starlette", "pydantic", "nicegui"}
"""Libraries of the extras `serve` and `board`, which only luthier/serve/ and luthier/webui/ may import."""
REGISTRIES = [value for value in vars(kinds).values() if isinstance(value, Registry)]
TESTS = Path(__file__).parent
WHOLE_RUNS = TESTS / "runs"
REACHED_THROUGH_OTHERS = set((TESTS / "tested_through_others.txt").read_text("utf-8").split())
"""Modules without a test file of their own: tests of their callers and whole runs reach them. No module is added."""
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
VAGUE_NAMES = {"utils", "misc", "common", "helpers", "constants"}
CONFIG_MAY_ASK = {"luthier.stages", "luthier.model.adapters"}
"""Variants own their keys, so the configuration asks the registries for them by name; no import statement does."""


def imports_in(tree: ast.AST):
    """The import statements of a module, those inside functions included and those for type checkers left out."""
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert isinstance(node, ast.Import) or node.level == 0, "imports are absolute"
            yield node
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            todo += ast.iter_child_nodes(node)


def imported_modules(tree: ast.AST):
    """Dotted names a module imports."""
    for node in imports_in(tree):
        yield from (alias.name for alias in node.names) if isinstance(node, ast.Import) else (node.module,)


def imported_files(tree: ast.AST):
    """The modules of the package that a module imports anywhere, `from a import b` as `a.b` if that is a module."""
    for node in imports_in(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        else:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def rings(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Each node of a ring with its arrows inside rings: nodes without an arrow in or out are removed."""
    left = {node: {other for other in others if other in arrows and other != node} for node, others in arrows.items()}
    while True:
        sources = {other for others in left.values() for other in others}
        ends = {node for node, others in left.items() if not others} | (left.keys() - sources)
        if not ends:
            return sorted([node, *sorted(others)] for node, others in left.items())
        left = {node: others - ends for node, others in left.items() if node not in ends}


TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8")) for path in FILES}
"""Each file, by its path below the package."""
IMPORTS = {
    name: set(imported_files(tree))
    for name, tree in zip(MODULES, TREES.values(), strict=True)
    if name != "luthier"  # the package itself only forwards to luthier.api
}


def test_a_module_imports_only_lower_layers():
    found = []
    for path, tree in TREES.items():
        own = path.partition("/")[0].removesuffix(".py")
        for name in imported_modules(tree) if own != "__init__" else ():
            parts = name.split(".")
            if parts[0] == "luthier" and len(parts) > 1 and parts[1] != own and RANK[parts[1]] >= RANK[own]:
                found.append(f"{path}: {own} may not import {name}")
    assert not found


def test_only_the_servers_import_their_libraries():
    found = []
    for path, tree in TREES.items():
        if path.startswith("webui/"):
            continue
        refused = {"nicegui"} if path.startswith("serve/") else OF_THE_SERVER
        if foreign := {name.partition(".")[0] for name in imported_modules(tree)} & refused:
            found.append(f"{path}: {foreign}")
    assert not found


def test_no_files_import_each_other_in_a_ring():
    assert rings(IMPORTS) == []


@pytest.mark.parametrize("layer", ["model", "data", "training", "stages", "infer"])
def test_no_rooms_of_a_layer_import_each_other_in_a_ring(layer):
    """A room is a folder of the layer, or a single file beside these folders."""
    arrows: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        if name.startswith(f"luthier.{layer}."):
            rooms = {other.split(".")[2] for other in others if other.startswith(f"luthier.{layer}.")}
            arrows.setdefault(name.split(".")[2], set()).update(rooms)
    assert rings(arrows) == []


def test_rings_are_found():
    assert rings({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == []
    assert rings({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"], ["c", "b"]]


def test_files_and_functions_stay_small():
    long = [path for path in FILES if path.read_text("utf-8").count("\n") > MAX_FILE_LINES]
    assert not long, f"more than {MAX_FILE_LINES} lines"
    functions = (
        f"{path}: {node.name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    )
    assert not list(functions), f"functions of {MAX_FUNCTION_LINES} lines or more"


def test_a_file_says_what_it_is():
    assert not [path for path in FILES if path.stem in VAGUE_NAMES]
    silent = [path for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert not silent, "a module begins with its docstring"


@pytest.mark.thorough
def test_every_module_imports():
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    names = [name for name in MODULES if not name.endswith("__main__")]
    subprocess.run([sys.executable, "-c", code, *names], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_commands_without_a_model_and_every_variant_load_without_heavy_imports():
    code = (
        "import sys, luthier, luthier.cli, luthier.config.load\n"
        "from luthier.core import kinds\n"
        "from luthier.core.registry import Registry\n"
        "for registry in vars(kinds).values():\n"
        "    if isinstance(registry, Registry): [registry.get(name) for name in registry.names]\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_the_file_name_is_the_yaml_name(registry):
    assert registry.names
    for name in registry.names:
        assert registry.get(name).name == name


def test_listing_registries_imports_no_variant():
    code = (
        "import sys; from luthier.core import kinds\n"
        "registries = [value for value in vars(kinds).values() if isinstance(value, kinds.Registry)]\n"
        "assert registries and all(registry.names for registry in registries)\n"
        "packages = tuple(registry.package for registry in registries)\n"
        "print([name for name in sys.modules if name.startswith(packages)])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_key_has_a_help_text():
    from luthier.config.describe import help_of
    from luthier.config.key_table import catalog

    missing = [name for name, keys in catalog().items() if not all(help_of(key) for key in keys)]
    assert not missing


def test_nobody_asks_a_variant_for_its_name():
    """What differs between variants is a field of theirs; only rules between keys, in config, may name one."""
    for path, tree in TREES.items():
        for node in ast.walk(tree) if not path.startswith("config/") else ():
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                asks = any(
                    isinstance(side, ast.Attribute) and side.attr in ("stage", "finetuning_type") for side in sides
                )
                named = any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in sides)
                assert not (asks and named), f"{path}:{node.lineno}"


def test_nobody_catches_everything():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("everything", "Exception", "BaseException"), f"{path}:{node.lineno}"


def mirrored(module: Path) -> Path:
    """The test file of a module or package: model/adapters/_pissa.py -> tests/model/adapters/test_pissa.py."""
    module = module.parent if module.name == "__init__.py" else module
    return TESTS / module.relative_to(ROOT).parent / f"test_{module.stem.lstrip('_')}.py"


def has_a_test_file(module: Path) -> bool:
    """Its own, or that of its folder: tests/data/test_tools.py tests each variant of luthier/data/tools/."""
    return mirrored(module).exists() or mirrored(module.parent / "__init__.py").exists()


def has_functions(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))


def test_every_test_file_stands_at_the_path_of_a_module_or_is_of_whole_runs():
    of_the_house = {TESTS / f"test_{name}.py" for name in ("architecture", "pages", "wording")}
    places = {mirrored(module) for module in FILES} | of_the_house
    lost = {path for path in TESTS.rglob("test_*.py") if path not in places and WHOLE_RUNS not in path.parents}
    assert not lost


def test_every_module_with_functions_has_a_test_file():
    untested = {path for path, tree in TREES.items() if has_functions(tree) and not has_a_test_file(ROOT / path)}
    assert not untested - REACHED_THROUGH_OTHERS, "a new module comes with a test file at the mirrored path"
    assert not REACHED_THROUGH_OTHERS - untested, "these have a test file now: take them off tested_through_others.txt"


def test_messages_are_heard_where_they_are_said():
    """`caplog` hears neither luthier, once a command has set up its log, nor transformers: `said` and `warned` do."""
    deaf = [path for path in TESTS.rglob("test_*.py") if re.search(r"\bcaplog\b", path.read_text("utf-8"))]
    assert deaf == [Path(__file__)]


def test_modules_can_be_imported_by_name():
    assert importlib.import_module("luthier").__version__


def test_nothing_is_hung_on_a_trainer_after_its_birth():
    """Everything it needs is in the parts that it is made of, so no order of later additions can be wrong."""
    for path, tree in TREES.items():
        for node in ast.walk(tree) if path != "training/trainer.py" else ():
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value).endswith("trainer"):
                    raise AssertionError(f"{path}:{node.lineno}: {ast.unparse(target)} = ...")
