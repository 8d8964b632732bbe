"The page on which results are explored: four charts of what was measured, moved by the same controls, with all data inside the page."

import json
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert

from wrapperlib.protocols import SCALES

HERE = Path(__file__).parent
O_PT, O_FT = "O_PT (a)", "O_FT (b)"
LEGEND = alt.Legend(symbolType="stroke", symbolOpacity=1, symbolStrokeWidth=3)
COLOURS = alt.Scale(domain=[O_PT, O_FT], range=["#2a8fd8", "#de8f05"])  # told apart by colour-blind readers
LABELS = ["task", "prior", "c_tr", "rate"]  # of a fine-tuned model


# --- data: mean and range over seeds ---------------------------------------------------------------------------------------


def tables(
    outputs: Path,  # the folder of results
    name: str,  # an experiment
) -> pd.DataFrame:
    "Its results at desk, or at the first scale there is, of each task: with columns task and rate, the name of `ft_lr`."
    found = []
    for task, folder in dict(count="desk", index="desk_index").items():
        path = outputs / name / folder / "results.csv"
        if path.exists():
            names = {lr: n for n, lr in SCALES[folder.split("_")[0]].rates.items()}
            table = pd.read_csv(path)
            table = table.assign(task=task, rate=table["ft_lr"].map(names))
            found.append(table.assign(back=table["re_lr"].map(names)) if "re_lr" in table else table)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def over_seeds(table: pd.DataFrame, *labels: str) -> list[dict]:
    "Mean, lowest and highest value over seeds, a record each."
    found = table.groupby(list(labels), dropna=False)["value"].agg(["mean", "min", "max"]).round(3).reset_index()
    return json.loads(found.rename(columns=dict(mean="y", min="low", max="high")).to_json(orient="records"))


def behaviour(outputs: Path) -> list[dict]:
    table = tables(outputs, "exp_behavior")
    table = table[table["metric"].isin(["acc_opt", "acc_oft"])]
    table = table[(table["c_te"] == 0) | (table["metric"] == "acc_oft")]
    table = table.assign(
        whose=table["metric"].map(dict(acc_opt=O_PT, acc_oft=O_FT)),
        line=table["c_te"].map({0: "C_Te = 0", 1: "C_Te = 1"}),
    )
    return over_seeds(table, *LABELS, "whose", "line", "step")


def revival(outputs: Path) -> list[dict]:
    "reFT of every fine-tuned model that was sent back, and the control, which has neither prior nor C_Tr nor rate."
    table = pd.concat([tables(outputs, n) for n in ("exp_revival", "exp_sweeps")], ignore_index=True)
    table = table[(table["metric"] == "acc_opt") & (table["c_te"] == 0) & table["protocol"].isin(["reft", "scr_ft"])]
    if "part" in table:
        table = table[table["part"].isna() | (table["part"] == 1)]
    table = table.drop_duplicates(["protocol", "seed", *LABELS, "back", "step"])  # one run, shown by two experiments
    table = table.assign(line=table["protocol"].map(dict(reft="reFT", scr_ft="control: Scr.+FT")))
    return over_seeds(table, *LABELS, "back", "line", "step")


def probes(outputs: Path) -> list[dict]:
    table = tables(outputs, "exp_probing")
    lines = dict(fine_tuning="fine-tuned", pretraining="pretrained")
    table = table[(table["metric"] == "accuracy") & table["protocol"].isin(lines)]
    sites = {s: f"B{i}" for i, s in enumerate(table["site"].unique())}
    table = table.assign(
        line=table["protocol"].map(lines),
        whose=table["operand"].map(dict(a=O_PT, b=O_FT)),
        block=table["site"].map(sites),
    )
    return over_seeds(table, *LABELS, "whose", "line", "block")


def pruned(outputs: Path) -> list[dict]:
    table = tables(outputs, "exp_pruning")
    table = table[table["metric"].isin(["acc_opt", "acc_oft"]) & table["way"].isin(["top", "random"])]
    table = table.assign(
        whose=table["metric"].map(dict(acc_opt=O_PT, acc_oft=O_FT)),
        line=table["way"].map(dict(top="highest scores", random="random rows")),
    )
    return over_seeds(table, *LABELS, "whose", "line", "k")


# --- charts ------------------------------------------------------------------------------------------------------------------


def control(name: str, says: str, values: list, start) -> alt.Parameter:
    "A list to choose from; labels say what a value is."
    return alt.param(name=name, value=start, bind=alt.binding_select(options=values, name=says))


