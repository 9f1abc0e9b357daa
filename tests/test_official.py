"""The four published data sets from folders laid out as their archives unpack, with their traps."""

import random

import numpy as np
import pytest
from PIL import Image

from features.audit import audit
from features.datasets import Options, open_dataset
from features.datasets.chexpert import FINDINGS
from features.errors import DatasetError
from features.store import FeatureStore


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def split_of(dataset, **options):
    manifest = open_dataset(dataset, Options(**options))
    return dict(zip(manifest.path.tolist(), manifest.split.tolist(), strict=True))


# --- APTOS 2019 ----------------------------------------------------------------------------------


@pytest.fixture
def aptos(tmp_path):
    rows = [f"{i:04x}ab,{i % 5}" for i in range(60)]
    (tmp_path / "train.csv").write_text("id_code,diagnosis\n" + "\n".join(rows) + "\n")
    (tmp_path / "test.csv").write_text("id_code\nffff\n")
    for i in range(60):
        if i != 7:  # an id without an image
            image(tmp_path / "train_images" / f"{i:04x}ab.png", i)
    return tmp_path


def test_aptos_is_read_as_kaggle_unpacks_it(aptos):
    manifest = open_dataset(f"aptos2019:{aptos}")
    assert (len(manifest), manifest.classes[4]) == (60, "proliferative DR")
    assert manifest.label[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert manifest.metric == "quadratic_kappa"
    assert manifest.normalize == ((0.415, 0.221, 0.073), (0.275, 0.150, 0.081))
    assert (manifest.root / manifest.path[0]).is_file()


def test_aptos_study_split_is_python_s_shuffle_with_seed_42(aptos):
    order = list(range(60))
    random.Random(42).shuffle(order)
    val, test = order[:9], order[9:18]
    split = list(split_of(f"aptos2019:{aptos}", split="study").values())
    assert sorted(val) == [i for i, s in enumerate(split) if s == "val"]
    assert sorted(test) == [i for i, s in enumerate(split) if s == "test"]


def test_an_id_without_image_is_a_bad_image_and_no_more(aptos, tmp_path, backbone):
    from features.extract import extract

    manifest = open_dataset(f"aptos2019:{aptos}")
    with pytest.warns(UserWarning, match="1 of 60 files is not there: .*/0007ab.png; they"):
        [report] = extract(manifest, [backbone], out=tmp_path / "out")
    assert report.bad == {"train_images/0007ab.png": "file not found"}


# --- ISIC 2019 -----------------------------------------------------------------------------------

CODES = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]


@pytest.fixture
def isic(tmp_path):
    truth, about = (
        ["image," + ",".join(CODES)],
        ["image,age_approx,anatom_site_general,lesion_id,sex"],
    )
    for i in range(120):
        name = f"ISIC_{i:07d}" + ("_downsampled" if i % 10 == 9 else "")
        k = 8 if i == 5 else i % 8  # one UNK
        truth.append(f"{name}," + ",".join("1.0" if j == k else "0.0" for j in range(9)))
        lesion = "" if i % 4 == 0 else f"BCN_{i // 6:04d}"
        about.append(f"{name},{30 + i % 5 * 5}.0,,{lesion},{'male' if i % 2 else 'female'}")
        image(tmp_path / "ISIC_2019_Training_Input" / f"{name}.jpg", i)
    (tmp_path / "ISIC_2019_Training_GroundTruth.csv").write_text("\n".join(truth))
    (tmp_path / "ISIC_2019_Training_Metadata.csv").write_text("\n".join(about))
    return tmp_path


def test_isic_keeps_lesions_together_and_unknown_ones_unscored(isic):
    manifest = open_dataset(f"isic2019:{isic}")
    assert manifest.classes == tuple(CODES[:8])
    assert manifest.label[:9].tolist() == [0, 1, 2, 3, 4, -1, 6, 7, 0]
    assert manifest.note == "1 images of no known class are not scored"
    assert manifest.subject[0] == "ISIC_0000000"  # no lesion_id
    assert manifest.subject[1] == manifest.subject[2] == "BCN_0000"
    assert manifest.metric == "balanced_accuracy"
    assert manifest.columns["sex"][:2].tolist() == ["female", "male"]
    parts = {s: set(manifest.subject[manifest.split == s]) for s in ("train", "test")}
    assert not parts["train"] & parts["test"]


