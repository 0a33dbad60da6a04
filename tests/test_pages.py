"""What a test can check in README, CONTRIBUTING and docs/: trees, paths, links, names of modules, counts."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "luthier"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TREES = [ROOT / "README.md", ROOT / "docs" / "architecture.md"]
ROOMS = sorted(folder for folder in PACKAGE.rglob("*") if folder.is_dir() and any(folder.glob("*.py")))
OF_REFERENCE = (
    *("USE_V1", "FORCE_TORCHRUN", "NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID"),
    *("MIN_NNODES", "MAX_NNODES", "MAX_RESTARTS", "OPTIM_TORCH", "USE_RAY", "USE_KT", "USE_MCA", "USE_MEGATRON_BRIDGE"),
    *("ALLOW_EXTRA_ARGS", "DISABLE_VERSION_CHECK", "FORCE_CHECK_IMPORTS", "LLAMAFACTORY_VERBOSITY", "RECORD_VRAM"),
    *("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB", "NPU_JIT_COMPILE", "WANDB_PROJECT", "API_HOST", "API_PORT", "API_KEY"),
    *("API_MODEL_NAME", "API_VERBOSE", "FASTAPI_ROOT_PATH", "MAX_CONCURRENT", "SAFE_MEDIA_PATH", "ALLOW_LOCAL_FILES"),
    *("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_ROOT_PATH", "GRADIO_SHARE", "GRADIO_IPV6", "DEMO_MODEL"),
    *("DEMO_TEMPLATE", "DEMO_BACKEND", "LLAMABOARD_ENABLED", "LLAMABOARD_WORKDIR", "IMAGE_PLACEHOLDER"),
    *("VIDEO_PLACEHOLDER", "AUDIO_PLACEHOLDER", "DOWNSAMPLE_MODE"),
)
NO_EFFECT = re.compile(r"have no effect here:\n\n(.*?)\n\n", re.DOTALL)
"""The environment variables of LLaMA-Factory, and the table of those that do nothing here."""
LAYERS = "api|cli|config|core|data|evals|infer|inspection|model|run|stages|training|webui|workflow"


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tree_lines(page: Path) -> list[str]:
    """The lines of the tree that begins with `luthier/`, without the four blanks that make it a code block."""
    lines = iter(page.read_text("utf-8").splitlines())
    assert any(line == "    luthier/" for line in lines), f"{named(page)} has no tree"
    found = ["luthier/"]
    for line in lines:
        if not line.startswith("    "):
            break
        found.append(line[4:])
    return found


def tree_paths(lines: list[str]) -> Iterator[str]:
    """Every file and folder that a tree names: the entry of each line, and the files in the words behind it."""
    parents: dict[int, str] = {}
    folder = ""
    for line in lines:
        depth = len(line) - len(line.lstrip())
        entry, _, words = line.strip().partition("  ")
        if re.fullmatch(r"[\w.]+/|\w+\.py", entry):
            parents = {indent: parent for indent, parent in parents.items() if indent < depth}
            path = (parents[max(parents)] if parents else "") + entry
            yield path
            folder = path if entry.endswith("/") else path.rpartition("/")[0] + "/"
            if entry.endswith("/"):
                parents[depth] = path
        else:
            words = line  # the line before goes on
        yield from (folder + name for name in re.findall(r"\b\w+\.py\b", words))


def test_the_tree_is_read_as_it_is_drawn():
    lines = [
        "luthier/",
        "  cli.py    finds",
        "  data/     rows",
        "    tools/  a.py b.py,",
        "            c.py",
        "tests/",
    ]
    found = ["luthier/", "luthier/cli.py", "luthier/data/", "luthier/data/tools/"]
    found += [f"luthier/data/tools/{name}.py" for name in "abc"] + ["tests/"]
    assert list(tree_paths(lines)) == found


@pytest.mark.parametrize("page", TREES, ids=named)
def test_a_tree_names_what_exists_and_once(page):
    paths = list(tree_paths(tree_lines(page)))
    assert [path for path in paths if not (ROOT / path).exists() or paths.count(path) > 1] == []


@pytest.mark.parametrize("page", TREES, ids=named)
def test_a_tree_names_every_room(page):
    known = set(tree_paths(tree_lines(page)))
    missing = [f"{named(room)}/" for room in ROOMS if f"{named(room)}/" not in known]
    if page.name == "README.md":  # two levels are enough for a newcomer
        missing = [room for room in missing if room.count("/") <= 3]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_and_links_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    paths = set(re.findall(r"(?<![\w/.])(?:luthier|tests|examples|benchmarks|docs|tools)/[\w./*-]*[\w/]", text))
    paths |= {f"luthier/{path}" for path in re.findall(rf"`((?:{LAYERS})/[\w./*]+)`", text)}
    lost = [path for path in sorted(paths) if not any(ROOT.glob(path))]
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert lost + [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_anchors_exist(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text("utf-8")):
        text = (page.parent / target if target else page).read_text("utf-8")
        titles = [
            re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)", text, re.M)
        ]
        assert anchor in titles, f"{target}#{anchor}"


@cache
def names_in(module: Path) -> set[str]:
    """What a module defines, imports or exports at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


def exists(dotted: str) -> bool:
    """Whether `luthier.a.b.name` is a module, a package, or a name in one."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:size])
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module.is_file():
            return size == len(parts) or parts[size] in names_in(module)
    return False


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_dotted_names_exist(page):
    text = page.read_text("utf-8")
    names = set(re.findall(r"\bluthier(?:\.\w+)+", text))
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("luthier"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    if page.name == "architecture.md":  # there the tables leave `luthier.` out
        names |= {
            f"luthier.{name}" for name in re.findall(rf"`((?:{LAYERS})(?:\.\w+)+)`", text) if not name.endswith(".py")
        }
    assert [name for name in sorted(names) if not exists(name)] == []


def test_a_name_that_is_gone_is_noticed():
    assert exists("luthier.core.files") and exists("luthier.core.files.size") and exists("luthier.train")
    assert not exists("luthier.core.file") and not exists("luthier.core.files.sise")


def test_the_counts_in_readme_are_right():
    from luthier.data.templates import template_names
    from luthier.stages._preference_losses import LOSSES

    text = (ROOT / "README.md").read_text("utf-8")
    assert f"all {len(template_names())} of the reference" in text and f"`dpo` ({len(LOSSES)} losses)" in text


def test_readme_names_every_page_and_architecture_every_command():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f"{named(page)})" not in readme] == []
    known = set(tree_paths(tree_lines(ROOT / "docs" / "architecture.md")))
    commands = [f"luthier/run/{path.name}" for path in (PACKAGE / "run").glob("[a-z]*.py")]
    assert [path for path in commands if path not in known] == []


@pytest.mark.parametrize("name", OF_REFERENCE)
def test_a_variable_of_llama_factory_is_read_or_said_to_have_no_effect(name):
    pages = "\n".join(page.read_text("utf-8") for page in PAGES)
    without = NO_EFFECT.search(pages)
    assert without is not None and re.search(rf"`[^`]*\b{name}\b", pages), "is in no page"
    if f"`{name}`" not in without[1]:
        reads = re.compile(rf"\b{name}\b")
        assert any(reads.search(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")), "is read nowhere"
