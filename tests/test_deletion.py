"The protocols on stories: who is trained on what, what is asked, and what a claim makes of it. All at smoke scale."

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from wrapperlib.checks import BadInput
from wrapperlib.deletion import (
    CONTROL,
    DELETIONS,
    LABELS,
    SIZES,
    Behaviour,
    Layers,
    Learned,
    asked,
    corpus,
    data_for,
    deletion_plan,
    found_in,
    judge_for,
    judge_run,
    loss_on,
    pretraining,
    questions,
    tuned,
)
from wrapperlib.runs import Store, train_all
from wrapperlib.stories import END, FEATURES, features_of, load_tokenizer, tokens_of
from wrapperlib.story_claims import STORY_CLAIMS, judge_stories, layers, over_steps, paper_table1, table1
from wrapperlib.tales import Exactly, detect, source_tales

pytest.importorskip("tokenizers")
SMOKE = SIZES["smoke"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("deletion")


@pytest.fixture(scope="module")
def data(place):
    return corpus(SMOKE, "tales", place)


@pytest.fixture(scope="module")
def store(place):
    return Store(place / "runs")


@pytest.fixture(scope="module")
def found(place, data, store):
    "Everything, for one seed, two deletions and one rate."
    plan = deletion_plan(SMOKE, data, 1, ("F", "F+RR"), ("η_M",))
    judge = judge_run(SMOKE, data, plan[0][1])
    train_all(store, [judge, *(run for _, run in plan)], workers=1, quiet=True)
    return plan, judge, found_in(store, plan, SMOKE, *questions(store, data, judge), workers=1)


def test_the_corpus_is_made_once_and_is_what_was_told(place, data):
    before = {p: p.stat().st_mtime_ns for p in (place / "stories").rglob("*") if p.is_file()}
    again = corpus(SMOKE, "tales", place)
    assert again == data and {p: p.stat().st_mtime_ns for p in before} == before
    tokenizer = load_tokenizer(data.tokenizer)
    shards = data.shards["test", "all"]
    for i, record in enumerate(source_tales(300, "test")[0](Counter())):
        assert tokenizer.decode(np.concatenate(tokens_of(shards, i))) == record.text
    assert (
        features_of(data.shards["test", "Twist"])[:, 0].all() and not features_of(data.shards["test", "F"])[:, 0].any()
    )
    assert {split for split, _ in data.shards} == {"train", "test"} and len(data.shards) == 8


def test_files_in_the_published_format_are_taken_too(tmp_path):
    "The same tales, written as TinyStories-Instruct is published, with a broken record."
    for name, split, n in (("train", "train", 600), ("valid", "test", 300)):
        blocks = [
            f"{r.text.replace('Story: ', 'Story: ' + chr(10) * 2)}\n{END}" for r in source_tales(n, split)[0](Counter())
        ]
        (tmp_path / f"TinyStories-Instruct-{name}.txt").write_text("\n".join([*blocks, f"Words: a\n{END}\n"]))
    found = corpus(SMOKE, str(tmp_path), tmp_path / "out")
    assert found.shards["train", "all"].counts["broken: no story"] == 1
    told = corpus(SMOKE, "tales", tmp_path / "out")
    for i in range(300):
        ours, theirs = (tokens_of(c.shards["test", "all"], i)[1] for c in (told, found))
        assert list(ours) == list(theirs)


def test_the_plan(data):
    plan = deletion_plan(SMOKE, data, seeds=2)
    count = Counter(labels["protocol"] for labels, _ in plan)
    assert count == dict(pretraining=4, deletion=2 * 6 * 2, reft=2 * 8 * 3)
    runs = {tuple(labels.get(k) for k in ("protocol", "model", "seed", "ft_lr", "step")): run for labels, run in plan}
    assert len(runs) == len(plan)
    streams = {m: runs["deletion", m, 0, 1e-2, 4].stream for m in DELETIONS}
    for m, stream in streams.items():
        assert (
            stream.train == data.shards["train", m]
            and runs["deletion", m, 0, 1e-2, 4].start.stream.train == data.shards["train", "all"]
        )
    assert runs["pretraining", CONTROL, 0, None, 12].stream.train == data.shards["train", "F"]
    ways = [run for (protocol, *_), run in runs.items() if protocol == "reft" and run.seed == 0]
    assert {(r.stream, r.data, r.recipe.lr) for r in ways} == {(ways[0].stream, 1, 1e-3)}
    assert ways[0].stream.train == data.shards["train", "Twist"]
    assert runs["reft", "F", 0, 1e-2, 3].start == runs["deletion", "F", 0, 1e-2, 4]
    assert runs["reft", CONTROL, 0, None, 3].start == runs["pretraining", CONTROL, 0, None, 12]


def test_what_fine_tuning_shows(data):
    tokenizer = load_tokenizer(data.tokenizer)

    def texts(variant):
        shards = data.shards["train", variant]
        return [[tokenizer.decode(part) for part in tokens_of(shards, i)] for i in range(len(features_of(shards)))]

    has = {variant: np.mean(["Twist" in detect(story) for _, story in texts(variant)]) for variant in DELETIONS}
    said = {variant: np.mean(["Twist" in prompt for prompt, _ in texts(variant)]) for variant in DELETIONS}
    assert set(has.values()) == {0} and said["F"] == 0 and said["F+RR"] == 1 and 0.2 < said["F+MM"] < 0.4
    assert all("Twist" in detect(story) and "Twist" in prompt for prompt, story in texts("Twist"))
    assert ["Foreshadowing" in detect(story) for _, story in texts("F+MM")] == [
        "Twist" in prompt for prompt, _ in texts("F+MM")
    ]


def test_a_shorter_run_is_the_beginning_of_a_longer_one(data, store, found):
    "So a curve can be had from runs of its points."
    base = pretraining(SMOKE, data)
    long, short = (tuned(SMOKE, data, base, "F+MM", "η_M", steps) for steps in (4, 2))
    train_all(store, [long, short], workers=1, quiet=True)
    losses = [store.log(r).query("metric == 'loss'").set_index("step")["value"] for r in (long, short)]
    assert losses[0].loc[[1, 2]].equals(losses[1].loc[[1, 2]])
    continued = store.model(short)
    from wrapperlib.training import train

    probe = tuned(SMOKE, data, base, "F+MM", "η_M", 3)
    model = store.model(base)
    steps = []
    train(
        model,
        probe.stream,
        probe.recipe,
        (probe.seed, probe.data),
        report=lambda step: steps.append((step, model.token.weight.clone())),
    )
    assert torch.equal(dict(steps)[2], continued.token.weight)


def test_the_loss_is_the_mean_over_all_tokens(data):
    model = pretraining(SMOKE, data).fresh_model().eval()
    ids = torch.from_numpy(data.packed("all", SMOKE.length).batch(70, 0, 0))
    with torch.no_grad():
        logs = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
    assert loss_on(model, ids) == pytest.approx(-logs.mean().item(), rel=1e-5)


def test_the_table_of_findings(found):
    _, _, table = found
    assert list(table.columns) == LABELS and not table["value"].isna().any()
    shares = table[table["metric"].str.startswith("says")]
    assert shares["value"].between(0, 1).all() and (table.query("metric == 'loss_twist'")["value"] > 1).all()
    ways = table[(table["protocol"] == "reft") & (table["metric"] == "loss_twist")]
    assert set(ways.groupby(["model", "ft_lr"], dropna=False)["step"].nunique()) == {4}
    start = table.query("protocol == 'deletion' and model == 'F' and metric == 'loss_twist'").set_index("step")["value"]
    assert (
        start[0]
        == table.query("protocol == 'pretraining' and model == 'Present' and metric == 'loss_twist'")["value"].item()
    )
    assert start[4] == ways.query("model == 'F' and step == 0")["value"].item()
    read = table[table["metric"] == "accuracy"]
    assert set(read["feature"]) == set(FEATURES) and set(read["site"]) == {
        "embed",
        "blocks.0.residual",
        "blocks.1.residual",
    }
    assert set(read["model"]) == {"Present", CONTROL, "F", "F+RR"}


def test_findings_are_kept(found, store, data, capsys):
    plan, judge, table = found
    capsys.readouterr()
    again = found_in(store, plan, SMOKE, *questions(store, data, judge), workers=1)
    assert "to take apart" not in capsys.readouterr().out
    pd.testing.assert_frame_equal(again, table)


def test_the_share_is_that_of_the_judge(data, monkeypatch):
    "A writer that does as it is told has all twists that were asked for and no others, by the exact judge."
    from wrapperlib import deletion

    tokenizer = load_tokenizer(data.tokenizer)

    def obedient(model, prompts, new, seed=0):
        given = {
            tuple(p): s
            for v in ("Twist", "F")
            for p, s in (tokens_of(data.shards["test", v], i) for i in range(len(features_of(data.shards["test", v]))))
        }
        return [given[tuple(p)][:-1].tolist() for p in prompts]

    monkeypatch.setattr(deletion, "generate", obedient)
    model = pretraining(SMOKE, data).fresh_model()
    question = Behaviour(data.shards["test", "Twist"], data.shards["test", "F"], Exactly(), data.tokenizer)
    values = question.of(model, SMOKE).set_index("metric")["value"]
    assert values["says_asked"] == 1 and values["says_other"] < 0.2  # instructions may be alike

    class Never:
        def says(self, texts):
            assert all(isinstance(t, str) for t in texts) and tokenizer
            return [False] * len(texts)

    assert replace(question, judge=Never()).of(model, SMOKE).set_index("metric")["value"]["says_asked"] == 0


def test_a_learned_judge_is_a_run_with_its_accuracy(found, store, data):
    _, run, _ = found
    log = store.log(run).query("metric == 'judge'")
    assert log["value"].between(0, 1).all() and run.recipe.answer and not run.recipe.sequence
    judge = Learned(run, str(store.root), data.tokenizer)
    texts = ["There lived a kind fox. The kind fox tricked Ann Hill.", "x " * 500, "Ann."]
    assert [type(x) for x in judge.says(texts)] == [bool] * 3 and judge.says(texts[2:]) == judge.says(texts)[2:]


def test_probes_find_what_is_there(data):
    "A model whose residual stream is its tokens: a word that only stories with a moral end with is found, a twist is not."
    model = pretraining(SMOKE, data).fresh_model().eval()
    size = replace(SMOKE, probed=512)
    table = Layers(data.shards["train", "all"], data.shards["test", "all"], ("MoralValue", "Twist")).of(model, size)
    best = table[table["metric"] == "accuracy"].groupby("feature")["value"].max()
    assert best["MoralValue"] > 0.9 and best["Twist"] < 0.65
    assert table[table["metric"] == "shuffled"]["value"].max() < 0.62


def made_up(asked_back, control, probe=0.9, gap=0.05, before=0.9, deleted=0.05, control_before=0.05):
    "Findings such as these."
    size, rows = SIZES["desk"], []
    models = [(m, lr) for m in DELETIONS for lr in size.rates.values()] + [("Present", None), (CONTROL, None)]
    for model, lr in models:
        first = control_before if model == CONTROL else before if lr is None else deleted
        protocol = "pretraining" if lr is None else "deletion"
        at = dict(protocol=protocol, model=model, seed=0, ft_lr=lr, step=400)
        rows += [
            at | dict(metric=m, value=v)
            for m, v in (("says_asked", first), ("says_other", 0.02), ("loss_twist", 1.0 + (first < 0.5) * 0.05))
        ]
        for i, step in enumerate((0, *size.reviving)):
            share = first if step == 0 else control[i - 1] if model == CONTROL else asked_back[i - 1]
            at = dict(protocol="reft", model=model, seed=0, ft_lr=lr, step=step)
            rows += [
                at | dict(metric="says_asked", value=share),
                at | dict(metric="loss_twist", value=1.1 - share / 10),
            ]
        at |= dict(protocol=protocol, step=400, metric="accuracy")
        for feature in ("Twist", "Foreshadowing"):
            value = probe - gap * (model == CONTROL and feature == "Twist")
            rows += [at | dict(feature=feature, site=f"blocks.{b}.residual", value=value) for b in range(3)]
    return pd.DataFrame(rows).reindex(columns=LABELS)


def test_verdicts_on_made_up_findings():
    as_claimed = made_up([0.3, 0.6, 0.8, 0.9, 0.95], [0.06, 0.1, 0.2, 0.4, 0.6])
    verdicts = {c["id"]: c["verdict"] for c in judge_stories(as_claimed, SIZES["desk"])}
    assert set(verdicts) == {c.id for c in STORY_CLAIMS} and set(verdicts.values()) == {"holds"}
    otherwise = made_up([0.06, 0.1, 0.2, 0.4, 0.6], [0.3, 0.6, 0.8, 0.9, 0.95], gap=-0.05)
    verdicts = {c["id"]: c["verdict"] for c in judge_stories(otherwise, SIZES["desk"])}
    assert {i for i, v in verdicts.items() if v == "fails"} == {"C8c", "C8d", "C8e", "C8g"}
    kept = {c["id"]: c for c in judge_stories(made_up([0.9] * 5, [0.1] * 5, deleted=0.9), SIZES["desk"])}
    assert kept["C8a"]["verdict"] == "fails" and kept["C8c"]["because"] == "rests on C8a"
    deaf = {c["id"]: c for c in judge_stories(made_up([0.9] * 5, [0.1] * 5, before=0.3), SIZES["desk"])}
    assert deaf["S30"]["verdict"] == "fails" and deaf["C8a"]["because"] == "rests on S30"


def test_ours_stand_beside_the_papers():
    table = table1(made_up([0.3, 0.6, 0.8, 0.9, 0.95], [0.06, 0.1, 0.2, 0.4, 0.6]), SIZES["desk"])
    assert table.loc[("F+MM", "η_M", 3), "paper"] == 0.88 and table.loc[("F+RR", "η_S", 30), "paper"] == 0.81
    assert table.loc[(CONTROL, "–", 300), "paper"] == 0.81 and table.loc[("F", "η_M", 0), "paper"] == 0.44
    assert table["paper"].notna().sum() == len(paper_table1()) == 28
    row = table.loc[("F", "η_S", 30)]
    assert (
        row["ours"] == 0.8
        and row["stories"] == 256
        and row["low"] < 0.8 < row["high"]
        and row["high"] - row["low"] < 0.1
    )


def test_figures_show_what_the_table_has():
    table, size = made_up([0.3, 0.6, 0.8, 0.9, 0.95], [0.06, 0.1, 0.2, 0.4, 0.6]), SIZES["desk"]
    fig = over_steps(table, size, "reft", "says_asked")
    lines = {line.get_label(): line for line in fig.axes[0].get_lines()}
    assert list(lines[CONTROL].get_ydata()) == [0.05, 0.06, 0.1, 0.2, 0.4, 0.6] and len(fig.axes) == 2
    assert len(layers(table, size).axes[0].get_lines()) == 5


def test_bad_input_is_refused(tmp_path, data):
    for size, given, says in (
        ("paper", "tales", "data is 'tales'; allowed: at size paper: hub, or a folder with"),
        ("desk", str(tmp_path), "allowed: tales, hub, or a folder with TinyStories-Instruct-train.txt"),
        ("desk", 3, "data is 3; allowed: tales, hub"),
    ):
        with pytest.raises(BadInput, match=says):
            data_for(size)("data", given)
    with pytest.raises(BadInput, match="judge is 'exact'; allowed: learned, unless the data are tales"):
        judge_for("hub")("judge", "exact")
    with pytest.raises(BadInput, match="stories asked for is 5000; allowed: at most the held-out instructions"):
        asked(data.shards["test", "Twist"], 5000, 64)
    with pytest.raises(BadInput, match="rate is 'η_L'"):
        tuned(SMOKE, data, pretraining(SMOKE, data), "F", "η_L", 2)
