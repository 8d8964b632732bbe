"""The site's pages, made of the notebooks, README.md and the committed results; MkDocs calls the functions that begin with `on_`.

A result folder that appears under outputs/ appears on the site: nothing here is a list of experiments.
"""

import ast
import html
import importlib
import inspect
import json
import posixpath
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import latex2mathml.converter
import pandas as pd
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path[:0] = [str(HERE), str(REPO)]

import explorer  # noqa: E402

from wrapperlib import claims as judging  # noqa: E402

SCALES = ("desk", "paper", "desk_paper", "smoke")  # whose results are linked first
MEASURED = ("bench_", "faults")  # what is no experiment of the paper's
VARIANTS = ("index", "quarter")  # what a folder's name says beside the scale
VERDICTS = dict(holds="✓ holds", fails="✗ fails", inconclusive="? inconclusive")
SAME = {
    "outputs/VERDICTS.md": "claims.md",
    "docs/pages/results.md": "results.md",
    "README.md": "index.md",
}  # what the site has a page for
FROM_PAGES = "../../"  # a page of docs/pages can be read in the repository, too: it links from where it lies
ROOM = re.compile(r"\d\d_")


# --- notebooks ---------------------------------------------------------------------------------------------------------


@cache
def notebook(
    path: Path,  # an .ipynb
) -> dict:
    "The notebook as JSON."
    return json.loads(path.read_text())


def source(cell: dict) -> str:
    return "".join(cell["source"])


def title(path: Path) -> str:
    "What the notebook is called: its first heading."
    return re.search(r"^# (.+)", source(notebook(path)["cells"][0]), re.M)[1]


def question(path: Path) -> str:
    "What the notebook answers: the quote under its heading."
    return re.search(r"^> (.+)", source(notebook(path)["cells"][0]), re.M)[1]


def library() -> list[Path]:
    "The rooms, in reading order."
    return sorted(p for p in (REPO / "nbs").glob("*.ipynb") if ROOM.match(p.name))


def howtos() -> list[Path]:
    return sorted((REPO / "nbs").glob("howto_*.ipynb"))


@cache
def results() -> tuple[Path, ...]:
    "Executed copies of experiments and benchmarks, that of the most telling scale first; scale smoke means nothing."
    found = [p for p in (REPO / "outputs").glob("*/**/*.ipynb") if p.stem in p.parts[:-1]]
    found = [
        p
        for p in found
        if not {"runs", "earlier"} & set(p.relative_to(REPO).parts) and not label(p).startswith("smoke")
    ]
    read = (REPO / "README.md").read_text()  # its order is that of reading
    return tuple(sorted(found, key=lambda p: (read.find(f"[{p.stem}]") % 10**9, p.stem, *rank(label(p)))))


def label(
    path: Path,  # an executed copy, or a file beside it
) -> str:
    "The folder under the experiment's name: the scale, and the task if it is not count; empty for benchmarks."
    parts = path.relative_to(REPO).parts
    return parts[2] if parts[0] == "outputs" and len(parts) > 3 else ""


def scale_and_variant(
    folder: str,  # as from `label`
) -> tuple[str, list[str]]:
    "`desk_index_quarter` → desk, and index and quarter."
    words = folder.split("_")
    return "_".join(w for w in words if w not in VARIANTS), [w for w in words if w in VARIANTS]


def rank(folder: str) -> tuple[int, str]:
    return next((i for i, s in enumerate(SCALES) if scale_and_variant(folder)[0] == s), 9), folder


def not_run() -> list[Path]:
    "Experiments of which there are no results yet."
    made = {p.stem for p in results()}
    return sorted(
        p for p in (REPO / "nbs").glob("*.ipynb") if p.name.startswith(("exp_", *MEASURED)) and p.stem not in made
    )


def where(
    path: Path,  # a file of the repository
) -> str:
    "Its address in the site's sources, the same as in the repository."
    return path.relative_to(REPO).as_posix()


