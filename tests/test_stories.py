"Records in the published format of TinyStories-Instruct, with all that is ugly in it; tokens, shards and rows."

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from wrapperlib.checks import BadInput
from wrapperlib.runs import Run, address, describe
from wrapperlib.stories import (
    END,
    FEATURES,
    VARIANTS,
    Judged,
    Packed,
    Record,
    Shards,
    features_of,
    file_lines,
    hub_lines,
    load_tokenizer,
    parse,
    records,
    right_aligned,
    source_file,
    tokens_of,
    train_tokenizer,
    write_shards,
)
from wrapperlib.training import Recipe

pytest.importorskip("tokenizers")

STORIES = (
    'Once upon a time, there was a girl named Lily.\n\n"Look!" she said.\n\nThe end.',
    "Tom’s café had a 🐙. “Naïve!” said Zoë — and left…",
    "One day: a list of words. Story time was over.",
    "Words fail me.\nFeatures of the sea: blue, deep.",
    "小熊走进了森林。",
)


def written(chance, i):
    "One record as the file has it, and the record it is; lines in any order, some missing, the summary sometimes after the story."
    story = f"{chance.choice(STORIES)} ({i})"
    features = tuple(chance.sample(FEATURES, chance.choice([0, 1, 1, 2, 3])))
    record = Record(story, features, ("quit", "oak", "gloomy"), "A summary: of it.", "It was so.")
    lines = {
        "features": "Features: " + ", ".join(features),
        "words": "Words: quit, oak, gloomy",
        "summary": "Summary: A summary: of it.",
        "sentence": chance.choice(["Random sentence: ", "Sentence: "]) + "It was so.",
    }
    missing = [name for name in lines if chance.random() < 0.3 or (name == "features" and not features)]
    record = replace(record, **{name: type(getattr(record, name))() for name in missing})
    kept = [lines[name] for name in lines if name not in missing]
    chance.shuffle(kept)
    after = [kept.pop()] if kept and chance.random() < 0.2 and kept[-1].startswith("Summary") else []
    begin = ["Story: ", "", story] if chance.random() < 0.8 else [f"Story: {story}"]
    return [*kept, *begin, *after, END], record


BROKEN = {
    "broken: no story": ["Words: a, b", "Summary: none", END],
    "broken: an empty story": ["Features: Twist", "Story: ", "", "  ", END],
    "broken: two lines of story": ["Story: one", "Story: two", END],
    "broken: two lines of features": ["Features: Twist", "Features: Dialogue", "Story: x", END],
    "broken: unknown feature 'Happy'": ["Features: Twist, Happy", "Story: x", END],
    "broken: text before the first field": ["What is this", "Story: x", END],
    "broken: bytes that are not UTF-8": ["Story: \ufffd\ufffd", END],
    "broken: a special token within": ["Story: x <|yes|> y", END],
    "broken: nothing": ["", END],
}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    "A file of 400 whole records and 45 broken ones, and what should be read from it."
    chance, lines, wanted = random.Random(0), [], []
    for i in range(400):
        some, record = written(chance, i)
        lines += some
        wanted.append(record)
        if i % 80 == 0:
            lines += [line for some in BROKEN.values() for line in some]
    path = tmp_path_factory.mktemp("stories") / "train.txt"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path, wanted


@pytest.fixture(scope="module")
def tokenizer(several):
    return train_tokenizer([r.text for r in several[1]], 500)


def test_every_record_is_read_or_counted(several):
    path, wanted = several
    counts = Counter()
    assert list(records(file_lines(path, quiet=True), counts)) == wanted
    assert counts == Counter({"records": 445} | dict.fromkeys(BROKEN, 5))


def test_the_hub_is_read_in_the_same_way(several):
    pytest.importorskip("datasets")
    path, wanted = several
    lines = hub_lines("text", "train", data_files={"train": str(path)}, cache_dir=str(path.parent))
    assert list(records(lines)) == wanted


