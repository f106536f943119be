"""Private names of other libraries appear only in qdense/compat; no code outside the package uses qdense's."""

import ast

from qdense.compat.peft import LAYER_OVERRIDES, TUNER_OVERRIDES
from tests.helpers import ROOT

# Underscored, and documented all the same.
DOCUMENTED = {"_asdict", "_replace", "_fields", "_exit"}


def sources(*folders):
    """Path from the root, and syntax tree, of each Python file."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def imported(tree):
    """(line, module, name or None) of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def private_imports(tree):
    """Imports of private modules or private names, whoever's they are."""
    for line, module, name in imported(tree):
        if any(map(is_private, module.split("."))) or (name is not None and is_private(name)):
            yield line, module, name


def defined_names(tree):
    """Private names that the file defines itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            yield node.attr


def is_own(node):
    """`self`, `cls` or `super()`."""
    called = node.func if isinstance(node, ast.Call) else node
    return isinstance(called, ast.Name) and called.id in ("self", "cls", "super")


def private_uses(tree):
    """(line, name, whether it is read from self, cls or super()) of each private attribute, by getattr and the like too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, node.attr, is_own(node.value)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
            and is_private(node.args[1].value)
        ):
            yield node.lineno, node.args[1].value, is_own(node.args[0])


def foreign_uses(tree, own):
    """Private names not defined here; and of PEFT's methods that our tuners override, those called on another object."""
    overridden = {*TUNER_OVERRIDES, *LAYER_OVERRIDES}
    for line, name, is_of_self in private_uses(tree):
        if name not in own or (name in overridden and not is_of_self):
            yield line, name


def found_in(*folders, compat=()):
    trees = dict(sources(*folders))
    own = {name for tree in trees.values() for name in defined_names(tree)}
    for path, tree in trees.items():
        if path.startswith(compat):
            continue
        for line, module, name in private_imports(tree):
            if module.split(".")[0] not in ("qdense", "tests", "tools", "__future__"):
                yield f"{path}:{line}: {module}{'.' + name if name else ''}"
        for line, name in foreign_uses(tree, own):
            yield f"{path}:{line}: {name}"


def test_the_package_uses_private_names_of_others_in_compat_only():
    found = list(found_in("qdense", compat=("qdense/compat/",)))
    assert not found, "private names of other libraries; give them a function in qdense/compat:\n" + "\n".join(found)


def test_compat_is_where_they_are():
    """The scan above sees them: else it would pass whatever the package does."""
    found = " ".join(found_in("qdense"))
    for name in ("_use_count", "_attn_implementation", "_gradient_checkpointing_func", "_lib", "_check_merge_allowed"):
        assert f": {name}" in found
    for module in ("torch.utils._python_dispatch", "peft.tuners._buffer_dict"):
        assert f": {module}" in found


def test_tests_and_tools_use_private_modules_of_others_nowhere():
    found = [
        f"{path}:{line}: {module}{'.' + name if name else ''}"
        for path, tree in sources("tests", "tools")
        for line, module, name in private_imports(tree)
        if module.split(".")[0] != "qdense"
    ]
    assert not found, "\n".join(found)


def test_tools_import_no_private_name_of_the_package():
    found = [
        f"{path}:{line}: {module}.{name}"
        for path, tree in sources("tools")
        for line, module, name in private_imports(tree)
        if module.split(".")[0] == "qdense"
    ]
    assert not found, "\n".join(found)
