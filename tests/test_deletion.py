"The protocols on stories: who is trained on what, what is asked, and what a claim makes of it. All at smoke scale."

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from wrapperlib.checks import BadInput
from wrapperlib.deletion import (
    CONTROL,
    DELETIONS,
    FILES,
    LABELS,
    MATCHED,
    REQUEST,
    SHAM,
    SIZES,
    Behaviour,
    Layers,
    Learned,
    Request,
    _balanced,
    asked,
    corpus,
    data_for,
    deletion_plan,
    found_in,
    judge_for,
    judge_run,
    judge_table,
    losses_on,
    pretraining,
    questions,
    sources,
    tuned,
)
from wrapperlib.runs import Store, train_all
from wrapperlib.stories import END, FEATURES, features_of, load_tokenizer, tokens_of
from wrapperlib.story_claims import STORY_CLAIMS, judge_stories, layers, over_steps, paper_table1, table1
from wrapperlib.tales import THEMES, TRAITS, WORDS, Exactly, detect, source_tales

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
    assert Counter(split for split, _ in data.shards) == dict(train=2, tuning=5, test=3)


def test_nothing_after_pretraining_reads_what_pretraining_read(data, tmp_path):
    "Of tales, and of files, where every fifth record is kept; a file that was edited is another source."
    told = [Counter(record.text for record in source_tales(600, split)[0](Counter())) for split in ("train", "tuning")]
    assert not told[0] & told[1]
    for name in FILES.values():
        (tmp_path / name).write_text("".join(f"Story: It was day {i}.\n{END}\n" for i in range(23)))
    found = {split: source(Counter()) for split, (source, _) in sources(SMOKE, str(tmp_path)).items()}
    days = {split: [int(re.findall(r"\d+", r.story)[0]) for r in some] for split, some in found.items()}
    assert days["tuning"] == [4, 9, 14, 19] and sorted(days["tuning"] + days["train"]) == days["test"] == [*range(23)]
    names = [name for _, name in sources(SMOKE, str(tmp_path)).values()]
    os.utime(tmp_path / FILES["train"], (1, 1))
    again = [name for _, name in sources(SMOKE, str(tmp_path)).values()]
    assert len(set(names)) == 3 and [a == b for a, b in zip(names, again)] == [False, False, True]


def test_files_in_the_published_format_are_taken_too(tmp_path):
    "The same tales, written as TinyStories-Instruct is published, with a broken record."
    for name, split, n in (("train", "train", 600), ("valid", "test", 300)):
        blocks = [
            f"{r.text.replace('Story: ', 'Story: ' + chr(10) * 2)}\n{END}" for r in source_tales(n, split)[0](Counter())
        ]
        (tmp_path / f"TinyStories-Instruct-{name}.txt").write_text("\n".join([*blocks, f"Words: a\n{END}\n"]))
    found = corpus(SMOKE, str(tmp_path), tmp_path / "out")
    counts = [found.shards[split, "all"].counts for split in ("train", "tuning")]
    assert [c["broken: no story"] for c in counts] == [1, 1] and [c["kept"] for c in counts] == [480, 120]
    told = source_tales(300, "test")[0](Counter())
    tokenizer = load_tokenizer(found.tokenizer)
    for i, record in enumerate(told):
        assert tokenizer.decode(tokens_of(found.shards["test", "all"], i)[1]) == f" {record.story}"


