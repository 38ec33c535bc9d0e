"""What holds the house: who may import whom, and a README whose tree is the tree."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "lmmjax", "convert", "search")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "lmmjax": {"lmmjax", "kernels"},
    "convert": {"convert", "lmmjax", "kernels"},
    "search": {"search", "lmmjax", "kernels"},
}
NEVER = {
    "kernels": {"transformers", "torch", "optuna", "orbax", "optax", "easy_vqa"},
    "lmmjax": {"torch", "optuna"},
    "convert": {"optuna"},
    "search": {"torch", "transformers"},
}


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no modules in {package}"
    return found


def imported(path: Path) -> set[str]:
    """The dotted names of all imports in a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    for path in modules(package):
        for name in imported(path):
            top = name.split(".")[0]
            where = f"{path.relative_to(ROOT)} imports {name}"
            assert top not in PACKAGES or top in MAY_IMPORT[package], where
            assert top not in NEVER[package], where
            assert not re.match(r"transformers\..*(\.modeling_|Model$|For[A-Z])", name), f"{where}: model code"


def test_no_package_hides_below_tests():
    """tests/kernels/__init__.py would shadow the real package."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def expected_tree() -> str:
    """The README's tree: every module with the first line of its docstring."""
    lines = []
    for package in PACKAGES:
        for path in modules(package):
            first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
            assert first.endswith((".", ":")), f"{path}: its docstring's first line is its line in the README's tree"
            folders = path.relative_to(ROOT).parent.parts
            is_package = path.name == "__init__.py"
            name = f"{folders[-1]}/" if is_package else path.name
            indent = "  " * (len(folders) - is_package)
            lines.append(f"{indent + name:<22}{first}")
    return "\n".join(lines)


def test_the_readme_shows_the_tree():
    shown = re.search(r"<!-- tree -->\n```\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown
    assert shown[1] == expected_tree(), f"README.md's tree should be\n{expected_tree()}"


def test_the_readme_names_only_files_that_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize(
    "command",
    [
        "lmmjax.generate --prompt hello",
        "lmmjax.evaluate --task easy-vqa --out OUT",
        "convert.hf SRC DST",
        "convert.export DST OUT",
        "search.tpe --budget 0.5",
    ],
)
def test_another_distribution_named_kernels_is_said_in_one_line(command, tmp_path):
    """Hugging Face's package comes first on the path here, so that ours cannot even be imported."""
    info = tmp_path / "kernels-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    program = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = {command.split()!r}; "
    program += f"runpy.run_module({command.split()[0]!r}, run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert "'kernels' 0.9.0" in run.stderr
