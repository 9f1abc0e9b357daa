"""Own data in one line, and errors that say what to do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from features.datasets import Options, open_dataset
from features.errors import DatasetError
from features.manifest import natural_order
from features.splits import deal


def write_csv(folder, text):
    file = folder / "table.csv"
    file.write_text(text, encoding="utf-8")
    return f"csv:{file}"


def rows(*lines, header="path,label"):
    return "\n".join((header, *lines))


GOOD = [f"{i}.png,{'ab'[i % 2]}" for i in range(20)]


def test_folders_with_and_without_splits(tmp_path):
    for split in ("train", "test"):
        for name in ("b", "a"):
            (tmp_path / "with" / split / name / "deep").mkdir(parents=True)
            for place in (
                f"{split}/{name}/1.png",
                f"{split}/{name}/deep/2.JPG",
                f"{split}/{name}/notes.txt",
            ):
                (tmp_path / "with" / place).touch()
    given_split = open_dataset(f"folder:{tmp_path / 'with'}")
    assert given_split.classes == ("a", "b")
    assert given_split.split.tolist() == ["test"] * 4 + ["train"] * 4
    assert given_split.split_from == "given"
    drawn = open_dataset(f"folder:{tmp_path / 'with' / 'train'}")
    assert sorted(drawn.path) == ["a/1.png", "a/deep/2.JPG", "b/1.png", "b/deep/2.JPG"]
    assert drawn.split_from == "drawn by image, stratified, 20% test, seed 0"


def test_columns_of_findings_keep_their_four_states(tmp_path):
    text = rows(
        "1.png,1,", "2.png,0,-1", "3.png,1.0,0", "4.png,,1", header="path,label_Edema,label_Mass"
    )
    manifest = open_dataset(write_csv(tmp_path, text))
    assert manifest.classes == ("Edema", "Mass")
    assert manifest.label.tolist() == [[1, -2], [0, -1], [1, 0], [-2, 1]]


def test_columns_can_be_renamed_and_grades_are_ordered_as_numbers(tmp_path):
    lines = [
        f"{i}.png,{grade},p{i},{'Training' if i % 2 else 'TEST'}"
        for i, grade in enumerate([10, 9, 2] * 4)
    ]
    text = rows(*lines, header="file,grade,patient,part")
    names = {
        "path_col": "file",
        "label_col": "grade",
        "subject_col": "patient",
        "split_col": "part",
    }
    manifest = open_dataset(write_csv(tmp_path, text), Options(**names))
    assert manifest.classes == ("2", "9", "10")
    assert manifest.subject[3] == "p3"
    assert manifest.split[:2].tolist() == ["test", "train"]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (
            rows(*GOOD),
            {"label_col": "grade"},
            "has no column 'grade': found path, label; .* --label-col",
        ),
        (rows(*GOOD), {"subject_col": "patient"}, "has no column 'patient': .* --subject-col"),
        (rows(*GOOD, ",a"), {}, "line 22: the cell 'path' is empty"),
        (
            rows(*GOOD, "0.png,a"),
            {},
            "lists 1 images more than once, the first is 0.png: want one row",
        ),
        (rows(*GOOD, "x.png,c"), {}, r"class 'c' has one image \(x.png\).*drop it, merge it"),
        (rows("1.png,a", "2.png,a"), {}, r"has 1 class \(a\): want at least 2"),
        (rows(), {}, "holds no images"),
        (
            rows("1.png,a,train", "2.png,b,val", header="path,label,split"),
            {},
            "has no test split: found train",
        ),
        (
            rows("1.png,a,train", "2.png,b,later", header="path,label,split"),
            {},
            "2.png has split 'later'",
        ),
        (
            rows("1.png,a,train", "2.png,b,", header="path,label,split"),
            {},
            "want train, val or test in every row",
        ),
        (
            rows("1.png,a,p", "2.png,b,", header="path,label,subject"),
            {},
            "line 3: the cell 'subject' is empty",
        ),
        (
            rows("1.png,1", "2.png,yes", header="path,label_x"),
            {},
            "line 3: label_x is 'yes': want 1, 0, -1",
        ),
    ],
)
def test_a_table_that_can_t_be_read_says_why(tmp_path, text, options, words):
    with pytest.raises(DatasetError, match=words):
        open_dataset(write_csv(tmp_path, text), Options(**options))


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("folder:nowhere", "there is no such folder"),
        ("csv:nowhere.csv", "there is no such file"),
        ("csv", "needs a path: write csv:FILE"),
        ("imagenet", "unknown dataset 'imagenet': want one of sample, folder:DIR, csv:FILE"),
        ("tests", "did you mean folder:tests"),
        ("folder:docs", "holds no images in class sub-folders: want docs/CLASS/IMAGE"),
    ],
)
def test_a_source_that_is_not_there_says_what_to_write(dataset, words):
    with pytest.raises(DatasetError, match=words):
        open_dataset(dataset)


def test_the_sample_is_scikit_learn_s_digits(tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setenv("MEDPROBE_CACHE", str(tmp_path))
    manifest, again = open_dataset("sample"), open_dataset("sample")
    assert manifest.digest() == again.digest()
    assert "not medical" in manifest.note
    digits = load_digits()
    for path, label in list(zip(manifest.path, manifest.label, strict=True))[::100]:
        number = int(path.split("/")[1].removesuffix(".png"))
        assert digits.target[number] == label
        pixels = np.asarray(Image.open(manifest.root / path)).astype(float)[1:-1, 1:-1]
        np.testing.assert_allclose(pixels / 255 * 16, digits.images[number], atol=0.04)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    multilabel=st.booleans(),
    parts=st.sampled_from([(0.8, 0.2), (1, 1, 1, 1, 1)]),
)
def test_a_deal_keeps_subjects_whole_shares_fair_and_ignores_the_order_of_rows(
    seed, multilabel, parts
):
    rng = np.random.default_rng(seed)
    n = 400
    subject = np.array([f"p{i}" for i in rng.integers(0, 250, n)])
    if multilabel:
        label = (rng.random((n, 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]).astype(np.int32)
        indicator = label
    else:
        label = rng.choice(4, n, p=[0.6, 0.25, 0.1, 0.05]).astype(np.int32)
        indicator = np.eye(4, dtype=int)[label]
    part = deal(subject, label, parts, seed=seed)
    assert all(len(set(part[subject == s])) == 1 for s in set(subject))
    shares = np.asarray(parts) / sum(parts)
    for k, share in enumerate(shares):
        wanted, got = share * indicator.sum(0), indicator[part == k].sum(0)
        assert (abs(got - wanted) <= 3 + 0.05 * indicator.sum(0)).all(), (wanted, got)
    order = rng.permutation(n)
    np.testing.assert_array_equal(deal(subject[order], label[order], parts, seed=seed), part[order])


def random_table(seed):
    """Subjects of a few images, classes of a few subjects; some subjects have several classes."""
    r = np.random.default_rng([7, seed])
    sizes = r.geometric(r.choice([0.2, 0.5, 1.0]), int(r.integers(6, 80)))
    subject = np.repeat([f"s{i}" for i in range(len(sizes))], sizes)
    classes = int(r.integers(2, 8))
    share = r.dirichlet(np.ones(classes) * r.choice([0.3, 1, 5]))
    label = np.repeat(r.choice(classes, len(sizes), p=share), sizes)
    mixed = r.random(len(label)) < r.choice([0, 0.3])
    return subject, np.where(mixed, r.choice(classes, len(label), p=share), label).astype(np.int32)


def parts_of(subject, label, part):
    """Return for each class how many subjects it has, and which parts have it."""
    for k in set(label.tolist()):
        yield len(set(subject[label == k])), sorted(set(part[label == k].tolist()))


@pytest.mark.parametrize("shares", [(0.8, 0.2), (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3)])
def test_a_label_of_few_subjects_goes_to_training_first_then_to_test(shares):
    for seed in range(150):
        subject, label = random_table(seed)
        pure = all(len(set(label[subject == s])) == 1 for s in set(subject))
        part = deal(subject, label, shares, seed=seed, ranked=True)
        assert all(len(set(part[subject == s])) == 1 for s in set(subject))
        order = np.random.default_rng(seed).permutation(len(label))
        again = deal(subject[order], label[order], shares, seed=seed, ranked=True)
        np.testing.assert_array_equal(again, part[order])
        findings = (label[:, None] == np.arange(8)).astype(np.int32)
        np.testing.assert_array_equal(deal(subject, findings, shares, seed=seed, ranked=True), part)
        for subjects, parts in parts_of(subject, label, part):
            assert parts[0] == 0  # all that is tested was trained on
            if pure:  # nothing else pulls at a subject
                assert parts == list(range(min(subjects, len(shares))))


def test_a_label_with_as_many_subjects_as_folds_is_in_every_fold():
    for seed in range(150):
        subject, label = random_table(seed)
        pure = all(len(set(label[subject == s])) == 1 for s in set(subject))
        part = deal(subject, label, [0.2] * 5, seed=seed)
        for subjects, parts in parts_of(subject, label, part):
            assert len(parts) == min(subjects, 5) or not pure


def test_a_drawn_split_never_tests_a_class_that_it_does_not_train(tmp_path):
    lines = [f"{i}.png,{'ab'[i % 2]},p{i // 3}" for i in range(60)]
    lines += [f"x{i}.png,rare,q" for i in range(4)] + [f"y{i}.png,two,r{i}" for i in range(2)]
    table = write_csv(tmp_path, rows(*lines, header="path,label,subject"))
    for seed in range(20):
        for options in ({}, {"val_share": 0.1}, {"test_fold": (1 + seed % 4, 4)}):
            found = open_dataset(table, Options(seed=seed, split="drawn", **options))
            names = np.array(found.classes)[found.label]
            assert set(found.split[names == "rare"]) == {"train"}
            if "val_share" in options:
                assert set(found.split[names == "two"]) == {"train", "test"}
            assert set(names[found.split == "test"]) <= set(names[found.split == "train"])


@pytest.mark.parametrize("again", ["./img/0.png", "img/../img/0.png", "img//0.png", "/img/0.png"])
def test_an_image_listed_under_two_spellings_is_listed_twice(tmp_path, again):
    again = f"{tmp_path}{again}" if again[0] == "/" else again
    lines = [f"img/{i}.png,{'ab'[i % 2]}" for i in range(20)]
    with pytest.raises(DatasetError, match=rf"lists 1 images .* img/0.png, again as {again}: want"):
        open_dataset(write_csv(tmp_path, rows(*lines, f"{again},b")))
    urls = [f"s3://b/{path},{label}" for path in ("0.png", "/0.png") for label in "a"]
    lines = [*lines, "IMG/0.png,a", *urls]  # others, as far as one can tell
    assert len(open_dataset(write_csv(tmp_path, rows(*lines)))) == 23


def test_too_few_subjects_for_a_test_part_are_said(tmp_path):
    table = rows(*(f"{line},p" for line in GOOD), header="path,label,subject")
    words = r"1 subject is too few for a test part \(drawn by subject, .*found train \(20\)"
    for options in ({}, {"val_share": 0.2}, {"test_fold": (1, 2)}):
        with pytest.raises(DatasetError, match=words):
            open_dataset(write_csv(tmp_path, table), Options(**options))


@pytest.mark.parametrize(
    "names",
    [
        ["Grade 1", "Grade 2", "Grade 10"],
        ["1a", "2a", "10a", "10b", "x"],
        ["0.25 mm", "0.5 mm", "10 mm"],
        ["T1 N2", "T1 N10", "T2 N1"],
        ["-1", "0", "0.5", "2", "10"],
        ["1", "2", "10", "nan"],  # a word here
        ["Mass", "edema", "no finding", "\u00e9"],
    ],
)
def test_classes_are_in_natural_order_whatever_the_order_of_rows(names):
    for order in (names, names[::-1], sorted(names), names[1:] + names[:2]):
        assert natural_order(order) == names


@settings(max_examples=100)
@given(st.sets(st.text(st.characters(exclude_categories=["Nd", "Cs"]), max_size=4)))
def test_classes_without_numbers_are_in_the_order_of_text(names):
    assert natural_order(list(names - {"inf", "nan"})) == sorted(names - {"inf", "nan"})


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        (("1=2+3",), "1 is already a class: write 1=1[+]2[+]3, or"),
        (("a=0+1", "a=2+3"), "a is already a class: write a=a[+]2[+]3"),
        (("a=0+1", "b=1+2"), "1 went into a already"),
        (("a=0+7",), "names no class of 0, 1, 2, 3"),
    ],
)
def test_a_merge_never_makes_two_classes_of_one_name(tmp_path, merge, words):
    lines = [f"{i}.png,{i % 4}" for i in range(40)]
    findings = [f"{i}.png," + ",".join("01"[i % 4 == k] for k in range(4)) for i in range(40)]
    header = "path," + ",".join(f"label_{k}" for k in range(4))
    for text in (rows(*lines), rows(*findings, header=header)):
        source = write_csv(tmp_path, text)
        with pytest.raises(DatasetError, match=words):
            open_dataset(source, Options(merge=merge))
        joined = open_dataset(source, Options(merge=("1=1+2+3",)))
        assert joined.classes == ("0", "1")
        label = joined.label if joined.label.ndim == 1 else joined.label[:, 1]
        assert label.tolist() == [int(i % 4 > 0) for i in range(40)]
        assert open_dataset(source, Options(merge=("a=0+1", "1=2+3"))).classes == ("a", "1")


def test_real_tables_are_read_as_their_readmes_say(shared_data):
    idrid = open_dataset(f"csv:{shared_data / 'idrid' / 'manifest.csv'}")
    assert (idrid.dataset, len(idrid), idrid.classes) == ("idrid-manifest", 516, tuple("01234"))
    assert ((idrid.split == "train").sum(), (idrid.split == "test").sum()) == (413, 103)
    options = Options(label_sep="|", subject_col="patient")
    nih = open_dataset(f"csv:{shared_data / 'nih_cxr14_dev' / 'manifest.csv'}", options)
    assert nih.task == "multilabel"
    assert len(set(nih.subject)) == 472
    assert not set(nih.subject[nih.split == "train"]) & set(nih.subject[nih.split == "test"])
