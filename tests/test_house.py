"""Imports between sub-packages: only downwards, without cycles, and only of public names."""

import ast
import functools
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# Each sub-package may import only those of the lines above its own.
FLOORS = (
    ("types", "boxes", "masks", "files", "text", "signals", "codec", "tensor_files", "assets", "progress"),
    ("ops",),
    ("distillers", "detectors", "data", "evaluation", "report"),
    ("integrations", "training"),
    ("commands", "cli", "export", "info"),
)
FORBIDDEN = {"integrations": ("detectors", "data", "evaluation", "report")}  # the host brings these
LOOSE = ("types", "boxes", "files", "assets", "cli", "commands")  # rooms of these floors import each other as well
EXCEPTIONS = {
    ("fastkd.report.networks", "detectors"): "pictures of features need the student and the teacher of a run",
    ("fastkd.report.networks", "data"): "pictures show validation images as the networks see them",
    ("fastkd.report.sources", "data"): "pictures show validation images with their boxes",
}
# Modules of a private folder that other rooms of fastkd may import, and what they are there for.
SHARED_SUPPORT = {
    "fastkd.ops._support.checks": "distillers check their arguments with the words of the ops",
    "fastkd.ops._support.coverage": "full_precision: losses accumulate in float32",
    "fastkd.ops._support.layout": "the memory order that decides which form is faster",
    "fastkd.ops._support.normalizer": "losses divide by a count of all processes",
    "fastkd.ops._support.library": "`fastkd info`, tests and benchmarks ask which kernels are built",
    "fastkd.ops._support.dispatch": "tests choose the backend",
}
FOR_REFERENCES = ("fastkd.boxes", "fastkd.ops._support.coverage")  # plain torch that several references share


class Import(NamedTuple):
    """One imported module or name: `target` is a module of ours, `name` what is taken from it, if anything."""

    source: str
    target: str
    name: str | None
    line: int