def test_isic_study_split_is_by_image_and_cuts_lesions(isic):
    manifest = open_dataset(f"isic2019:{isic}", Options(split="study"))
    sizes = [(manifest.split == s).sum() for s in ("train", "val", "test")]
    assert sizes == [96, 12, 12]
    parts = {s: set(manifest.subject[manifest.split == s]) for s in ("train", "test")}
    assert parts["train"] & parts["test"]


def test_isic_images_may_lie_in_train(isic):
    (isic / "ISIC_2019_Training_Input").rename(isic / "train")
    manifest = open_dataset(f"isic2019:{isic}")
    assert manifest.path[9] == "train/ISIC_0000009_downsampled.jpg"


# --- CheXpert ------------------------------------------------------------------------------------

HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(FINDINGS)


@pytest.fixture(params=["CheXpert-v1.0-small", "CheXpert-v1.0"])
def chexpert(request, tmp_path):
    top = tmp_path / request.param
    rng = np.random.default_rng(0)
    rows = []
    for patient in range(1, 61):
        for study in range(1, 13 if patient == 9 else 2 + patient % 2):  # study12 sorts before 2
            for view in ("view1_frontal", "view2_lateral")[: 1 + patient % 3 // 2]:
                path = f"train/patient{patient:05d}/study{study}/{view}.jpg"
                cells = rng.choice(["1.0", "0.0", "-1.0", ""], 14, p=[0.3, 0.2, 0.1, 0.4])
                if patient == 3:
                    cells[:] = ""
                side = "Lateral" if "lateral" in view else "Frontal"
                rows.append(
                    f"{top.name}/{path},Male,{40 + patient % 7},{side},AP," + ",".join(cells)
                )
                image(top / path, patient)
    (top / "train.csv").write_text("\n".join([HEADER, *rows]))
    valid = "valid/patient64541/study1/view1_frontal.jpg"
    image(top / valid)
    cells = ",".join(["0.0", "1.0"] * 7)
    (top / "valid.csv").write_text(f"{HEADER}\n{top.name}/{valid},Female,73,Frontal,AP,{cells}\n")
    return top


def test_chexpert_keeps_states_patients_and_views(chexpert):
    manifest = open_dataset(f"chexpert:{chexpert}")
    assert manifest.classes == FINDINGS
    assert set(np.unique(manifest.label)) == {1, 0, -1, -2}
    assert manifest.subject[0] == "patient00001"
    assert set(manifest.columns["view"]) == {"Frontal", "Lateral"}
    assert len(set(manifest.columns["study"][manifest.subject == "patient00009"])) == 12
    assert manifest.split[-1] == "none"  # valid.csv
    parts = {s: set(manifest.subject[manifest.split == s]) for s in ("train", "test")}
    assert not parts["train"] & parts["test"]
    assert len(open_dataset(f"chexpert:{chexpert.parent}")) == len(manifest)
    five = open_dataset(f"chexpert:{chexpert}", Options(label_col="competition"))
    assert len(five.classes) == 5
    assert five.digest() == manifest.digest()


def test_chexpert_study_split_is_the_study_s_with_its_labels(chexpert):
    """Against pandas' label slices, emulated: .loc[a:] from the place of label a, ends included."""
    manifest = open_dataset(f"chexpert:{chexpert}", Options(split="study"))
    full = [f"{chexpert.name}/{path}" for path in manifest.path[:-1]]
    index = [i for _, i in sorted((path, i) for i, path in enumerate(full))]  # sort_values
    size = int(len(index) * 0.2) + 15
    train = index[index.index(size) :]
    held = index[: index.index(size) + 1]
    val = held[: held.index(int(len(held) / 2)) + 1]
    test = held[held.index(int(len(held) / 2)) :]
    ours = {s: set(np.flatnonzero(manifest.split == s)) for s in ("train", "val", "test", "none")}
    assert ours["test"] == set(test)
    assert ours["train"] == set(train) - {size}  # the row that the study has in both
    assert ours["val"] == set(val) - {int(len(held) / 2)}
    assert ours["none"] == {len(full)}
    empty = manifest.subject == "patient00003"
    assert (manifest.label[empty, 0] == 1).all()  # No Finding


def test_chexpert_official_split_tests_on_valid(chexpert):
    split = list(split_of(f"chexpert:{chexpert}", split="official").values())
    assert split[-1] == "test"
    assert set(split[:-1]) == {"train"}


# --- DDSM ----------------------------------------------------------------------------------------


@pytest.fixture
def ddsm(tmp_path):
    for split, cases in (("train", range(20)), ("val", range(20, 26)), ("test", range(25, 34))):
        names = []
        for case in cases:  # case 25 is in val and in test, each with one side
            kind = ("normal", "benign", "cancer")[case % 3]
            sides = ["RIGHT"] if case == 25 and split == "test" else ["LEFT"]
            for side in sides:
                for view in ("CC", "MLO"):
                    name = f"{kind}s/{kind}_{case:02d}-A_{case:04d}_1.{side}_{view}.png"
                    image(tmp_path / "ddsm_raw" / name, case)
                    names.append(name)
        (tmp_path / "ddsm_raw_image_lists").mkdir(exist_ok=True)
        (tmp_path / "ddsm_raw_image_lists" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return tmp_path


def test_ddsm_lists_give_split_case_and_label_by_name(ddsm):
    manifest = open_dataset(f"ddsm:{ddsm}")
    assert manifest.classes == ("normal", "benign or cancer")
    assert manifest.label[:6].tolist() == [0, 0, 1, 1, 1, 1]
    assert manifest.subject[0] == manifest.subject[1] == "normal_00-A_0000_1"
    assert {s: int((manifest.split == s).sum()) for s in ("train", "val", "test")} == {
        "train": 40,
        "val": 12,
        "test": 18,
    }
    both = set(manifest.subject[manifest.split == "val"]) & set(
        manifest.subject[manifest.split == "test"]
    )
    assert both == {"benign_25-A_0025_1"}
    three = open_dataset(f"ddsm:{ddsm}", Options(label_col="pathology"))
    assert three.classes == ("normal", "benign", "cancer")
    drawn = open_dataset(f"ddsm:{ddsm}", Options(split="drawn"))
    assert drawn.digest() == three.digest() == manifest.digest()
    assert drawn.split_from.startswith("drawn by subject")


COLUMNS = (
    "patient_id,breast_density,left or right breast,image view,abnormality id,pathology,"
    "image file path"
)


@pytest.fixture
def cbis(tmp_path):
    n = 0
    for kind in ("mass", "calc"):
        for part in ("train", "test"):
            rows = [COLUMNS]
            for case in range(6):
                n += 1
                patient = "P_00001" if case == 0 else f"P_{n:05d}"  # one patient in all four
                key = f"{kind.title()}-{part.title()}ing_{patient}_LEFT_CC"
                label = ("BENIGN", "MALIGNANT", "BENIGN_WITHOUT_CALLBACK")[case % 3]
                # The path ends in a line break, as in the real tables.
                row = f'{patient},3,LEFT,CC,1,{label},"{key}/1.3.6/1.3.7/000000.dcm\n"'
                rows.append(row)
                if case == 1:  # a second lesion, benign, of the same image
                    rows.append(row.replace("MALIGNANT", "BENIGN"))
                place = tmp_path / "CBIS-DDSM" / key / "07-20-2016-DDSM-1" / "1.0-full mammogram"
                place.mkdir(parents=True)
                (place / "1-1.dcm").write_bytes(b"\0" * 128 + b"DICM")
            (tmp_path / f"{kind}_case_description_{part}_set.csv").write_text("\n".join(rows))
    return tmp_path


def test_cbis_ddsm_is_found_below_the_downloader_s_folders(cbis):
    manifest = open_dataset(f"ddsm:{cbis}")
    assert len(manifest) == 24
    assert manifest.classes == ("benign", "malignant")
    assert manifest.label[:4].tolist() == [0, 1, 0, 0]
    assert all((manifest.root / path).is_file() for path in manifest.path)
    assert (manifest.subject == "P_00001").sum() == 4
    assert len(set(manifest.split[manifest.subject == "P_00001"])) == 1
    official = open_dataset(f"ddsm:{cbis}", Options(split="official"))
    assert set(official.split[official.subject == "P_00001"]) == {"train", "test"}


# --- what is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "missing", "words"),
    [
        (
            "aptos",
            "train.csv",
            "has no train.csv: unpack it there; it is at https://www.kaggle.com",
        ),
        ("aptos", "train_images", "has no train_images"),
        ("isic", "ISIC_2019_Training_Metadata.csv", "it is at https://challenge.isic-archive.com"),
        ("isic", "ISIC_2019_Training_Input", "has no ISIC_2019_Training_Input or train: unpack"),
        ("ddsm", "ddsm_raw_image_lists/val.txt", "has no val.txt"),
        ("cbis", "calc_case_description_test_set.csv", "has no calc_.*cancerimagingarchive"),
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(request, fixture, missing, words):
    folder = request.getfixturevalue(fixture)
    (folder / missing).rename(folder / "elsewhere")
    name = {"aptos": "aptos2019", "isic": "isic2019", "cbis": "ddsm"}.get(fixture, fixture)
    with pytest.raises(DatasetError, match=words):
        open_dataset(f"{name}:{folder}")


def test_ddsm_lists_without_a_name_say_so(ddsm):
    for file in (ddsm / "ddsm_raw_image_lists").iterdir():
        file.write_text("")
    with pytest.raises(DatasetError, match="holds no images"):
        open_dataset(f"ddsm:{ddsm}")


def test_chexpert_without_valid_csv_says_where_it_is(chexpert):
    (chexpert / "valid.csv").unlink()
    with pytest.raises(DatasetError, match=r"has no valid.csv: .*aimi\.stanford\.edu"):
        open_dataset(f"chexpert:{chexpert}")


def test_a_table_without_any_of_its_images_is_refused(aptos):
    (aptos / "train_images").rename(aptos / "x")
    (aptos / "train_images").mkdir()
    with pytest.raises(
        DatasetError, match=r"none of its 60 images is there, such as .*/train_images/"
    ):
        open_dataset(f"aptos2019:{aptos}")


@pytest.mark.parametrize(
    ("dataset", "split", "words"),
    [
        ("aptos2019:{}", "official", "aptos2019 has no official split: found study; leave --split"),
        ("csv:{}/train.csv", "study", "csv has no study split: found none"),
    ],
)
def test_a_split_that_a_source_has_not_got_is_refused(aptos, dataset, split, words):
    with pytest.raises(DatasetError, match=words):
        open_dataset(dataset.format(aptos), Options(split=split))


def test_the_two_forms_of_ddsm_have_a_split_of_their_own_each(ddsm):
    with pytest.raises(DatasetError, match="no official split: --split study is that of its lists"):
        open_dataset(f"ddsm:{ddsm}", Options(split="official"))
    assert open_dataset(f"ddsm:{ddsm}", Options(split="study")).split_from == "the study's lists"


def test_cbis_ddsm_has_no_study_split(cbis):
    with pytest.raises(DatasetError, match="has no study split: leave --split out"):
        open_dataset(f"ddsm:{cbis}", Options(split="study"))


def test_a_folder_that_is_not_there_says_where_the_data_is():
    with pytest.raises(DatasetError, match="there is no such folder; the data is at https://"):
        open_dataset("chexpert:nowhere")


# --- labels and splits apart from features -------------------------------------------------------


def test_other_labels_splits_and_merges_never_compute_anew(ddsm, tmp_path, backbone):
    from features.extract import extract

    def computed(**options):
        manifest = open_dataset(f"ddsm:{ddsm}", Options(**options))
        [report] = extract(manifest, [backbone], out=tmp_path / "out")
        with FeatureStore.open(report.store) as store:
            assert store.manifest().classes == manifest.classes
            assert store.manifest().split_digest() == manifest.split_digest()
        return report.computed

    assert computed() == 70
    for options in (
        {"label_col": "pathology"},
        {"label_col": "pathology", "merge": ("lesion=benign+cancer",)},
        {"split": "drawn", "seed": 3, "val_share": 0.1},
    ):
        with pytest.warns(UserWarning, match=r"ddsm/.*\.h5 has new labels: multiclass, normal, "):
            assert computed(**options) == 0
    assert computed(test_fold=(2, 5), split="drawn") == 0


def test_merged_classes_and_findings_are_what_their_parts_say(ddsm, chexpert):
    names = {"label_col": "pathology"}
    three = open_dataset(f"ddsm:{ddsm}", Options(**names))
    two = open_dataset(f"ddsm:{ddsm}", Options(**names, merge=("lesion=benign + cancer",)))
    assert two.classes == ("normal", "lesion")
    np.testing.assert_array_equal(two.label, np.minimum(three.label, 1))
    whole = open_dataset(f"chexpert:{chexpert}")
    less = open_dataset(f"chexpert:{chexpert}", Options(merge=("Any=Edema+Pneumonia",)))
    assert less.classes[5:7] == ("Any", "Consolidation")
    edema, pneumonia = whole.label[:, 5], whole.label[:, 7]
    assert (less.label[(edema == 1) | (pneumonia == 1), 5] == 1).all()
    assert (less.label[(edema == -2) & (pneumonia == -1), 5] == -1).all()
    with pytest.raises(DatasetError, match="names no class of normal, benign, cancer: want NEW="):
        open_dataset(f"ddsm:{ddsm}", Options(**names, merge=("a=b+c",)))


def test_folds_test_every_image_once_and_keep_subjects_whole(isic):
    seen = []
    for i in (1, 2, 3):
        manifest = open_dataset(f"isic2019:{isic}", Options(test_fold=(i, 3)))
        test = manifest.split == "test"
        assert not set(manifest.subject[test]) & set(manifest.subject[~test])
        assert manifest.split_from == f"drawn by subject, stratified, test is fold {i} of 3, seed 0"
        seen += manifest.id[test].tolist()
    assert sorted(seen) == sorted(manifest.id)


def test_a_split_does_not_depend_on_the_order_of_the_rows(aptos):
    before = split_of(f"aptos2019:{aptos}", seed=4, val_share=0.15)
    head, *rows = (aptos / "train.csv").read_text().splitlines()
    random.Random(0).shuffle(rows)
    (aptos / "train.csv").write_text("\n".join([head, *rows]))
    assert split_of(f"aptos2019:{aptos}", seed=4, val_share=0.15) == before
    assert sorted(set(before.values())) == ["test", "train", "val"]


# --- what the study's splits leak ----------------------------------------------------------------


def test_the_audit_finds_what_the_study_s_isic_split_leaks(isic):
    found = audit(open_dataset(f"isic2019:{isic}", Options(split="study")))
    manifest = open_dataset(f"isic2019:{isic}", Options(split="study"))
    cut = {
        s
        for s in set(manifest.subject)
        if len(set(manifest.split[manifest.subject == s])) > 1  # by hand
    }
    assert cut
    assert {group.name for group in found.leaks} == cut
    assert "more than one" in found.line()
    assert not audit(open_dataset(f"isic2019:{isic}")).leaks


def test_the_audit_finds_the_patient_that_the_study_s_chexpert_split_cuts(chexpert):
    study = open_dataset(f"chexpert:{chexpert}", Options(split="study"))
    found = audit(study)
    [leak] = [g for g in found.leaks if {"train", "test"} <= set(g.splits)]
    # The row at which the study cuts, and the next one, which trains, are of one patient.
    cut = int((len(study) - 1) * 0.2) + 15
    assert leak.name == study.subject[cut]
    assert not audit(open_dataset(f"chexpert:{chexpert}")).leaks


def test_the_audit_finds_the_patient_in_both_halves_of_cbis_ddsm(cbis):
    official = audit(open_dataset(f"ddsm:{cbis}", Options(split="official")))
    assert [(group.name, len(group.images)) for group in official.leaks] == [("P_00001", 4)]
    assert not audit(open_dataset(f"ddsm:{cbis}")).leaks


def test_the_audit_finds_a_case_whose_two_sides_the_ddsm_lists_part(ddsm):
    found = audit(open_dataset(f"ddsm:{ddsm}"))
    assert [group.name for group in found.leaks] == ["benign_25-A_0025_1"]