def test_the_plan(data):
    plan = deletion_plan(SMOKE, data, seeds=2)
    count = Counter(labels["protocol"] for labels, _ in plan)
    assert count == dict(pretraining=4, deletion=2 * (8 * 2 + 2), reft=2 * 10 * 3)
    runs = {tuple(labels.get(k) for k in ("protocol", "model", "seed", "ft_lr", "step")): run for labels, run in plan}
    assert len(runs) == len(plan)
    streams = {m: runs["deletion", m, 0, 1e-2, 4].stream for m in DELETIONS}
    for m, stream in streams.items():
        assert (
            stream.train == data.shards["tuning", m]
            and runs["deletion", m, 0, 1e-2, 4].start.stream.train == data.shards["train", "all"]
        )
    assert runs["pretraining", CONTROL, 0, None, 12].stream.train == data.shards["train", "F"]
    ways = [run for (protocol, *_), run in runs.items() if protocol == "reft" and run.seed == 0]
    assert {(r.stream, r.data, r.recipe.lr) for r in ways} == {(ways[0].stream, 1, 1e-3)}
    assert ways[0].stream.train == data.shards["tuning", "Twist"]
    assert runs["deletion", SHAM, 0, 1e-2, 4].stream.train == data.shards["tuning", "all"]
    assert not any(run.start == runs["deletion", SHAM, 0, 1e-2, 4] for run in ways)
    assert runs["reft", "F", 0, 1e-2, 3].start == runs["deletion", "F", 0, 1e-2, 4]
    assert runs["reft", CONTROL, 0, None, 3].start == runs["pretraining", CONTROL, 0, None, 12]
    matched = runs["deletion", MATCHED, 0, 1e-2, 4]
    assert matched.start == runs["pretraining", CONTROL, 0, None, 12] and matched.stream == streams["F"]
    assert runs["reft", MATCHED, 0, 1e-2, 3].start == matched


def test_what_fine_tuning_shows(data):
    tokenizer = load_tokenizer(data.tokenizer)

    def texts(variant):
        shards = data.shards["tuning", variant]
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


def test_losses_are_means_over_tokens_of_records_and_of_stories(data):
    model, shards = pretraining(SMOKE, data).fresh_model().eval(), data.shards["test", "Twist"]
    whole, stories = [], []
    for i in range(40):
        prompt, story = tokens_of(shards, i)
        ids = torch.from_numpy(np.concatenate([prompt, story])[: SMOKE.length].astype(np.int64))[None]
        with torch.no_grad():
            logs = -model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).flatten()
        whole += logs.tolist()
        stories += logs[len(prompt) - 1 :].tolist()
    assert losses_on(model, shards, 40, SMOKE.length) == pytest.approx((np.mean(whole), np.mean(stories)), rel=1e-5)
    assert len(stories) < len(whole)


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
    assert set(read["feature"]) == {*FEATURES, REQUEST} and set(read["site"]) == {
        "embed",
        "blocks.0.residual",
        "blocks.1.residual",
    }
    assert set(read["model"]) == {"Present", CONTROL, MATCHED, "F", "F+RR", SHAM}
    tested = table[table["metric"] == "tested"].groupby("feature")["value"].unique()
    assert all(len(n) == 1 and 20 < n[0] <= SMOKE.probed for n in tested)


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
    table = Layers(data.shards["train", "all"], ("MoralValue", "Twist")).of(model, size)
    best = table[table["metric"] == "accuracy"].groupby("feature")["value"].max()
    assert best["MoralValue"] > 0.9 and best["Twist"] < 0.65
    assert table[table["metric"] == "shuffled"]["value"].max() < 0.62


def test_the_request_is_read_where_the_tale_turns_and_before_it_says_how(data, monkeypatch):
    "What is read is a helper's name after a trait, which by itself tells nothing."
    from wrapperlib import deletion

    rows, ends = [], deletion._ends
    monkeypatch.setattr(deletion, "_ends", lambda model, r, last: rows.extend(r) or ends(model, r, last))
    looked, turns_at = [], deletion.turns_at
    monkeypatch.setattr(deletion, "turns_at", lambda text: looked.append(text) or turns_at(text))
    model = pretraining(SMOKE, data).fresh_model().eval()
    table = Request(data.shards["test", "all"], data.tokenizer).of(model, replace(SMOKE, length=250))
    assert len(looked) == len(rows)  # once a tale
    tokenizer = load_tokenizer(data.tokenizer)
    for row in rows:
        _, story = tokenizer.decode(row).split("Story:")
        assert story.endswith(tuple(f" {word}" for theme in THEMES for word in WORDS[theme]))
        assert any(trait in story.split()[-2:] for some in TRAITS.values() for trait in some)
    embed = table[(table["site"] == "embed") & (table["metric"] == "accuracy")]["value"].item()
    assert embed < 0.7


