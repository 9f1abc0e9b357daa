"""DICOM is shown as pydicom's own functions and the files' known values say, or refused aloud."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import (
    apply_color_lut,
    apply_modality_lut,
    apply_presentation_lut,
    apply_voi_lut,
    apply_windowing,
)
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from cli import cli
from features import dicom, dicom_grey
from features.datasets import Options, open_dataset
from features.dicom import decode_dicom, is_dicom, show_dicom
from features.errors import DatasetError, ImageError
from features.extract import extract
from features.images import decode as decode_any
from features.reasons import Remark
from features.store import FeatureStore

BUNDLED = sorted(
    path
    for path in (Path(pydicom.__file__).parent / "data" / "test_files").rglob("*")
    if path.is_file() and is_dicom(path.read_bytes()[:132])
)


def decode(data):
    return decode_any(data).image


def grey(image):
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def made(pixels, **header):
    """The bytes of a DICOM file of given pixels; header elements by keyword."""
    pixels = np.asarray(pixels)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.PixelData = pixels.tobytes()
    for keyword, value in header.items():
        setattr(ds, keyword, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


RAMP = np.arange(-2000, 2096, dtype=np.int16).reshape(64, 64)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_pydicom_s_own_files_decode_or_are_refused_with_a_reason(path):
    try:
        image = decode(path.read_bytes())
    except ImageError as error:
        assert len(str(error)) > 20
        assert "no attribute 'PixelData'" not in str(error)
        has_pixels = "PixelData" in pydicom.dcmread(path, force=True)
        assert str(error).startswith("DICOM that can't" if has_pixels else "DICOM without pixels")
    else:
        assert image.mode == "RGB"
        assert np.asarray(image).std() > 0 or image.size == (16, 16)  # white icons of DICOMDIR


def test_the_zoo_decodes_to_its_known_sizes_and_brightness(shared_data):
    folder = shared_data / "dicom_zoo"
    refused = []
    with (folder / "manifest.csv").open() as file:
        for row in csv.DictReader(file):
            data = (folder / row["path"]).read_bytes()
            try:
                image = decode(data)
            except ImageError:
                refused.append(Path(row["path"]).name)
                continue
            assert row["decodes"] == "yes", row["path"]
            shape = [int(n) for n in row["shape"].split("x")]
            if row["photometric"].startswith(("RGB", "YBR")):
                shape = shape[:-1]
            assert image.size == (shape[-1], shape[-2]), row["path"]
            # Colour that isn't wider than 8 bits is shown as it is stored: its mean is known.
            if row["photometric"].startswith(("RGB", "YBR")) and row["frames"] in "01":
                scale = (2 ** int(row["bits_stored"]) - 1) / 255
                assert np.mean(image) == pytest.approx(float(row["pmean"]) / scale, abs=0.3)
    assert refused == [
        "JPEG-lossy.dcm",
        "JPEG2000-embedded-sequence-delimiter.dcm",
        "JPGExtended.dcm",  # lossy JPEG of 12 bits: no permissive decoder has it
        "MR_truncated.dcm",
        "badVR.dcm",
    ]


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm", "examples_overlay.dcm"])
def test_grey_is_what_pydicom_s_modality_and_voi_functions_make(name):
    path = get_testdata_file(name)
    ds = pydicom.dcmread(path)
    values = apply_modality_lut(ds.pixel_array, ds)
    wanted = apply_voi_lut(values, ds, prefer_lut=True).astype(float)
    if "WindowCenter" in ds:
        ends = [ds.BitsStored - ds.PixelRepresentation]
        signed = ds.PixelRepresentation == 1
        low, high = (-(2 ** ends[0]), 2 ** ends[0] - 1) if signed else (0, 2 ** ends[0] - 1)
        slope, intercept = ds.get("RescaleSlope", 1), ds.get("RescaleIntercept", 0)
        low, high = low * slope + intercept, high * slope + intercept
    else:
        low, high = wanted.min(), wanted.max()
    wanted = (wanted - low) / (high - low) * 255
    np.testing.assert_allclose(grey(decode(Path(path).read_bytes())), wanted, atol=0.51)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_each_window_function_is_pydicom_s(function):
    header = {"WindowCenter": [100, 0], "WindowWidth": [777, 1], "VOILUTFunction": function}
    data = made(RAMP, RescaleSlope="1.5", RescaleIntercept="-30", **header)
    ds = pydicom.dcmread(io.BytesIO(data))
    wanted = apply_voi_lut(apply_modality_lut(RAMP, ds), ds)
    low, high = -32768 * 1.5 - 30, 32767 * 1.5 - 30
    np.testing.assert_allclose(grey(decode(data)), (wanted - low) / (high - low) * 255, atol=0.51)


def test_a_given_window_goes_from_black_to_white_over_its_width():
    data = made(RAMP, RescaleIntercept="-24", RescaleSlope="1", WindowCenter="0", WindowWidth="1")
    pixels = grey(decode_dicom(data, window=(40, 400))).astype(float).ravel()
    values = RAMP.ravel() - 24.0
    np.testing.assert_allclose(pixels, np.clip((values + 160) / 400, 0, 1) * 255, atol=0.51)


def test_monochrome1_is_the_negative_and_padding_is_black_in_both():
    header = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}
    positive = grey(decode(made(RAMP, **header)))
    negative = grey(decode(made(RAMP, PhotometricInterpretation="MONOCHROME1", **header)))
    padding = RAMP <= -1990
    assert (positive[padding] == 0).all()
    assert (negative[padding] == 0).all()
    assert positive[RAMP == -1989] == 0  # the darkest that is not padding
    assert (abs(255 - positive[~padding].astype(int) - negative[~padding]) <= 1).all()


def test_a_voi_lut_comes_before_a_window():
    table = Dataset()
    table.LUTDescriptor = [256, 0, 8]
    table.add_new("LUTData", "OW", (255 - np.arange(256)).astype("<u2").tobytes())
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = made(pixels, VOILUTSequence=[table], WindowCenter="10", WindowWidth="2")
    np.testing.assert_array_equal(grey(decode(data)), 255 - pixels)


def test_eight_bits_without_a_window_are_shown_as_they_are_and_more_by_their_extremes():
    dim = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(grey(decode(made(dim))), dim)
    wide = grey(decode(made(dim.astype(np.uint16) + 1000)))
    assert (wide.min(), wide.max()) == (0, 255)
    assert (grey(decode(made(np.full((8, 8), 7, dtype=np.uint16)))) == 0).all()


@pytest.mark.parametrize("pixels", [np.int16, np.uint8], ids=str)
def test_bands_of_rows_leave_no_trace(monkeypatch, pixels):
    stored = np.random.default_rng(0).integers(0, 120, (40, 30)).astype(pixels)
    header = {"RescaleSlope": "1.7", "RescaleIntercept": "-3.1", "PixelPaddingValue": 7}
    window = {"WindowCenter": "60", "WindowWidth": "99"}
    for said in (header, header | window, header | {"PhotometricInterpretation": "MONOCHROME1"}):
        data = made(stored, **said)
        whole = grey(decode(data))
        monkeypatch.setattr(dicom_grey, "BAND", 65)
        np.testing.assert_array_equal(grey(decode(data)), whole)
        monkeypatch.undo()
    values = stored * 1.7 + -3.1  # the rule as it is written, all at once
    display = np.clip((values - (59.5 - 98 / 2)) / 98, 0, 1)
    display[stored == 7] = 0
    wanted = (display * 255 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(grey(decode(made(stored, **header, **window))), wanted)


def test_palettes_are_pydicom_s():
    path = get_testdata_file("examples_palette.dcm")
    ds = pydicom.dcmread(path)
    wanted = apply_color_lut(ds.pixel_array, ds) / 257
    np.testing.assert_allclose(np.asarray(decode(Path(path).read_bytes())), wanted, atol=0.51)


def test_of_several_frames_the_middle_or_the_asked_one_is_shown():
    frames = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((5, 4, 4), dtype=np.uint8)
    data = made(frames)
    assert (grey(decode(data)) == 2).all()
    assert (grey(decode_dicom(data, frame=5)) == 4).all()
    with pytest.raises(ImageError, match="has no frame 6: found 5"):
        decode_dicom(data, frame=6)


def test_frames_of_enhanced_objects_have_their_own_window():
    frames = np.stack([np.arange(0, 4096, dtype=np.uint16).reshape(64, 64)] * 2)
    groups = []
    for center in (1000, 3000):
        window, slope, group = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth, window.VOILUTFunction = center, 500, "LINEAR_EXACT"
        slope.RescaleSlope, slope.RescaleIntercept = 1, -10
        group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [window], [slope]
        groups.append(group)
    data = made(frames, PerFrameFunctionalGroupsSequence=groups)
    for number, center in enumerate((1000, 3000), 1):
        wanted = np.clip((frames[0] - 10.0 - center + 250) / 500, 0, 1) * 255
        np.testing.assert_allclose(grey(decode_dicom(data, frame=number)), wanted, atol=0.51)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", ["INVERSE", "IDENTITY"])
def test_the_presentation_lut_s_shape_is_pydicom_s(photometric, shape):
    header = {"WindowCenter": "100", "WindowWidth": "777", "VOILUTFunction": "LINEAR_EXACT"}
    header |= {"PhotometricInterpretation": photometric, "PresentationLUTShape": shape}
    data = made(RAMP, **header)
    ds = pydicom.dcmread(io.BytesIO(data))
    wanted = apply_presentation_lut(apply_windowing(RAMP, ds), ds)
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min()) * 255
    np.testing.assert_allclose(grey(decode(data)), wanted, atol=0.51)
    given = grey(decode_dicom(data, window=(100, 777))).astype(int)
    assert abs(given - grey(decode(data))).max() <= 1


def test_without_a_shape_monochrome1_alone_is_the_negative():
    plain = grey(decode(made(RAMP))).astype(int)
    negative = grey(decode(made(RAMP, PhotometricInterpretation="MONOCHROME1")))
    assert abs(255 - plain - negative).max() <= 1
    odd = grey(decode(made(RAMP, PresentationLUTShape="LIN OD")))  # of films: not for images
    np.testing.assert_array_equal(odd, plain)


def test_real_files_are_shown_as_pydicom_s_chain_of_functions_has_them():
    """All grey ones of pydicom: the same up to the choice of black and white, inverted or not."""
    compared = 0
    for path in BUNDLED:
        out = io.BytesIO()
        try:
            ds = pydicom.dcmread(path)
            ds.PresentationLUTShape = ("INVERSE", "IDENTITY")[compared % 2]
            ds.save_as(out)
            stored = ds.pixel_array
            values = apply_voi_lut(apply_modality_lut(stored, ds), ds)
            values = apply_presentation_lut(values, ds).astype(float)
        except Exception:  # a file that is broken on purpose, or has no pixels
            continue
        if not ds.PhotometricInterpretation.startswith("MONOCHROME"):
            continue
        if values.ndim == 3:
            values, stored = values[len(values) // 2], stored[len(stored) // 2]
        image = stored != ds.get("PixelPaddingValue", -1)  # padding is black in any case
        ours, wanted = grey(decode(out.getvalue()))[image].astype(float), values[image]
        if not np.isfinite(wanted).all() or not np.ptp(wanted):
            continue
        wanted = (wanted - wanted.min()) / np.ptp(wanted)
        slope, offset = np.polyfit(wanted, ours, 1)
        assert slope > 0, path
        assert abs(slope * wanted + offset - ours).max() < 1, path
        compared += 1
    assert compared > 25


UNUSABLE = [
    {"WindowCenter": ["5", "100"], "WindowWidth": ["0", "777"]},
    {"WindowCenter": ["5", "100"], "WindowWidth": ["-3", "777"]},
    {"WindowCenter": ["5", "100"], "WindowWidth": ["0.5", "777"]},
    {"WindowCenter": ["1e999", "100"], "WindowWidth": ["9", "777"]},
    {"WindowCenter": ["1", "2", "100"], "WindowWidth": ["0", "0", "777"]},
]


@pytest.mark.parametrize("header", UNUSABLE, ids=str)
def test_the_first_window_that_can_be_used_is_taken_and_it_is_said(header):
    data = made(RAMP, **header)
    image, remark = show_dicom(data)
    ds = pydicom.dcmread(io.BytesIO(data))
    wanted = apply_windowing(RAMP, ds, index=len(header["WindowWidth"]) - 1)
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min()) * 255
    np.testing.assert_allclose(grey(image), wanted, atol=0.51)
    assert remark == Remark.NEXT_WINDOW.value


@pytest.mark.parametrize(
    "header",
    [
        {"WindowCenter": "1", "WindowWidth": "0"},
        {"WindowCenter": ["1", "2"], "WindowWidth": ["0", "-1"]},
        {"WindowCenter": "1", "WindowWidth": "100", "VOILUTFunction": "SPLINE"},
        {"WindowCenter": "1e999", "WindowWidth": "100"},
    ],
    ids=str,
)
def test_without_any_usable_window_the_image_has_its_own_range_and_it_is_said(header):
    image, remark = show_dicom(made(RAMP, **header))
    wanted = (RAMP + 2000.0) / 4095 * 255
    np.testing.assert_allclose(grey(image), wanted, atol=0.51)
    assert remark == Remark.NO_WINDOW.value


def test_a_window_that_is_no_number_is_not_used():
    data = made(RAMP, WindowCenter="40", WindowWidth="777")
    image, remark = show_dicom(data.replace(b"777 ", b"wide"))
    assert remark == Remark.NO_WINDOW.value
    assert (grey(image).min(), grey(image).max()) == (0, 255)


def test_nothing_is_said_where_the_header_is_followed_or_has_no_window():
    for header in ({}, {"WindowCenter": "", "WindowWidth": ""},
                   {"WindowCenter": "9", "WindowWidth": "1"}):  # fmt: skip
        assert show_dicom(made(RAMP, **header))[1] == ""
    assert show_dicom(made(RAMP, WindowCenter="9", WindowWidth="0"), window=(0, 9))[1] == ""


def test_what_is_said_of_good_images_is_stored_counted_and_shown(tmp_path, backbone):
    for number, name in enumerate(["a/1.dcm", "a/2.dcm", "b/3.dcm", "b/4.dcm"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        width = "0" if number < 3 else "100"
        same = RAMP if number else RAMP.T.copy()  # two are the same but for nothing
        data = made(same, WindowCenter="9", WindowWidth=width)
        (tmp_path / name).write_bytes(data)
    manifest = open_dataset(f"folder:{tmp_path}", Options(test_share=0.5))
    [report] = extract(manifest, [backbone], out=tmp_path / "out")
    assert report.remarks == {Remark.NO_WINDOW.value: 3}
    assert not report.bad
    with FeatureStore.open(report.store) as store:
        assert set(store.remarks()) == {0, 1, 2}
        assert not store.bad()
        assert not any(rows.size for _, rows in store.verify())
    run = CliRunner().invoke(cli, ["inspect", str(report.store)])
    assert f"3 images: {Remark.NO_WINDOW.value}" in run.output


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"PixelData": b"1234"}, "DICOM that can't be decoded: the data is damaged"),
        ({"Rows": 60000, "Columns": 60000}, "over 179 megapixels"),
        ({"PhotometricInterpretation": "HSV"}, "photometric interpretation that is not supported"),
    ],
)
def test_what_can_t_be_shown_says_why(header, words):
    with pytest.raises(ImageError, match=words):
        decode(made(RAMP, **header))


def test_other_images_are_not_taken_for_dicom(tmp_path):
    image = Image.new("RGB", (300, 300), (8, 0, 8))
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm", "tga", "ico"):
        image.save(tmp_path / f"x.{suffix}")
        assert not is_dicom((tmp_path / f"x.{suffix}").read_bytes())


def test_workers_that_decode_import_no_torch():
    code = "import sys, features.dicom; assert not {'torch', 'pydicom'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_folders_find_dicom_by_suffix_or_by_content_and_subjects_by_patient_id(tmp_path):
    for number, name in enumerate(["a/1.dcm", "a/IM0001", "b/1.2.840.5", "b/2.DCM"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(made(RAMP, PatientID=f"p{number // 3}", PatientName="Doe"))
    (tmp_path / "a" / "LICENSE").write_text("words")
    manifest = open_dataset(f"folder:{tmp_path}", Options(test_share=0.5))
    assert sorted(manifest.path) == ["a/1.dcm", "a/IM0001", "b/1.2.840.5", "b/2.DCM"]
    options = Options(test_share=0.5, subject_from_dicom=True)
    manifest = open_dataset(f"folder:{tmp_path}", options)
    assert manifest.subject.tolist() == ["p0", "p0", "p0", "p1"]
    (tmp_path / "a" / "broken.dcm").write_text("words")  # is listed, and found bad when decoded
    assert "a/broken.dcm" in open_dataset(f"folder:{tmp_path}", Options(test_share=0.5)).path
    with pytest.raises(DatasetError, match=r"a/broken.dcm: no patient id: not a DICOM file"):
        open_dataset(f"folder:{tmp_path}", options)
    (tmp_path / "a" / "broken.dcm").write_bytes(made(RAMP))
    with pytest.raises(DatasetError, match=r"a/broken.dcm has no patient id: leave --subject-from"):
        open_dataset(f"folder:{tmp_path}", options)


def test_the_fingerprint_names_what_was_applied_and_only_where_there_is_dicom():
    assert dicom.applied(["a.png", "b.jpg"], None, None) == {}
    shown = dicom.applied(["a.png", "b.dcm"], None, None)
    assert (shown["window"], shown["frame"], shown["rules"]) == ("header", "middle", dicom.RULES)
    assert set(shown["versions"]) == set(dicom.LIBRARIES)
    assert dicom.applied(["a.png"], (40, 400), 3)["window"] == [40, 400]
