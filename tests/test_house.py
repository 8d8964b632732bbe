"What keeps the house in order: export, notebooks, environments, imports."

import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.conftest import REPO

NOTEBOOKS = sorted(REPO.glob("nbs/*.ipynb"))
LIBRARY = [p for p in NOTEBOOKS if p.name[0].isdigit()]
EXPERIMENTS = [p for p in NOTEBOOKS if p.name.startswith(("exp_", "bench_"))]


def tool(name):
    return shutil.which(name, path=str(REPO / sys.exec_prefix / "bin")) or name


def settings():
    parser = configparser.ConfigParser()
    parser.read(REPO / "settings.ini")
    return parser["DEFAULT"]


def test_the_library_is_what_the_notebooks_export(tmp_path):
    for part in ("nbs", "wrapperlib"):
        shutil.copytree(
            REPO / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    shutil.copy(REPO / "settings.ini", tmp_path)
    subprocess.run([tool("nbdev_export")], cwd=tmp_path, check=True)
    for path in sorted((tmp_path / "wrapperlib").glob("*.py")):
        assert path.read_text() == (REPO / "wrapperlib" / path.name).read_text(), (
            f"{path.name} differs from its notebook: run make export"
        )


def test_every_module_has_a_notebook():
    exported = {re.search(r"#\| default_exp (\w+)", p.read_text())[1] for p in LIBRARY}
    assert exported == {p.stem for p in (REPO / "wrapperlib").glob("*.py")} - {"__init__", "_modidx"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(path, tmp_path):
    (tmp_path / "nbs").mkdir()
    shutil.copy(path, tmp_path / "nbs")
    shutil.copy(REPO / "settings.ini", tmp_path)
    subprocess.run([tool("nbdev_clean"), "--fname", str(tmp_path / "nbs" / path.name)], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "nbs" / path.name).read_text()) == json.loads(path.read_text()), "run make export"
    notebook = json.loads(path.read_text())
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert not any(o["output_type"] == "error" for o in outputs)
    assert not any(o.get("name") == "stderr" for o in outputs)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    tagged = sum("parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"])
    if path in EXPERIMENTS:
        assert tagged == 1 and not outputs
    else:
        assert tagged == 0 and outputs
    assert path.stat().st_size < 400_000


def test_library_notebooks_run():
    done = subprocess.run(
        [tool("nbdev_test"), "--path", "nbs", "--file_glob", "[0-9]*.ipynb", "--n_workers", "2", "--do_print"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_environments_agree():
    ours, project = settings(), tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    library, tools = ours["requirements"].split(), ours["dev_requirements"].split()
    assert project["dependencies"] == library
    assert project["optional-dependencies"]["dev"] == tools
    environment = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    assert next(d["pip"] for d in environment if isinstance(d, dict)) == library + tools
    pinned = re.search(r"TORCH := (\S+)", (REPO / "Makefile").read_text())[1]
    assert pinned == "torch==2.13.0"


def test_the_library_needs_no_notebook_tool():
    modules = [p.stem for p in (REPO / "wrapperlib").glob("*.py") if p.stem not in ("__init__", "_modidx")]
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module("wrapperlib." + name)
print([m for m in ("nbdev", "fastcore", "execnb", "jupyter", "papermill", "IPython", "ipykernel", "nbformat", "jupytext") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_documented():
    import ast

    bare = []
    for path in sorted((REPO / "wrapperlib").glob("*.py")):
        if path.stem in ("__init__", "_modidx"):
            continue
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                bare.append(f"{path.stem}.{node.name}")
    assert not bare