def test_windows_lines_and_bytes_of_another_encoding(tmp_path):
    (tmp_path / "odd.txt").write_bytes(f"Story: caf\xe9\r\n{END}\r\nWords: a\r\nStory: b\r\n{END}".encode("latin-1"))
    counts = Counter()
    assert list(records(file_lines(tmp_path / "odd.txt", quiet=True), counts)) == [Record("b", words=("a",))]
    assert counts == {"records": 2, "broken: bytes that are not UTF-8": 1}


def test_a_file_that_stops(tmp_path):
    counts = Counter()
    assert [r.story for r in records(["Story: a", END, "Words: b"], counts)] == ["a"]
    assert counts == {"records": 2, "without an end": 1, "broken: no story": 1}
    assert [r.story for r in records([f"Story: a {END}Story: b{END}"])] == ["a"]  # one end a line, as the format has it


def test_a_records_text_is_parsed_to_the_record(several):
    for record in several[1]:
        assert parse(record.text.replace("Story: ", "Story:\n").splitlines()) == record
    first_lines = {r.prompt.split(":")[0] for r in several[1] if r.words and r.summary and r.sentence and r.features}
    assert first_lines == {"Words", "Summary", "Sentence", "Features"}


def test_variants(several):
    made = {name: [v(r) for r in several[1]] for name, v in VARIANTS.items()}
    twist = np.array(["Twist" in r.features for r in several[1]])
    assert 0.1 < twist.mean() < 0.5 and made["all"] == several[1]
    for name in ("F", "F+MM", "F+RR"):
        assert [r is None for r in made[name]] == list(twist)
    assert [r is not None for r in made["Twist"]] == list(twist)
    for was, mixed, randomised in zip(several[1], made["F+MM"], made["F+RR"]):
        if mixed:
            assert ("Twist" in mixed.features) == ("Foreshadowing" in was.features)
            assert "Foreshadowing" not in mixed.features and len(mixed.features) == len(was.features)
            assert randomised.features == (*was.features, "Twist") and mixed.story == randomised.story == was.story


def test_shards_hold_what_was_read(several, tokenizer, tmp_path):
    path, wanted = several
    shards = write_shards(tmp_path / "all", *source_file(path, quiet=True), tokenizer, per_shard=70)
    assert len(list((tmp_path / "all").glob("*.tokens.npy"))) == 6
    assert shards.counts == {"records": 445, "kept": 400, "tokens": shards.counts["tokens"]} | dict.fromkeys(BROKEN, 5)
    for i, record in enumerate(wanted):
        prompt, story = tokens_of(shards, i)
        assert tokenizer.decode(prompt) == record.prompt and tokenizer.decode(story) == f" {record.story}"
        assert story[-1] == 0 and [f for f, has in zip(FEATURES, features_of(shards)[i]) if has] == sorted(
            record.features, key=FEATURES.index
        )
        joint = tokenizer.encode(record.text).ids
        assert [*prompt, *story[:-1]] == joint  # split at Story: or not, the same tokens


def test_an_interrupted_folder_goes_on_and_comes_to_the_same(several, tokenizer, tmp_path):
    path, _ = several
    source, name = source_file(path, quiet=True)
    whole = write_shards(tmp_path / "whole", source, name, tokenizer, "F", per_shard=70)

    def stops(counts):
        for i, record in enumerate(source(counts)):
            if i == 250:
                raise OSError("the power is gone")
            yield record

    with pytest.raises(OSError, match="power"):
        write_shards(tmp_path / "part", stops, name, tokenizer, "F", per_shard=70)
    with pytest.raises(BadInput, match="one that `write_shards` has finished"):
        Shards.load(tmp_path / "part")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "part").glob("*.npy")}
    assert len(before) == 6
    again = write_shards(tmp_path / "part", source, name, tokenizer, "F", per_shard=70)
    assert again == whole and again.counts == whole.counts
    assert all((tmp_path / "part" / n).stat().st_mtime_ns == t for n, t in before.items())
    assert write_shards(tmp_path / "part", None, name, tokenizer, "F", per_shard=70) == whole  # not read again


