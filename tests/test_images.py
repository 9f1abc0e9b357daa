"""Decoding, judged by torchvision's transforms and by what a person would expect to see."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from features.errors import ImageError
from features.images import Decoded, Transform, read_bytes
from features.images import decode as decode_any

WIDE = Transform(size=224, resize=256, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


def decode(data):
    return decode_any(data).image.convert("RGB")


def encode(image, kind="png", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    "shape", [(300, 500), (500, 300), (256, 256), (8, 8), (225, 1001), (57, 41)]
)
def test_resize_and_crop_equal_torchvision_s(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )
    ours = WIDE.prepare(Decoded(image, image.size), exact=True)
    assert np.array_equal(ours.transpose(2, 0, 1), theirs(image))


def test_what_looks_the_same_decodes_the_same():
    grey = np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8)
    base = Image.fromarray(grey)
    wanted = np.repeat(grey[..., None], 3, 2)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    same = {
        "grey": encode(base),
        "rgb": encode(base.convert("RGB")),
        "rgba": encode(base.convert("RGBA")),
        "palette": encode(base.convert("P")),
        "16 bit": encode(Image.fromarray(grey.astype(np.uint16) * 257)),
        "tiff": encode(base, "tiff"),
        "exif": encode(base.rotate(90, expand=True), "png", exif=turned),
        "two frames": encode(base, "gif", save_all=True, append_images=[Image.new("L", base.size)]),
    }
    for name, data in same.items():
        np.testing.assert_array_equal(np.asarray(decode(data)), wanted, err_msg=name)
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert not np.asarray(decode(encode(clear))).any()  # what is transparent lies over black
    one_bit = decode(encode(base.convert("1")))
    assert set(np.unique(one_bit)) <= {0, 255}
    assert decode(encode(base.convert("CMYK"), "tiff")).mode == "RGB"


def bomb():
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello", "not an image that Pillow knows"),
        (encode(Image.new("RGB", (64, 64), "red"), "jpeg")[:300], "can't be decoded|not an image"),
        (encode(Image.effect_noise((64, 64), 50))[:2000], "can't be decoded: .*truncated"),
        (bomb(), "decompression bomb"),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "tiff"), "floating-point pixels"),
        (
            encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "tiff"),
            "32-bit integer pixels",
        ),
    ],
)
def test_what_can_t_be_decoded_says_why(data, words):
    with pytest.raises(ImageError, match=words):
        decode(data)


def test_files_that_can_t_be_read_say_why(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="file is empty"):
        read_bytes(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="file not found"):
        read_bytes(tmp_path / "none.png")
    with pytest.raises(ImageError, match="can't be read: Is a directory"):
        read_bytes(tmp_path)