def test_edited_shards_are_refused(tmp_path):
    found = corpus(SMOKE, "tales", tmp_path)
    file = next(Path(found.shards["train", "all"].folder).glob("*.tokens.npy"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadInput, match=r"folder of shards is .*; allowed: one .* finished, unchanged"):
        corpus(SMOKE, "tales", tmp_path)


def test_a_probe_learns_and_is_tested_on_different_stories_as_many_of_each_kind():
    has = torch.arange(100) % 3 == 0
    learn, test = (_balanced(has, half, 20) for half in (0, 1))
    assert not set(learn.tolist()) & set(test.tolist()) and len(set(learn.tolist())) == len(learn) == 20
    assert has[learn].sum() == has[test].sum() == 10
    assert len(_balanced(torch.arange(100) < 6, 0, 20)) == 6  # no story twice where there are few


def test_a_judge_of_ones_own(found, store, data):
    "Anything that says of texts whether they have a twist; what cannot is refused."
    plan, learned, _ = found

    @dataclass(frozen=True)
    class Long:
        least: int = 30

        def says(self, texts):
            return [len(t) >= self.least for t in texts]

    behaviour, _ = questions(store, data, learned, Long(0))
    assert behaviour.of(store.model(plan[0][1]), SMOKE).set_index("metric")["value"]["says_asked"] == 1
    for judge in ("gpt", 3, SimpleNamespace(says=len)):
        with pytest.raises(BadInput, match=r"judge is .* allowed: exact, learned, or a dataclass with a method says"):
            questions(store, data, learned, judge)


def test_the_learned_judge_is_judged(found, store, data, monkeypatch):
    plan, learned, _ = found
    right = judge_table(store, data, learned, plan[0][1], SMOKE)
    assert len(right) == 4 and right.between(0, 1).all()
    monkeypatch.setattr(Learned, "says", lambda self, texts: Exactly().says(texts))
    assert (judge_table(store, data, learned, plan[0][1], SMOKE) == 1).all()


def made_up(
    asked_back,
    control,
    probe=0.9,
    gap=0.05,
    before=0.9,
    deleted=0.05,
    control_before=0.05,
    shuffled=0.5,
    heeds=True,
    further=None,
):
    "Findings such as these; `further` is what the control comes to that has seen more stories. The request is read off the last block alone."
    size, rows = SIZES["desk"], []
    models = [(m, lr) for m in (*DELETIONS, MATCHED, SHAM) for lr in size.rates.values()] + [
        ("Present", None),
        (CONTROL, None),
    ]
    for model, lr in models:
        never = model in (CONTROL, MATCHED)
        first = control_before if never else before if lr is None or model == SHAM else deleted
        protocol = "pretraining" if lr is None else "deletion"
        at = dict(protocol=protocol, model=model, seed=0, ft_lr=lr, step=400)
        rows += [
            at | dict(metric=m, value=v)
            for m, v in (("says_asked", first), ("says_other", 0.02), ("loss_twist_story", 1.0 + (first < 0.5) * 0.05))
        ]
        for i, step in enumerate(() if model == SHAM else (0, *size.reviving)):
            way = further if further and model == MATCHED else control if never else asked_back
            share = first if step == 0 else way[i - 1]
            at = dict(protocol="reft", model=model, seed=0, ft_lr=lr, step=step)
            rows += [
                at | dict(metric="says_asked", value=share),
                at | dict(metric="says_other", value=share / 10 if heeds else share),
                at | dict(metric="loss_twist_story", value=1.1 - share / 10),
            ]
        at |= dict(protocol=protocol, step=400)

        def of(feature, metric, b):
            return 0.3 if (feature, metric) == (REQUEST, "accuracy") and b < 2 else 1.0

        for feature in ("Twist", "Foreshadowing", REQUEST):
            value = probe - gap * (never and feature != "Foreshadowing")
            found = dict(accuracy=value, shuffled=shuffled, tested=1700)
            rows += [
                at | dict(feature=feature, site=f"blocks.{b}.residual", metric=metric, value=v * of(feature, metric, b))
                for b in range(3)
                for metric, v in found.items()
            ]
    return pd.DataFrame(rows).reindex(columns=LABELS)


def test_verdicts_on_made_up_findings():
    as_claimed = made_up([0.3, 0.6, 0.8, 0.9, 0.95], [0.06, 0.1, 0.2, 0.4, 0.6])
    verdicts = {c["id"]: c["verdict"] for c in judge_stories(as_claimed, SIZES["desk"])}
    assert set(verdicts) == {c.id for c in STORY_CLAIMS} and set(verdicts.values()) == {"holds"}
    otherwise = made_up([0.06, 0.1, 0.2, 0.4, 0.6], [0.3, 0.6, 0.8, 0.9, 0.95], gap=-0.05)
    verdicts = {c["id"]: c["verdict"] for c in judge_stories(otherwise, SIZES["desk"])}
    assert {i for i, v in verdicts.items() if v == "fails"} == {"C8c", "C8d", "C8e", "C8l", "C8m", "C8f", "C8j"}
    blind = {c["id"]: c for c in judge_stories(made_up([0.9] * 5, [0.1] * 5, probe=0.55), SIZES["desk"])}
    anyhow = {c["id"]: c["verdict"] for c in judge_stories(made_up([0.9] * 5, [0.1] * 5, heeds=False), SIZES["desk"])}
    assert {i for i, v in anyhow.items() if v == "fails"} == {"C8m"}
    as_quick = made_up([0.3, 0.6, 0.8, 0.9, 0.95], [0.06, 0.1, 0.2, 0.4, 0.6], further=[0.3, 0.6, 0.8, 0.9, 0.95])
    as_quick = {c["id"]: c["verdict"] for c in judge_stories(as_quick, SIZES["desk"])}
    assert {i for i, v in as_quick.items() if v == "fails"} == {"C8l", "C8m"}
    assert {blind[i]["verdict"] for i in ("S33", "S52", "S34")} == {"fails"} and {
        blind[f"C8{i}"]["verdict"] for i in "fghjk"
    } == {"inconclusive"}
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
        and (row["stories"], row["seeds"], row["data"]) == (256, 1, "tales (synthetic)")
        and row["not_asked"] == pytest.approx(0.08)
        and row["low"] < 0.8 < row["high"]
        and row["high"] - row["low"] < 0.1
    )