def executed(
    address: str,  # a link's target, from the repository's root
) -> str:
    "Where a reader wants to arrive: at the executed copy of an experiment, at the site's own page of claims, results or README."
    if address in SAME:
        return SAME[address]
    copies = [p for p in results() if address == f"nbs/{p.name}"]
    return where(copies[0]) if copies else address


def as_read(
    path: Path,  # a notebook
) -> dict:
    "The notebook as it is read: without what is for nbdev, papermill or nobody; figures have a text, rooms their API."
    cells = [shown(c) for c in notebook(path)["cells"] if not re.match(r"#\| ?(hide|default_exp)\b", source(c))]
    heading = ""
    for cell in filter(None, cells):
        heading = (
            (re.findall(r"^#+ (.+)", source(cell), re.M) or [heading])[-1]
            if cell["cell_type"] == "markdown"
            else heading
        )
        describe_figures(cell, heading)
    cells = [c for c in cells if c]
    if path in results():
        cells.insert(1, markdown(provenance_line(path)))
    if ROOM.match(path.name):
        cells += [markdown(text) for text in api(path)]
    kernel = dict(name="python3", language="python", display_name="python3")
    numbered = [c | dict(id=c.get("id") or f"api-{i}") for i, c in enumerate(cells)]
    return dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=kernel), cells=numbered)


def markdown(text: str) -> dict:
    return dict(cell_type="markdown", metadata={}, source=with_math(text))


def shown(cell: dict) -> dict | None:
    "A cell without directives, tags and what was written to stderr; None if nothing is left."
    text = re.sub(r"^#\|.*\n?", "", source(cell), flags=re.M).strip("\n")
    if cell["cell_type"] != "code":
        return markdown(text) | dict(id=cell.get("id"))
    outputs = [dict(o) for o in cell["outputs"] if o.get("name") != "stderr"]
    return dict(cell, source=text, metadata={}, outputs=outputs) if text or outputs else None


def describe_figures(cell: dict, heading: str) -> None:
    "Alternative text for a cell's images: what the function that drew them says it draws, else the heading above."
    images = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    drawn = [said for name in re.findall(r"(\w+)\(", source(cell)) if (said := figure_says(name))]
    for i, output in enumerate(images):
        text = (drawn[min(i, len(drawn) - 1)] if drawn else f"Figure: {heading}").rstrip(".")
        text += f" ({i + 1} of {len(images)})" if len(images) > 1 else ""
        words = html.escape(text.replace("`", ""), quote=True)
        output["data"] = {
            "text/html": f'<img alt="{words}" src="data:image/png;base64,{output["data"]["image/png"].strip()}">'
        }


def figure_says(name: str) -> str | None:
    "The docstring of the function of that name in one of the modules that draw."
    for path in sorted((REPO / "wrapperlib").glob("*figures*.py")):
        found = getattr(importlib.import_module(f"wrapperlib.{path.stem}"), name, None)
        if inspect.isfunction(found) and "Figure" in str(found.__annotations__.get("return")):
            return inspect.getdoc(found)


def provenance_line(path: Path) -> str:
    "Scale, seeds and files of an executed copy."
    made = about(path)
    files = ", ".join(
        f"[{p.name}]({p.name})" for p in sorted(path.parent.glob("*.csv")) + sorted(path.parent.glob("claims.json"))
    )
    scale = f"scale {label(path)}{seeds_of(path)}, " if label(path) else ""
    on = f", {made['device']}" if made.get("device") else ""
    return f"*{scale}made {made['made'][:10]}{on}.* {files}"


# --- the API, from the docments ------------------------------------------------------------------------------------------


def api(
    path: Path,  # a room's notebook
) -> list[str]:
    "A heading and a table for each public name that the notebook exports, in the order in which they stand."
    name = re.search(r"#\| default_exp (\w+)", "\n".join(map(source, notebook(path)["cells"])))[1]
    lines = (REPO / "wrapperlib" / f"{name}.py").read_text()
    nodes = [
        n
        for n in ast.parse(lines).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
    ]
    return [f"## API of wrapperlib.{name}", *(entry(n, f"{name}.", lines.splitlines()) for n in nodes)] if nodes else []