def read(*folders: str) -> dict[str, str]:
    """Module name -> text of every Python file in the folders."""
    texts = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        texts[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return texts


parse = functools.cache(ast.parse)


@functools.cache
def import_statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    """All import statements but those for type checking."""
    found, skipped = [], set()
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in skipped:
            found.append(node)
    return found


def imports(texts: dict[str, str], module: str) -> Iterator[Import]:
    """The modules of `texts` that a module imports anywhere but for type checking; all our imports are absolute."""
    for node in import_statements(texts[module]):
        if isinstance(node, ast.Import):
            yield from (Import(module, a.name, None, node.lineno) for a in node.names if a.name in texts)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            for name in (alias.name for alias in node.names):
                if f"{node.module}.{name}" in texts:
                    yield Import(module, f"{node.module}.{name}", None, node.lineno)
                elif node.module in texts:
                    yield Import(module, node.module, name, node.lineno)


def all_imports(texts: dict[str, str]) -> list[Import]:
    """The imports of all modules."""
    return [one for module in texts for one in imports(texts, module)]


def room(module: str) -> str:
    """`ops` of fastkd.ops.box_pool; empty for fastkd itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fastkd" and len(parts) > 1 else ""


def upwards(texts: dict[str, str]) -> list[Import]:
    """Imports of sub-packages that are not below the importing one."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}

    def allowed(source: str, target: str) -> bool:
        if target in FORBIDDEN.get(source, ()):
            return False
        return floor[target] < floor[source] or (floor[target] == floor[source] and source in LOOSE)

    pairs = [(one, room(one.source), room(one.target)) for one in all_imports(texts) if room(one.source)]
    return [one for one, source, target in pairs if target and source != target and not allowed(source, target)]


def circles(texts: dict[str, str]) -> list[str]:
    """The modules of one circle of imports, empty if there is none. A package may import its own modules."""
    graph: dict[str, set[str]] = {module: set() for module in texts}
    for one in all_imports(texts):
        own = one.source == one.target or one.target.startswith(f"{one.source}.")
        if not own:
            graph[one.source].add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def private(texts: dict[str, str]) -> list[Import]:
    """Names and modules with a leading underscore that are imported from another folder."""

    def hidden(word: str | None) -> bool:
        return word is not None and word.startswith("_") and not word.startswith("__")

    found = []
    for one in all_imports(texts):
        parts = one.target.split(".")
        first = next((position for position, part in enumerate(parts) if hidden(part)), None)
        outside = first is not None and one.source.split(".")[:first] != parts[:first]
        if (outside and one.target not in SHARED_SUPPORT) or (hidden(one.name) and one.source != one.target):
            found.append(one)
    return found


def impure_references(texts: dict[str, str]) -> list[str]:
    """Ops' references that use, themselves or in a helper, what is ours and neither a reference nor FOR_REFERENCES."""
    found = []
    for module in (name for name in texts if room(name) == "ops"):
        tree = parse(texts[module])
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        foreign = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fastkd"):
                foreign |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for name in (name for name in functions if name.endswith("_reference")):
            reached, ahead = set(), [name]
            while ahead:
                function = ahead.pop()
                reached.add(function)
                used = {inner.id for inner in ast.walk(functions[function]) if isinstance(inner, ast.Name)}
                ahead += sorted((used & functions.keys()) - reached)
                for path in (foreign[word] for word in sorted(used & foreign.keys())):
                    if not path.endswith("_reference") and path.rpartition(".")[0] not in FOR_REFERENCES:
                        found.append(f"{module}.{name} uses {path}")
    return found


def packages_at_import(texts: dict[str, str], module: str) -> set[str]:
    """Packages besides the standard library that importing a module of ours imports."""
    seen, ahead, found = set(), [module], set()
    while ahead:
        name = ahead.pop()
        if name in seen:
            continue
        seen.add(name)
        ahead += [parent for parent in (name.rpartition(".")[0],) if parent]
        inner = [node for node in import_statements(texts[name]) if node in parse(texts[name]).body]
        for node in inner:
            targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            if isinstance(node, ast.ImportFrom):
                targets += [path for alias in node.names if (path := f"{node.module}.{alias.name}") in texts]
            ahead += [target for target in targets if target in texts]
            found |= {target.split(".")[0] for target in targets if target not in texts}
    return found - sys.stdlib_module_names


PACKAGE, ALL = read("fastkd"), read("fastkd", "benchmarks")


def test_every_room_is_on_a_floor():
    assert {room(module) for module in PACKAGE} - {""} <= {name for floor in FLOORS for name in floor}


def test_imports_point_down():
    found = upwards(PACKAGE)
    assert [one for one in found if (one.source, room(one.target)) not in EXCEPTIONS] == []
    assert {(one.source, room(one.target)) for one in found} == EXCEPTIONS.keys()  # none outlives its reason


def test_no_circle():
    assert circles(ALL) == []


def test_no_private_name_of_another_room():
    assert private(ALL) == []
    used = {one.target for one in all_imports(read("fastkd", "benchmarks", "tests")) if room(one.source) != "ops"}
    assert used >= SHARED_SUPPORT.keys()


def test_references_use_nothing_but_references():
    assert impure_references(PACKAGE) == []


def test_the_core_of_the_integrations_imports_torch_and_numpy_alone():
    assert packages_at_import(PACKAGE, "fastkd.integrations") <= {"torch", "numpy"}
    assert "torchvision" in packages_at_import(PACKAGE, "fastkd.detectors")


def test_violations_are_found():
    """Each check sees a planted import that it forbids, and only there."""
    up = PACKAGE | {"fastkd.data.scenes": "def f():\n    from fastkd.training import train\n"}
    assert ("fastkd.data.scenes", "fastkd.training", "train", 2) in upwards(up)
    beside = PACKAGE | {"fastkd.data.scenes": "import fastkd.detectors.fcos"}
    assert ("fastkd.data.scenes", "fastkd.detectors.fcos", None, 1) in upwards(beside)
    host = PACKAGE | {"fastkd.integrations.one": "from fastkd import detectors"}
    assert ("fastkd.integrations.one", "fastkd.detectors", None, 1) in upwards(host)
    assert circles({"fastkd.a": "import fastkd.b", "fastkd.b": "def f():\n    from fastkd.a import x"})
    assert not circles({"fastkd.a": "import fastkd.b", "fastkd.b": "if TYPE_CHECKING:\n    import fastkd.a"})
    reach = PACKAGE | {"fastkd.data.scenes": "from fastkd.report.html import _hidden"}
    assert private(reach) == [("fastkd.data.scenes", "fastkd.report.html", "_hidden", 1)]
    deep = {"fastkd.a._x.b": "", "fastkd.a.c": "import fastkd.a._x.b", "fastkd.d": "from fastkd.a._x import b"}
    assert private(deep) == [("fastkd.d", "fastkd.a._x.b", None, 1)]
    kernel = PACKAGE["fastkd.ops.box_pool"] + "\n\ndef other_reference():\n    return check_device\n"
    assert len(impure_references(PACKAGE | {"fastkd.ops.box_pool": kernel})) == 1
