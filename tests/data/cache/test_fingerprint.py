"""The key of tokenized rows follows the code that makes them, and no other code."""

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import luthier
from luthier.core.kinds import FORMATS, MEDIA_KINDS, STAGES, TOOL_SYNTAXES
from luthier.data.cache import fingerprint
from luthier.data.cache.fingerprint import code_digest, code_files, encoding_digest, joint_key
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.rows.encoding import Encoding
from luthier.data.templates import get_template
from tests.tiny import byte_tokenizer

PACKAGE = Path(luthier.__file__).parent
STORES = ("luthier.data.cache", "luthier.data.ledger", "luthier.data.stream")
"""They keep, count and draw rows that others have made."""


def path_of(module: str) -> Path | None:
    """The file of a module of the package; None if it is a name in one."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, inside its functions too."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        todo += ast.iter_child_nodes(node)
    return {name for name in found if name.startswith("luthier.") and path_of(name)}


def closure(modules: set[str]) -> set[Path]:
    """The files of data/ that these modules need, themselves included, but for what only keeps rows."""
    done: set[str] = set()
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module in done or not module.startswith("luthier.data.") or module.startswith(STORES):
            continue
        done.add(module)
        path = path_of(module)
        assert path is not None
        todo += [*imported(path), module.rpartition(".")[0]]
    return {path for module in done if (path := path_of(module)) is not None}


def variants() -> set[str]:
    """The modules that are found by name: formats, tool syntaxes, kinds of media, and the row plans of the stages."""
    registries = (FORMATS, TOOL_SYNTAXES, MEDIA_KINDS)
    found = {f"{registry.package}.{name}" for registry in registries for name in registry.names}
    return found | {STAGES.get(name).rows.write.__module__ for name in STAGES.names}


def test_the_code_that_makes_rows_is_hashed_and_no_other():
    needed = closure({"luthier.data.prepare", *variants()})
    hashed = {path for path in code_files() if path.suffix == ".py"}
    assert len(needed) > 50
    assert hashed == needed


def test_the_tables_of_the_chat_formats_are_hashed():
    tables = set(PACKAGE.joinpath("data", "templates").glob("*.toml"))
    assert tables and tables <= set(code_files())


@pytest.mark.parametrize("room", ["inspection", "stages", "training", "data/cache"])
def test_what_makes_no_rows_is_not_hashed(room):
    assert not [path for path in code_files() if PACKAGE / room in path.parents]


def test_a_changed_table_changes_the_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_PACKAGE", tmp_path)
    folder = tmp_path / "data" / "templates"
    folder.mkdir(parents=True)
    digests = []
    for text in ("a = 1", "a = 2"):
        (folder / "x.toml").write_text(text)
        code_digest.cache_clear()
        digests.append(code_digest(("data/templates",)))
    code_digest.cache_clear()
    assert len(set(digests)) == 2


def test_a_key_of_something_unknown_is_none():
    """Rows that depend on it are not kept: nothing would tell them from others."""
    assert joint_key("a", None) is None
    assert joint_key("a", ("b", None)) is not None, "a value may have parts that are not given"
    assert joint_key("a", "b") == joint_key("a", "b") != joint_key("ab") != joint_key("a", "c")


def test_rows_with_media_depend_on_how_these_are_made():
    text = Encoding(Encoder(byte_tokenizer()), get_template("chatml"), 100)

    def seen(digest: str, **slots: str) -> Encoding:
        return replace(text, media=SimpleNamespace(processor=SimpleNamespace(digest=digest), slots=slots))

    digests = [encoding_digest(text), *map(encoding_digest, (seen("a"), seen("b"), seen("a", image="<image>")))]
    assert None not in digests and len(set(map(repr, digests))) == 4


def test_rows_of_the_models_own_chat_template_depend_on_its_text():
    digests = []
    for chat_template, default_system in (("{{ 1 }}", None), ("{{ 2 }}", None), ("{{ 1 }}", "Be brief.")):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = chat_template
        encoder = Encoder(tokenizer)
        program = ModelChatTemplate(encoder, default_system=default_system)
        encoding = Encoding(encoder, get_template("chatml"), 100, model_template=program)
        digests.append(repr(encoding_digest(encoding)))
        assert digests[-1] == repr(encoding_digest(encoding))
    assert len(set(digests)) == 3


def test_a_tokenizer_that_cannot_be_hashed_has_no_digest():
    encoding = Encoding(SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False)), get_template("chatml"), 100)
    assert encoding_digest(encoding) is None
