"""What a picture looks like does not depend on how it was stored."""

import contextlib
import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, TiffTags

from finecap_ray.errors import DataError
from finecap_ray.images import decode_image


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_photo_that_lies_is_turned_upright():
    lying = Image.new("RGB", (40, 20), "blue")
    lying.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned by 90 degrees clockwise: left goes to the top
    upright = decode_image(encoded(lying, "JPEG", exif=exif))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200
    assert decode_image(encoded(lying, "JPEG")).size == (40, 20)


def test_a_damaged_tag_beside_the_orientation_does_no_harm():
    """A resolution that is text: Pillow can't write it again, which ImageOps.exif_transpose does."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[ExifTags.Base.XResolution] = TiffTags.ASCII
    tags[ExifTags.Base.Orientation], tags[ExifTags.Base.XResolution] = 6, "no number"
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags.tobytes(8)
    assert decode_image(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (20, 40)


def test_a_line_is_no_picture():
    """Qwen's processors raise from 200 on, and a tower's would make 100,000 x 1 pixels 12.8 million wide."""
    assert decode_image(encoded(Image.new("RGB", (100, 1)), "PNG")).size == (100, 1)
    for size in ((101, 1), (2, 300)):
        with pytest.raises(DataError, match=f"{size[0]} x {size[1]} pixels, more than 100 times as long as wide"):
            decode_image(encoded(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = encoded(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    assert np.array_equal(np.asarray(decode_image(stored)), np.asarray(expected))


def test_of_16_bits_the_high_byte_is_the_picture():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = np.asarray(decode_image(encoded(Image.fromarray(ramp), "PNG")))
    assert np.array_equal(found[..., 0], ramp // 256)


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encoded(image, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_any_damage_is_a_data_error():
    """AVIF's decoder raises RuntimeError."""
    whole = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "AVIF")
    for place in range(0, 500, 3):  # in the boxes before the pixels
        with contextlib.suppress(DataError):
            decode_image(whole[:place] + b"\xff" + whole[place + 1 :])
        with pytest.raises(DataError, match="not a decodable image"):
            decode_image(whole[:place])


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(DataError, match="floating-point numbers of unknown range"):
        decode_image(encoded(Image.new("F", (4, 4)), "TIFF"))