def accuracy(**more) -> alt.Y:
    return alt.Y("y:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]), **more)


def panel(
    data: str,  # its name
    x: alt.X,
    title: str,
    where: str,  # Vega expression: the rows that are shown
    dashes: list[str],  # kinds of line, the first drawn through
    colour: alt.Color,
) -> alt.LayerChart:
    "Mean and range of the chosen rows; where there are none, it says so."
    rows = alt.Chart(alt.NamedData(name=data)).transform_filter(where)
    own = colour.shorthand != "line:N"  # colours say something else than dashes; the legend is theirs
    dash = alt.StrokeDash(
        "line:N", title=None, scale=alt.Scale(domain=dashes, range=[[1, 0], [5, 3]]), legend=None if own else LEGEND
    )
    band = rows.mark_area(opacity=0.15).encode(
        x=x, y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=colour, detail="line:N"
    )
    line = rows.mark_line(point=alt.OverlayMarkDef(size=14)).encode(
        x=x, y=accuracy(), color=colour, strokeDash=dash, tooltip=["line:N", x.shorthand, "y:Q", "low:Q", "high:Q"]
    )
    any_row = (
        alt.Chart(alt.NamedData(name=data))
        .transform_calculate(there=f"({where}) ? 1 : 0")
        .transform_aggregate(n="sum(there)")
    )
    empty = (
        any_row.transform_filter("datum.n == 0")
        .mark_text(fontSize=14, align="right", dx=-12)
        .encode(text=alt.value("not measured"), x=alt.value("width"), y=alt.value(100))
    )
    return alt.layer(band, line, empty).properties(
        title=alt.TitleParams(title, subtitle=f"──── {dashes[0]}, ┄┄┄┄ {dashes[1]}" if own else ""),
        width=400,
        height=220,
    )


def at_step(data: str, x: alt.X, where: str, colour: alt.Color) -> alt.LayerChart:
    "A line at the chosen step, and the values there."
    rows = alt.Chart(alt.NamedData(name=data)).transform_filter(f"({where}) && datum.step == step")
    rule = rows.mark_rule(strokeDash=[2, 2], opacity=0.6).encode(x=x)
    point = rows.mark_point(filled=True, size=70, opacity=1).encode(x=x, y=accuracy(), color=colour)
    return (
        rule
        + point
        + rows.mark_text(dx=9, dy=-9, align="left").encode(
            x=x, y=accuracy(), text=alt.Text("y:Q", format=".0%"), color=colour
        )
    )


def charts(
    data: dict[str, list[dict]],  # name → as from `over_seeds`
) -> alt.ConcatChart:
    "Behaviour, probes, pruning and revival of the model that is chosen."
    model = "datum.task == task && datum.prior == prior && datum.c_tr == c_tr && datum.rate == rate"
    pretrained = "(datum.line == 'pretrained' && datum.task == task && datum.prior == prior)"
    back = f"datum.back == back && datum.task == task && ((datum.line == 'reFT' && {model}) || datum.line != 'reFT')"
    last = max(r["step"] for r in data["behaviour"])
    steps = alt.X(
        "step:Q",
        title="step of fine-tuning",
        scale=alt.Scale(type="symlog", constant=1, domain=[0, last]),
        axis=alt.Axis(values=[0, 1, 3, 10, 30, 100, 400]),
    )
    on = alt.Color("whose:N", title=None, scale=COLOURS, legend=LEGEND)
    who = alt.Color(
        "line:N",
        title=None,
        scale=alt.Scale(domain=["reFT", "control: Scr.+FT"], range=["#2a8fd8", "#029e73"]),
        legend=LEGEND,
    )
    way = steps.copy()
    way.title = "step of the way back"
    panels = [
        panel("behaviour", steps, "Behaviour: what it answers", model, ["C_Te = 0", "C_Te = 1"], on)
        + at_step("behaviour", steps, model, on),
        panel("revival", way, "Revival: counting a on the way back", back, ["reFT", "control: Scr.+FT"], who)
        + at_step("revival", way, back, who),
        panel(
            "probes",
            alt.X("block:N", title="after block", axis=alt.Axis(labelAngle=0)),
            "Probes: what can be read off",
            f"({model}) || {pretrained}",
            ["fine-tuned", "pretrained"],
            on,
        ),
        panel(
            "pruned",
            alt.X(
                "k:Q",
                title="pruned rows",
                scale=alt.Scale(type="symlog", constant=5, domain=[0, 100]),
                axis=alt.Axis(values=[0, 2, 5, 10, 20, 50, 100]),
            ),
            "Pruning: without the rows that score highest",
            model,
            ["highest scores", "random rows"],
            on,
        ),
    ]
    values = {
        k: sorted(
            {r[k] for r in data["behaviour"]}, key=lambda v: (list("HML").index(v) if v in list("HML") else -1, v)
        )
        for k in ("task", "prior", "c_tr")
    }
    rates = list(SCALES["desk"].rates)
    controls = [
        control("task", "task", values["task"], "count"),
        control("prior", "prior", values["prior"], "L"),
        control("c_tr", "C_Tr", values["c_tr"], 1),
        control("rate", "rate of fine-tuning", rates, rates[1]),
        control("back", "rate of the way back", sorted({r["back"] for r in data["revival"]}), rates[1]),
        control("step", "step", sorted({r["step"] for r in data["behaviour"]}), 23),
    ]
    return (
        alt.concat(*panels, columns=2, spacing=30)
        .resolve_scale(color="independent", strokeDash="independent")
        .add_params(*controls)
    )


def embedded(
    outputs: Path,  # the folder of results
) -> str:
    "The page's charts as HTML: controls, a place for the charts, their specification with the data, the script."
    data = dict(behaviour=behaviour(outputs), revival=revival(outputs), probes=probes(outputs), pruned=pruned(outputs))
    spec = json.dumps(charts(data).to_dict() | dict(datasets=data), separators=(",", ":")).replace("</", "<\\/")
    return f"""<div id="explorer-controls" role="group" aria-label="what is shown"></div>
<div id="explorer-charts" role="img" aria-label="Four charts of the chosen model: behaviour, revival, probes and pruning"></div>
<p id="explorer-says" aria-live="polite"></p>
<script type="application/json" id="explorer-spec">{spec}</script>
<script src="assets/explorer.js" defer></script>"""


def script() -> str:
    "Vega-Lite with all it needs, from the package vl-convert, and ours."
    return "(() => {" + vl_convert.javascript_bundle((HERE / "explorer.js").read_text()) + "})();\n"
