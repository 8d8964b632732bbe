"What keeps the house in order: export, notebooks, environments, imports."

import ast
import configparser
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPO, cells
from wrapperlib.claims import as_markdown, in_short, judge_revival, page, shown
from wrapperlib.protocols import SCALES

NOTEBOOKS = sorted(REPO.glob("nbs/*.ipynb"))
LIBRARY = [p for p in NOTEBOOKS if p.name[0].isdigit()]
EXPERIMENTS = [p for p in NOTEBOOKS if p.name.startswith(("exp_", "bench_", "faults"))]


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


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    "README and results as they were committed: whoever makes results of their own has others in their outputs."
    folder = tmp_path_factory.mktemp("committed")
    if not (REPO / ".git").exists():
        ignored = shutil.ignore_patterns("runs", "smoke*", "earlier")
        shutil.copytree(REPO / "outputs", folder / "outputs", ignore=ignored)
        for name in ("README.md", "docs/pages/results.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
        return folder
    archive = subprocess.run(
        ["git", "archive", "HEAD", "README.md", "docs/pages/results.md", "outputs"],
        cwd=REPO,
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
    return folder


def test_the_verdicts_that_are_shown_are_those_of_the_committed_results(committed):
    assert (committed / "outputs/VERDICTS.md").read_text() == page(committed / "outputs"), (
        "run make verdicts, and commit"
    )
    for path in committed.glob("outputs/exp_*/desk*/claims.json"):
        assert not any(0 < c["seeds"] < 3 for c in json.loads(path.read_text())), path
    judged = json.loads((committed / "outputs/exp_revival/desk/claims.json").read_text())
    readme = (committed / "README.md").read_text()
    assert as_markdown(judged) in readme
    for name in re.findall(r"^\| \[(exp_\w+)\]\(", readme, re.M):
        found = {
            c.parent.name: in_short(json.loads(c.read_text())) for c in committed.glob(f"outputs/{name}/*/claims.json")
        }
        shown = [found.pop("desk", "")] + [
            f"{folder.replace('desk_index', 'index')}: {found[folder]}" for folder in sorted(found)
        ]
        row = next(line for line in readme.splitlines() if line.startswith(f"| [{name}]"))
        assert row.endswith(f"| {'; '.join(shown)} |"), (name, shown)


def test_the_committed_results_are_whole(committed):
    found = sorted(committed.glob("outputs/*/**/provenance.json"))
    assert len(found) > 15
    for path in found:
        for name, digest in json.loads(path.read_text())["files"].items():
            assert hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == digest, name
        [executed] = path.parent.glob("*.ipynb")
        papermill = json.loads(executed.read_text())["metadata"]["papermill"]
        assert papermill["end_time"] and not papermill["exception"]


@pytest.mark.parametrize("name", ["README.md", "docs/pages/results.md"])
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", (REPO / name).read_text()):
        path = (REPO / name).parent / target
        assert target.startswith("http") or path.exists(), target
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.+)", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles], anchor


def test_the_way_back_in_words_is_that_of_the_committed_results(committed):
    table = pd.read_csv(committed / "outputs/exp_revival/desk/results.csv", low_memory=False)
    desk = SCALES["desk"]
    judged = [
        judge_revival(t, desk.rates, desk.samples) for t in (table.query("seed < 3"), table.query("seed > 2"), table)
    ]
    text = (committed / "docs/pages/results.md").read_text()
    for claims in zip(*judged):
        [row] = re.findall(rf"^\| {claims[0]['id']} \|.*\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.M)
        for told, claim in zip(row, claims):
            value = shown(claim) if claim["seeds"] else "not measured"
            assert told.replace("*", "") == f"{value}, {claim['verdict']}", claim["id"]


def test_every_module_has_a_notebook():
    exported = {re.search(r"#\| default_exp (\w+)", p.read_text())[1] for p in LIBRARY}
    assert exported == {p.stem for p in (REPO / "wrapperlib").glob("*.py")} - {"__init__", "_modidx"}


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    shutil.copytree(
        REPO / "nbs", folder / "nbs", ignore=lambda _, names: [n for n in names if not n.endswith(".ipynb")]
    )
    shutil.copy(REPO / "settings.ini", folder)
    subprocess.run([tool("nbdev_clean")], cwd=folder, check=True)
    return folder / "nbs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(path, cleaned):
    assert json.loads((cleaned / path.name).read_text()) == json.loads(path.read_text()), "run make export"
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
    library = ours["requirements"].split()
    extras = {
        name: ours[f"{name}_requirements"].split() for name in ("dev", "tracr", "stories", "bench", "docs", "cluster")
    }
    assert project["dependencies"] == library
    assert project["optional-dependencies"] == extras
    environment = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    assert next(d["pip"] for d in environment if isinstance(d, dict)) == [
        *library,
        *(r for required in extras.values() for r in required),
    ]
    pinned = re.search(r"TORCH := (\S+)", (REPO / "Makefile").read_text())[1]
    assert pinned == "torch==2.13.0"


TESTED = ("dev", "tracr", "stories", "docs")  # extras that `make test` installs


@pytest.mark.parametrize("pins", sorted(REPO.glob("tests/versions-*.txt")), ids=lambda path: path.stem)
def test_the_pinned_versions_are_of_all_that_is_tested_and_within_its_bounds(pins):
    exact = {canonicalize_name(r.name): r for r in map(Requirement, pins.read_text().split())}
    assert all(re.fullmatch(r"==[^*,]+", str(r.specifier)) for r in exact.values())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = (r for name in TESTED for r in project["optional-dependencies"][name])
    for required in map(Requirement, [*project["dependencies"], *extras]):
        version = str(exact[canonicalize_name(required.name)].specifier).removeprefix("==")
        assert required.specifier.contains(version), f"{required}: {version} is pinned"


def test_the_library_needs_no_notebook_tool():
    modules = [p.stem for p in (REPO / "wrapperlib").glob("*.py") if p.stem not in ("__init__", "_modidx")]
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module("wrapperlib." + name)
print([m for m in ("nbdev", "fastcore", "execnb", "jupyter", "papermill", "IPython", "ipykernel", "nbformat", "jupytext", "jax", "tracr", "tokenizers", "datasets") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installed_library_has_all_modules_and_asks_for_no_notebook_tool(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("wrapperlib", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(REPO / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    assert {p.name for p in (site / "wrapperlib").glob("*.py")} == {p.name for p in (REPO / "wrapperlib").glob("*.py")}
    assert (site / "wrapperlib" / "paper_tables.csv").is_file()
    assert {p.name for p in (REPO / "wrapperlib").glob("*.safetensors")} == {
        p.name for p in (site / "wrapperlib").glob("*.safetensors")
    }
    metadata = next(site.glob("wrapperlib-*.dist-info/METADATA")).read_text()
    needed = [r for r in re.findall(r"Requires-Dist: (.*)", metadata) if "extra ==" not in r]
    assert len(needed) == len(settings()["requirements"].split())
    assert not re.search("nbdev|jupyter|papermill|ipykernel", " ".join(needed))


def test_every_public_name_is_documented():
    bare = []
    for path in sorted((REPO / "wrapperlib").glob("*.py")):
        if path.stem in ("__init__", "_modidx"):
            continue
        for node in _public(ast.parse(path.read_text())):
            bare += [f"{path.stem}.{x.name}" for x in (node, *_public(node)) if not ast.get_docstring(x)]
    bare = [name for name in bare if not name.endswith(".forward")]  # of layers, whose class says what they do
    assert not bare


def _public(node):
    "The public functions and classes of a module, the public methods of a class."
    if isinstance(node, ast.FunctionDef):
        return []
    return [x for x in node.body if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and not x.name.startswith("_")]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_parameter_has_a_type_and_a_meaning(path):
    [cell] = [c for c in cells(path.stem) if "parameters" in c["metadata"].get("tags", [])]
    for line in "".join(cell["source"]).splitlines():
        rest = line.split(": ", 1)[1]
        assert rest.startswith(("str = ", "int = ")) and "  # " in rest, line


@pytest.mark.parametrize("path", sorted((REPO / "tests").glob("test_*.py")), ids=lambda path: path.stem)
def test_what_a_test_asks_of_a_module_is_there(path):
    "Also what only slow tests and those for a GPU ask for, which seldom run."
    tree = ast.parse(path.read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "wrapperlib"]
    modules = {a.asname or a.name: importlib.import_module(f"wrapperlib.{a.name}") for i in imported for a in i.names}
    asked = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
    assert not [
        f"{n.value.id}.{n.attr}" for n in asked if n.value.id in modules and not hasattr(modules[n.value.id], n.attr)
    ]
