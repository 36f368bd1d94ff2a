"""What a new file must be entered in: `__all__`, the package's own names, the options of the command line."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import ptengine
from ptengine import prompts
from ptengine.commands.tune import METHODS
from ptengine.prompts import Prompt, methods, prompt_class

ROOT = Path(ptengine.__file__).resolve().parent
NOT_TUNED_FROM_A_FILE = {
    "headed_prompt": "entered by a task that trains a head",
    "projected_prompt": "made by transfer, from a prompt of another model",
    "pruned_prompt": "made by pruning, from a trained prompt",
}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in (ROOT, Path(ptengine.kernels.__path__[0])):
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            parts = ("ptengine", *(("kernels",) if folder != ROOT else ()), *inner)
            yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def _exported(module: ast.Module) -> set[str] | None:
    """The names of a literal `__all__`; None where there is none."""
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(node.value)) if isinstance(node.value, ast.List) else None
    return None


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                yield node.module, alias.name


def test_what_other_modules_import_is_in_all() -> None:
    modules = dict(_modules())
    exported = {name: _exported(tree) for name, tree in modules.items() if name != "ptengine"}
    unnamed = {
        f"{module}.{name}, imported by {user}"
        for user, tree in modules.items()
        for module, name in _imports(tree)
        if (names := exported.get(module)) is not None and name not in names and f"{module}.{name}" not in modules
    }
    assert len(modules) > 150
    assert not unnamed


def test_type_checkers_see_the_names_that_are_imported_on_first_use() -> None:
    tree = dict(_modules())["ptengine"]
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {(name, module) for module, name in _imports(block)}
    homes = {(name, ptengine._HOMES.get(name, "ptengine")) for name in ptengine.__all__ if name != "__version__"}
    assert seen == homes


def test_every_prompt_method_is_a_name_of_the_package() -> None:
    classes = {prompt_class(method).__name__ for method in methods()}
    found = {
        name for name in prompts.__all__ if inspect.isclass(cls := getattr(prompts, name)) and issubclass(cls, Prompt)
    }
    assert classes <= found
    assert classes <= set(ptengine.__all__)


def test_every_prompt_method_is_an_option_of_tune() -> None:
    assert set(METHODS.values()).isdisjoint(NOT_TUNED_FROM_A_FILE)
    assert {*METHODS.values(), *NOT_TUNED_FROM_A_FILE} == set(methods())
