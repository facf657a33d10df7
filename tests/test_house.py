"""House rules that no linter holds: sizes of functions, nothing read from outside, nothing left undone."""

import ast
import configparser
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p
    for d in ("pretrain", "det_plugin", "seg_plugin", "posfield", "tools", "configs")
    for p in (ROOT / d).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= (120 if node.name == "train" else 60), (
                f"{path}:{node.lineno}"
            )


def test_every_public_function_has_a_docstring():
    bare = []
    for path in SOURCES:
        if path.parts[len(ROOT.parts)] in ("tools", "configs"):
            continue
        for node in ast.parse(path.read_text()).body:
            if "cli" in path.parts and getattr(node, "name", "") == "main":  # the module says what it does
                continue
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not bare, bare


def test_detectron2_stands_in_no_requirement():
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    needed = options["options"]["install_requires"] + "".join(
        line
        for text in options["options.extras_require"].values()
        for line in text.splitlines(True)
        if not line.startswith("#")
    )
    assert "detectron2" not in needed.lower()
    assert "detectron2" not in (ROOT / "constraints.txt").read_text().lower()
    assert "torch >= 2.6" in needed and "torch <" not in needed


def test_the_packages_are_those_of_the_tree_and_the_configs():
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    listed = set(options["options"]["packages"].split())
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for d in ("pretrain", "det_plugin", "seg_plugin", "posfield")
        for p in (ROOT / d).rglob("__init__.py")
    }
    assert listed == found | {"posfield.configs"}


def test_nothing_reads_what_only_we_have():
    """No path of a machine, nothing from shared/, in anything that git tracks."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in names:
        path = ROOT / name
        if name == "tests/test_house.py" or not path.is_file():
            continue
        text = path.read_text(errors="ignore")
        for word in ("../shared", "/root/", "/work/", "TODO", "FIXME", "NotImplementedError"):
            assert word not in text, f"{name}: {word}"


def test_nothing_changes_the_path_of_modules():
    for path in SOURCES:
        assert "sys.path" not in path.read_text(), path


def test_no_package_imports_tools_configs_or_tests():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("tools", "configs"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"tools", "configs", "tests"}, (
                f"{path}: {names}"
            )


def test_every_command_of_the_promises_chooses_tests():
    """SECURITY.md's third column: files that exist, and words that choose tests in them."""
    commands = re.findall(r"`pytest ([^`]+)`", (ROOT / "SECURITY.md").read_text())
    assert len(commands) > 15
    for command in commands:
        files, _, chosen = command.partition(" -k ")
        paths = [
            path
            for name in files.split()
            for path in ROOT.glob(f"{name}/test_*.py" if name == "tests" else name)
        ]
        names = [name for path in paths for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)]
        for word in shlex.split(chosen)[0].split(" or ") if chosen else [""]:
            assert any(word in name for name in names), f"pytest {command}: {word!r} chooses nothing"
