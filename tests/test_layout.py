"""The rooms of the design: a file imports only from its own level or below, and reading results needs no torch."""

import ast
import re
from pathlib import Path

import archbench

PACKAGE = Path(archbench.__file__).parent

LEVELS = {
    0: "clocks heap errors stats environment record history parse papers seeds scaling",
    1: "state sampling model data codec ops layers",
    2: "levels segments recurrent drafting foreign operators flops roofline power generation prompts "
    "contract task tasks haystack examination projection curriculum sandbox",
    3: "registry metric architectures metrics sizes exercise coding completions",
    4: "timing",
    5: "cell suite tuning pretrained plan checkpoint train estimate",
    6: "worker executors run claims report integrations writing doctor conversion code_eval bench gate "
    "series tabular export exports tracking",
    7: "display cli",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}

WITHOUT_TORCH = (
    *("errors", "stats", "environment", "record", "history", "parse", "report", "papers", "seeds"),
    *("series", "tabular", "export", "exports", "tracking", "claims"),
)


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path):
    """Modules that a file imports, those only a type checker sees left out."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py" or path.parent != PACKAGE]


def test_every_file_has_a_level():
    assert {room(path) for path in FILES} == set(LEVEL)


def test_imports_point_one_way():
    wrong = []
    for path in FILES:
        here = room(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "archbench" or len(parts) < 2 or parts[1] not in LEVEL or parts[1] == here:
                continue
            if LEVEL[parts[1]] > LEVEL[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} (level {LEVEL[here]}) imports {name} ({LEVEL[parts[1]]})")
    assert not wrong, "\n".join(wrong)


def test_reading_results_never_imports_torch():
    for path in FILES:
        if room(path) in WITHOUT_TORCH:
            assert not [name for name in imports(path) if name.split(".")[0] in ("torch", "safetensors")], path


def test_shared_code_names_no_architecture():
    """Nothing outside an architecture's file knows its name; the bench's contests name who competes."""
    names = {path.stem for path in (PACKAGE / "architectures").iterdir() if not path.name.startswith("__")}
    wrong = []
    for path in FILES:
        if room(path) == "architectures" or path.parent.name == "families":
            continue
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        wrong += [f"{path.name}: '{value}'" for value in strings if isinstance(value, str) and value in names]
        wrong += [f"{path.name}: {name}" for name in imports(path) if name.startswith("archbench.architectures.")]
    assert not wrong, "\n".join(wrong)


def test_every_package_is_in_the_wheel():
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(archbench[\w.]*)"', text.split("packages = [")[1].split("]")[0]))
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("*.py")}
    assert found <= listed, f"pyproject.toml lacks {found - listed}"
    assert {"archbench.suites", "archbench.baselines", "archbench.baselines.papers"} <= listed