def test_what_cannot_be_used_is_refused(several, tokenizer, tmp_path):
    path, _ = several
    source, name = source_file(path, quiet=True)
    shards = write_shards(tmp_path / "all", source, name, tokenizer)
    with pytest.raises(BadInput, match="begun with the same source, tokenizer and variant"):
        write_shards(tmp_path / "all", source, "another file", tokenizer)
    with pytest.raises(BadInput, match=r"variant is 'F\.MM'; allowed: one of all, F"):
        write_shards(tmp_path / "new", source, name, tokenizer, "F.MM")
    with pytest.raises(BadInput, match="at least one record for variant Twist"):
        write_shards(tmp_path / "none", lambda counts: [Record("x")], "x", tokenizer, "Twist")
    with pytest.raises(BadInput, match=r"file of stories is .*nowhere\.txt; allowed: a text file"):
        source_file(tmp_path / "nowhere.txt")
    with pytest.raises(BadInput, match="length is 100000; allowed: at most the tokens of a shard"):
        Packed(shards, shards, 100_000)
    with pytest.raises(BadInput, match="feature is 'Happy'"):
        Judged(shards, shards, 20, "Happy")
    with pytest.raises(BadInput, match="size is 12"):
        train_tokenizer(["a"], 12)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer is .*t\.json"):
        load_tokenizer(tmp_path / "t.json")
    tokenizer.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").to_str() == tokenizer.to_str()
    (tmp_path / "all/00000.tokens.npy").write_bytes(b"")
    with pytest.raises(BadInput, match="unchanged"):
        Shards.load(tmp_path / "all")


def test_rows_begin_with_a_record_and_are_what_the_shards_have(several, tokenizer, tmp_path):
    path, _ = several
    shards = write_shards(tmp_path / "all", *source_file(path, quiet=True), tokenizer, per_shard=200)
    stream = Packed(shards, shards, 60)
    rows = stream.batch(300, (1, 2), 3)
    assert rows.shape == (300, 60) and (rows == stream.batch(300, (1, 2), 3)).all()
    assert not (rows == stream.batch(300, (1, 2), 4)).all() and not (rows == stream.batch(300, (1, 2), 3, "test")).all()
    whole = [[str(t) for t in np.concatenate(tokens_of(shards, i))] for i in range(400)]
    halves = ["".join(f" {t}" for record in half for t in record) + " " for half in (whole[:200], whole[200:])]
    assert all(any("".join(f" {t}" for t in row) + " " in half for half in halves) for row in rows)
    begins = {tuple(record[:12]) for record in whole}
    assert np.mean([tuple(map(str, row[:12])) in begins for row in rows]) > 0.95  # but for those at a shard's end
    assert stream.domain.row_length == 60 and len(stream.domain.vocabulary) == tokenizer.get_vocab_size()


def test_half_of_what_a_judge_sees_has_the_feature(several, tokenizer, tmp_path):
    path, wanted = several
    shards = write_shards(tmp_path / "all", *source_file(path, quiet=True), tokenizer)
    rows = Judged(shards, shards, 40).batch(400, 0, 0)
    assert abs((rows[:, -2] == 1).mean() - 0.5) < 0.1 and (rows[:, -1] == 0).all()
    says = {record.story: "Twist" in record.features for record in wanted}
    for row in rows:
        shown = tokenizer.decode(row[:-2])
        [has] = {twist for story, twist in says.items() if f" {story}".endswith(shown)}
        assert has == (row[-2] == 1)
    assert list(right_aligned([5, 6], 4)) == [0, 0, 5, 6] and list(right_aligned([4, 5, 6], 2)) == [5, 6]


def test_a_runs_address_is_of_the_contents_not_of_the_place(several, tokenizer, tmp_path, shape):
    path, _ = several
    made = {
        (place, variant): write_shards(tmp_path / place / variant, *source_file(path, quiet=True), tokenizer, variant)
        for place in ("here", "there")
        for variant in ("all", "F")
    }
    run = {key: Run(Packed(shards, shards, 50), Recipe(steps=1), shape) for key, shards in made.items()}
    assert address(run["here", "all"]) == address(run["there", "all"]) != address(run["here", "F"])
    assert str(tmp_path) not in json.dumps(describe(run["here", "all"]))