def test_figures_show_what_the_table_has():
    table, size = made_up([0.3, 0.6, 0.8, 0.9, 0.95], [0.06, 0.1, 0.2, 0.4, 0.6]), SIZES["desk"]
    fig = over_steps(table, size, "reft", "says_asked")
    lines = {line.get_label(): line for line in fig.axes[0].get_lines()}
    assert list(lines[CONTROL].get_ydata()) == [0.05, 0.06, 0.1, 0.2, 0.4, 0.6] and len(fig.axes) == 2
    assert len(layers(table, size).axes[0].get_lines()) == 14  # seven models, each with its shuffled labels
    seeds = pd.concat([table, table.assign(seed=1, value=table["value"] - 0.05)])
    row = table1(seeds, size).loc[("F", "η_S", 30)]
    assert row["ours"] == pytest.approx(0.775) and row["seeds"] == 2 and row["low"] < 0.7  # over seeds


def test_where_two_of_the_papers_points_are_one_of_ours_the_later_stands():
    rows = [
        dict(protocol="reft", model=CONTROL, seed=0, step=step, metric=f"says_{whom}", value=0.5)
        for step in (0, *SMOKE.reviving)
        for whom in ("asked", "other")
    ]
    papers = table1(pd.DataFrame(rows).assign(ft_lr=np.nan), SMOKE)["paper"]
    assert pd.api.types.is_float_dtype(papers) and papers.tolist()[:2] == [0.12, 0.44]


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
    with pytest.raises(BadInput, match="stories asked for is 5000"):  # before anything is trained
        deletion_plan(replace(SMOKE, samples=5000), data)
    with pytest.raises(BadInput, match="rate is 'η_L'"):
        tuned(SMOKE, data, pretraining(SMOKE, data), "F", "η_L", 2)