def entry(
    node: ast.FunctionDef | ast.ClassDef,  # a public name
    of: str,  # its module or class, with a dot
    lines: list[str],  # of its module
) -> str:
    "Heading, docstring and parameters of a function, a class or its public methods."
    parts = [
        f"{'###' if of.islower() else '####'} {of}{node.name}",
        ast.get_docstring(node) or "",
        parameters(node, lines),
    ]
    if isinstance(node, ast.ClassDef):
        methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
        parts += [entry(m, f"{node.name}.", lines) for m in methods]
    return "\n\n".join(p for p in parts if p)


def parameters(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str:
    "A table of the parameters or fields, each with the comment behind it."
    if isinstance(node, ast.ClassDef):
        given = [(f.target.id, f.annotation, f.value, f) for f in node.body if isinstance(f, ast.AnnAssign)]
    else:
        names = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        defaults = [None] * (len(names) - len(node.args.defaults) - len(node.args.kwonlyargs))
        defaults += node.args.defaults + node.args.kw_defaults
        given = [
            (a.arg, a.annotation, d, a) for a, d in zip(names, defaults, strict=True) if a.arg not in ("self", "cls")
        ]
    rows = [
        f"<tr><td><code>{n}</code></td><td><code>{html.escape(ast.unparse(t)) if t else ''}</code></td>"
        f"<td>{f'<code>{html.escape(ast.unparse(d))}</code>' if d else ''}</td><td>{comment(at, lines)}</td></tr>"
        for n, t, d, at in given
    ]
    back = getattr(node, "returns", None)
    returns = f"Returns `{ast.unparse(back)}`." if back and ast.unparse(back) != "None" else ""
    head = "<tr><th>name</th><th>type</th><th>default</th><th>meaning</th></tr>"
    table = f'<table class="api"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>' if rows else ""
    return "\n\n".join(p for p in (table, returns) if p)


def comment(node: ast.AST, lines: list[str]) -> str:
    found = re.search(r"(?:^|\s)# (.*)$", lines[node.end_lineno - 1])
    return with_code(html.escape(found[1])) if found else ""


def with_code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


# --- mathematics and links -----------------------------------------------------------------------------------------------


def with_math(
    text: str,  # Markdown
) -> str:
    "Formulas between dollars as MathML, which browsers draw by themselves; code is left as it is."
    indented = (
        r"(?:\A|(?<=\n\n))(?: {4}[^\n]*(?:\n|\Z)|\n(?= {4}))+"  # a block of code, as a shell's $VARIABLES stand in
    )
    parts = re.split(rf"(```.*?```|{indented}|`[^`\n]+`)", text, flags=re.S)
    return "".join(
        p if i % 2 else re.sub(r"(?<![\\$])(\$\$?)(?=\S)([^$]+?)(?<=\S)\1(?![\d$])", mathml, p)
        for i, p in enumerate(parts)
    )


def mathml(found: re.Match) -> str:
    display = "block" if found[1] == "$$" else "inline"
    upright = re.sub(r"_\{([A-Za-z]{2,})([0-9]?)\}", r"_{\\mathrm{\1}\2}", found[2])  # C_Tr: a word, not T times r
    return latex2mathml.converter.convert(upright, display=display).replace("\n", "")


def resolved(
    link: str,  # as it stands in a page
    page: str,  # the page's address in the repository
    files,  # MkDocs' files
) -> str | None:
    "The link as it must be on the site; None for one that is not to a page or file of the site."
    target, _, anchor = link.partition("#")
    if re.match(r"[a-z]+:", link) or not target:
        return link
    folder = posixpath.dirname(page)
    address = posixpath.normpath(posixpath.join(folder, target))
    if files.get_file_from_path(executed(address)) is None:  # prose of an experiment is written in nbs/
        address = posixpath.normpath(posixpath.join("nbs", target))
    found = files.get_file_from_path(executed(address))
    return (
        None
        if found is None
        else posixpath.relpath(found.dest_uri, posixpath.dirname(files.get_file_from_path(page).dest_uri))
        + (f"#{anchor}" if anchor else "")
    )


# --- the pages that are derived ------------------------------------------------------------------------------------------


def readme(
    heading: str | None = None,  # of a section; None: what comes before the first
) -> str:
    "A part of README.md."
    text = (REPO / "README.md").read_text()
    if heading is None:
        return re.split(r"^## ", text, flags=re.M)[0].split("\n", 1)[1]
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


@cache
def judged() -> tuple[tuple[Path, tuple[dict, ...]], ...]:
    "Executed notebooks with claims, and the claims."
    files = [(p, p.parent / "claims.json") for p in results()]
    return tuple((p, tuple(json.loads(c.read_text()))) for p, c in files if c.exists())


def named(path: Path) -> str:
    "The experiment and whose results they are, e.g. `Revival, desk`."
    scale, variant = scale_and_variant(label(path))
    return ", ".join(x for x in (title(path), scale) if x) + (": " + ", ".join(variant) if variant else "")


def badge(verdict: str, because: str = "") -> str:
    text = f'<span class="verdict {verdict}">{VERDICTS[verdict]}</span>'
    return text + (f"<small>{html.escape(because)}</small>" if because else "")


def counts(claims: tuple[dict, ...]) -> str:
    found = Counter(c["verdict"] for c in claims)
    return " ".join(f'<span class="verdict {v}">{found[v]} {VERDICTS[v]}</span>' for v in VERDICTS if found[v])


def number(x: float | None) -> str:
    return "?" if x is None else f"{x:.3g}"


def statistic(c: dict) -> str:
    "Value and interval of a claim."
    kind = "seeds" if c["interval_of"] == "seeds" else "measurement"
    return f"{judging.shown(c)} <small>90 % over {kind}</small>" if c["seeds"] else "not measured"


def made_by(path: Path) -> str:
    "Anchor of the cell that judges."
    cells = [c for c in notebook(path)["cells"] if "verdict_table(" in source(c)]
    return f"#cell-id={cells[-1]['id']}" if cells else ""


@cache
def defined() -> dict[str, str]:
    "Claim → a link to the cell of a room that defines it: by `Claim`, or by a function of like claims, whose first argument is the id as well."
    found = {}
    for path in library():
        for cell in notebook(path)["cells"]:
            if "#| export" in source(cell):
                for name in re.findall(r'(?<!=)\(\s*"([CS]\d+\w?)"[,)]', source(cell)):
                    found.setdefault(name, a("defined", path, f"#cell-id={cell['id']}"))
    return found


def table(
    rows: list[dict],  # column → HTML; `_id`, if there, is the row's anchor
) -> str:
    "An HTML table whose rows become blocks where the page is narrow."
    head = "".join(f"<th>{k}</th>" for k in rows[0] if k != "_id")
    body = ""
    for row in rows:
        cells = "".join(f'<td data-label="{k}">{v}</td>' for k, v in row.items() if k != "_id")
        body += f'<tr id="{row["_id"]}">{cells}</tr>' if "_id" in row else f"<tr>{cells}</tr>"
    return f'<table class="blocks"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def a(text: str, path: Path, anchor: str = "") -> str:
    "A link to a page or file of the repository."
    return f'<a href="{where(path)}{anchor}">{html.escape(text)}</a>'


def ledger(path: Path, claims: tuple[dict, ...]) -> str:
    "One experiment's claims; each row can be linked to."
    return table([entry_of(c, path) for c in claims])


def entry_of(c: dict, path: Path) -> dict:
    "One claim's row."
    links = [a("judged", path, made_by(path))] + ([defined()[c["id"]]] if c["id"] in defined() else [])
    exploratory = " <em>(exploratory)</em>" if c["exploratory"] else ""
    each = ", ".join(number(x) for x in c["per_seed"])
    words = (with_code(html.escape(c[k])) for k in ("statement", "statistic"))
    return {
        "_id": f"{path.stem}-{label(path)}-{c['id']}",
        "id": f"<strong>{c['id']}</strong>",
        "claim and statistic": f"{next(words)}{exploratory}<small>{next(words)}</small>",
        "threshold": c["threshold"].replace(">=", "≥").replace("<=", "≤"),
        "value": statistic(c),
        "seeds": f"{c['seeds']}<small>{each}</small>",
        "verdict": badge(c["verdict"], c["because"]),
        "the paper": html.escape(c["paper"]),
        "cell": " ".join(links),
    }


def verdicts_in_short() -> str:
    return table(
        [{"experiment": a(named(p), p), "what it answers": question(p), "verdicts": counts(c)} for p, c in judged()]
    )


def main_verdicts() -> str:
    "The ledger of the first figure: that of the revival experiment, or of whatever comes first."
    found = [(p, c) for p, c in judged() if p.stem == "exp_revival"] or list(judged())
    return ledger(*found[0])


def all_ledgers() -> str:
    parts = []
    for path, claims in judged():
        parts += [f"## {named(path)}", f"[executed notebook]({where(path)}) · {counts(claims)}", ledger(path, claims)]
        parts += judging.asked_since(list(claims), label(path))
    return "\n\n".join(parts)


def rooms() -> str:
    return table(
        [
            {
                "notebook": a(title(p), p),
                "module": f"<code>{p.stem.split('_', 1)[1]}</code>",
                "what it says": question(p),
            }
            for p in library()
        ]
    )


def list_of(kind: str | tuple[str, ...]) -> str:
    "Results of experiments (`exp_`), or of benchmarks and faults (`MEASURED`), and what was not run yet."
    claims = dict(judged())
    made = [p for p in results() if p.stem.startswith(kind)]
    rows = [
        {"results": a(named(p), p), "what it answers": question(p)}
        | ({"verdicts": counts(claims.get(p, ()))} if claims.keys() & set(made) else {})
        for p in made
    ]
    rows += [
        {"results": a(title(p), p) + " <small>no results yet</small>", "what it answers": question(p)}
        for p in not_run()
        if p.stem.startswith(kind)
    ]
    return table(rows)


def list_of_howtos() -> str:
    return table([{"how to": a(title(p), p), "what it shows": question(p)} for p in howtos()]) if howtos() else ""


def the_paper() -> str:
    "Every figure and table of the paper: whether it was made again, by what and at which scale."
    return table([row_of(r) for r in pd.read_csv(HERE / "paper.csv", keep_default_na=False).itertuples()])


def row_of(r) -> dict:
    "One figure or table of the paper; `r` is a row of paper.csv."
    plan, variant = REPO / "nbs" / f"{r.notebook}.ipynb", r.variant.split()
    made = [p for p in results() if p.stem == r.notebook and scale_and_variant(label(p))[1] == variant]
    ready = made or (plan.exists() and r.notebook)
    room = bool(ROOM.match(r.notebook))  # drawn where it is explained
    kind = "holds" if made or room else "inconclusive"
    words = "✓ made again" if made or room else "can be run, no results yet" if ready else "not done"
    links = [a(named(p), p) for p in made] or ([a(title(plan), plan)] if ready else [])
    return {
        "the paper's": f"<strong>{r.item}</strong>",
        "what it shows": r.shows,
        "status": f'<span class="verdict {kind}">{words}</span><small>{r.note}</small>',
        "scale and seeds": "<br>".join(f"{scale_and_variant(label(p))[0]}{seeds_of(p)}" for p in made) or "–",
        "where": "<br>".join(links) or "–",
    }


def seeds_of(path: Path) -> str:
    seeds = about(path)["parameters"].get("seeds")
    return f", {seeds} seed{'s' if seeds > 1 else ''}" if seeds else ""


def about(path: Path) -> dict:
    "How the results beside an executed copy were made."
    return json.loads((path.parent / "provenance.json").read_text())


def cell_by_cell() -> str:
    "The numbers of the paper's tables beside ours, from each tables.csv."
    parts = []
    for path in results():
        file = path.parent / "tables.csv"
        if (
            file.exists()
            and path.stem.startswith("exp_")
            and {"ours", "paper", "metric"} <= set(pd.read_csv(file, nrows=0))
        ):
            cells = pd.read_csv(file).dropna(subset=["paper"])
            parts += [
                f"### {named(path)}",
                f"{len(cells)} cells; ours are {100 * cells['difference'].abs().mean():.0f} points from the paper's on average. Accuracies in %, ours as mean [lowest, highest seed].",
            ]
            parts += [
                f"<details markdown><summary>{asked}</summary>\n\n{side_by_side(cells[cells['metric'] == m])}\n\n</details>"
                for m, asked in dict(acc_opt="asked for O_PT", acc_oft="asked for O_FT").items()
            ]
    return "\n\n".join(parts)


def side_by_side(cells: pd.DataFrame) -> str:
    "A row for each rate, prior and C_Tr, a column for each C_Te and share of the fine-tuning's steps."
    cells = cells.assign(
        cell=[
            f"{100 * o:.0f} [{100 * lo:.0f}, {100 * hi:.0f}] / **{100 * p:.0f}**"
            for o, lo, hi, p in zip(cells["ours"], cells["low"], cells["high"], cells["paper"], strict=True)
        ],
        at=[
            f"C_Te = {c:g}, {'before' if not a else f'{100 * a:.0f} % of the steps'}"
            for c, a in zip(cells["c_te"], cells["at"], strict=True)
        ],
    )
    order = list(dict.fromkeys(cells.sort_values(["c_te", "step"])["at"]))
    wide = cells.pivot(index=["rate", "prior", "c_tr"], columns="at", values="cell")[order].reset_index()
    rows = ["| " + " | ".join(map(str, r)) + " |" for r in wide.fillna("").itertuples(index=False)]
    return "\n".join(
        [
            "| rate | prior | C_Tr | " + " | ".join(f"{c}: ours / paper" for c in wide.columns[3:]) + " |",
            "|---" * len(wide.columns) + "|",
            *rows,
        ]
    )


FILLED = dict(
    question=readme,
    commands=lambda: readme("Two commands"),
    words=lambda: readme("Words"),
    limits=lambda: readme("What was not verified"),
    citing=lambda: readme("Citing"),
    verdicts=main_verdicts,
    in_short=verdicts_in_short,
    ledger=all_ledgers,
    rooms=rooms,
    experiments=lambda: list_of("exp_"),
    benchmarks=lambda: list_of(MEASURED),
    howtos=list_of_howtos,
    paper=the_paper,
    cell_by_cell=cell_by_cell,
    explorer=lambda: explorer.embedded(REPO / "outputs"),
)


def pictures() -> list[Path]:
    "What README.md and the pages that are written by hand show of the results."
    texts = [(REPO / "README.md").read_text(), *(p.read_text() for p in sorted((HERE / "pages").glob("*.md")))]
    return [
        REPO / p
        for text in texts
        for p in re.findall(rf"!\[[^]]*\]\((?:{re.escape(FROM_PAGES)})?(outputs/[^)]+)\)", text)
    ]


# --- what MkDocs calls -----------------------------------------------------------------------------------------------------


def on_config(config):
    "The navigation, from what is there."
    for cached in (notebook, results, judged, defined):
        cached.cache_clear()  # docs-serve builds again when something has changed

    def entries(paths, name=named):
        return [{name(p): where(p)} for p in paths]

    found = {kind: [p for p in results() if p.stem.startswith(kind)] for kind in ("exp_", MEASURED)}
    waiting = {kind: [p for p in not_run() if p.stem.startswith(kind)] for kind in found}
    config.nav = [
        {"Home": "index.md"},
        {"Results": "results.md"},
        {"Explorer": "explorer.md"},
        {"Claims": "claims.md"},
        {"Paper and ours": "paper.md"},
        {"The book": ["book/index.md", *entries(library(), title)]},
        {"Experiments": ["experiments/index.md", *entries([*found["exp_"], *waiting["exp_"]])]},
        {"Benchmarks and faults": ["benchmarks/index.md", *entries([*found[MEASURED], *waiting[MEASURED]])]},
        {"How to": ["howto/index.md", *entries(howtos(), title)]},
    ]
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    "Notebooks as they are read, what their pages link to, and the script of the explorer."
    made = REPO / "build" / "pages"
    for path in [*library(), *howtos(), *results(), *not_run()]:
        page = made / where(path)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(json.dumps(as_read(path)))
        files.append(File(where(path), str(made), config.site_dir, config.use_directory_urls))
    data = [p for r in results() for p in [*r.parent.glob("*.csv"), *r.parent.glob("claims.json")]]
    for path in {*data, *pictures()}:
        files.append(File.generated(config, where(path), abs_src_path=str(path)))
    files.append(File.generated(config, "assets/explorer.js", content=explorer.script()))
    return files


def on_page_markdown(text, page, config, files):
    "Fill in what is derived; links and formulas as on every page."
    text = re.sub(r"\{\{ (\w+) \}\}", lambda m: FILLED[m[1]](), text)
    text = re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", lambda m: link_in_markdown(m, page.file.src_uri, files), text)
    text = re.sub(
        r'href="((?:nbs|outputs)/[^"#]+)([^"]*)"', lambda m: f'href="{from_page(m[1], page, files)}{m[2]}"', text
    )
    return with_math(text)


def from_page(address: str, page, files) -> str:
    found = files.get_file_from_path(executed(address))
    return posixpath.relpath(found.dest_uri, posixpath.dirname(page.file.dest_uri))


def link_in_markdown(found: re.Match, page: str, files) -> str:
    "A link from the repository's root as one from the page; to a file that the site does not have, its text alone."
    target, _, anchor = found[3].partition("#")
    if re.match(r"[a-z]+:", target) or not target:
        return found[0]
    at = executed(posixpath.normpath(target.removeprefix(FROM_PAGES)))
    if files.get_file_from_path(at) is None:
        return found[2]
    at = posixpath.relpath(at, posixpath.dirname(page))
    return f"{found[1]}[{found[2]}]({at}{'#' + anchor if anchor else ''})"


def on_post_page(output, page, config):
    "The one script that the theme would load from elsewhere is here, too; the search box has a name for those who do not see it."
    here = posixpath.relpath("assets/iframe-worker.js", posixpath.dirname(page.file.dest_uri))
    output = output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
    return output.replace("https://unpkg.com/iframe-worker/shim", here)


def on_page_content(text, page, config, files):
    "A notebook's cells without the styles and scripts that nbconvert puts before them; the site has its own."
    text = re.sub(
        r'<(pre|table(?! class="blocks"))\b', r'<\1 tabindex="0"', text
    )  # what scrolls can be reached by keys
    if not page.file.src_uri.endswith(".ipynb"):
        return text
    text = text[text.index('<div class="jupyter-wrapper">') :]
    text = re.sub(r'<div class="zeroclipboard-container">.*?</clipboard-copy>\s*</div>', "", text, flags=re.S)
    text = re.sub(r'<div class="clipboard-copy-txt"[^>]*>.*?</div>', "", text, flags=re.S)
    text = text.replace("highlight-ipynb", "highlight")

    seen = Counter()

    def heading(m):
        seen[m[2]] += 1
        return f'{m[1]}{m[2]}{f"_{seen[m[2]] - 1}" if seen[m[2]] > 1 else ""}"'  # as the table of contents has it

    text = re.sub(r'(<h[1-6][^>]*? id=")([^"]+)"', heading, text)

    def link(m):
        to = resolved(html.unescape(m[1]), page.file.src_uri, files)
        return m[0] if to is None else f'href="{to}"'

    return re.sub(r'href="([^"]+)"', link, text)
