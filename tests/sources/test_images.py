"""Which images are kept as they are, which become JPEG, and which are left out."""

import contextlib
import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from finecap_ray.sources.images import BadImageError, usable_image


def encode(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def half_red_half_blue(width=40, height=20):
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def pixel(data, place):
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel(place)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_images_stay_byte_for_byte(format, mode):
    data = encode(half_red_half_blue().convert(mode), format)
    assert usable_image(data, longest_side=40, jpeg_quality=90) == (data, False)
    assert usable_image(data, longest_side=None, jpeg_quality=90) == (data, False)


@pytest.mark.parametrize(
    "data",
    [
        encode(half_red_half_blue().convert("CMYK"), "JPEG"),
        encode(half_red_half_blue(), "BMP"),
        encode(half_red_half_blue(), "TIFF"),
        encode(half_red_half_blue().convert("RGBA"), "PNG"),
        encode(half_red_half_blue(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), "lime")]),
        encode(half_red_half_blue(), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 20), "lime")]),
    ],
    ids=["cmyk", "bmp", "tiff", "rgba", "animated gif", "animated webp"],
)
def test_the_rest_becomes_rgb_jpeg_of_the_first_frame(data):
    made, reencoded = usable_image(data, longest_side=None, jpeg_quality=95)
    image = Image.open(io.BytesIO(made))
    assert reencoded and (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 20))
    np.testing.assert_allclose(pixel(made, (5, 10)), (255, 0, 0), atol=12)
    np.testing.assert_allclose(pixel(made, (35, 10)), (0, 0, 255), atol=12)


def test_16_bits_keep_the_high_byte():
    values = np.full((8, 8), 200 * 256 + 17, dtype=np.uint16)
    made, _ = usable_image(encode(Image.fromarray(values), "PNG"), longest_side=None, jpeg_quality=95)
    np.testing.assert_allclose(pixel(made, (4, 4)), (200, 200, 200), atol=2)


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    palette = Image.new("P", (16, 16), 0)
    for data in (encode(image, "PNG"), encode(image, "WEBP"), encode(palette, "PNG", transparency=0)):
        made, reencoded = usable_image(data, longest_side=None, jpeg_quality=95)
        assert reencoded and pixel(made, (8, 8)) == (255, 255, 255)


def test_large_images_shrink_to_the_longest_side_and_small_ones_never_grow():
    wide = encode(half_red_half_blue(400, 100), "JPEG")
    assert Image.open(io.BytesIO(usable_image(wide, longest_side=100, jpeg_quality=90)[0])).size == (100, 25)
    small = encode(half_red_half_blue().convert("CMYK"), "JPEG")
    assert Image.open(io.BytesIO(usable_image(small, longest_side=100, jpeg_quality=90)[0])).size == (40, 20)


def test_a_photo_taken_on_its_side_is_put_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = (
        6  # stored lying, to be shown turned by 90 degrees clockwise: left goes to the top
    )
    made, reencoded = usable_image(encode(half_red_half_blue(), "JPEG", exif=exif), longest_side=None, jpeg_quality=95)
    assert reencoded and Image.open(io.BytesIO(made)).size == (20, 40)
    np.testing.assert_allclose(pixel(made, (10, 5)), (255, 0, 0), atol=12)
    assert not Image.open(io.BytesIO(made)).getexif()


NOISE = Image.effect_noise((64, 64), 80).convert("RGB")
WHOLE = {format: encode(NOISE, format) for format in ("JPEG", "PNG", "WEBP", "AVIF")}
WHOLE |= {
    format: encode(NOISE, format, save_all=True, append_images=[NOISE.rotate(90)]) for format in ("GIF", "TIFF")
}  # two frames


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "can't be opened as an image"),
        (b"\0" * 1000, "can't be opened as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "can't be opened as an image"),
        (WHOLE["JPEG"][:20], "can't be opened as an image"),
        (WHOLE["JPEG"][:-600], "truncated or damaged image"),
        (WHOLE["PNG"][: len(WHOLE["PNG"]) // 2], "truncated or damaged image"),
        (encode(Image.new("F", (8, 8), 0.5), "TIFF"), "pixels are floating-point numbers of unknown range"),
    ],
)
def test_bad_images_say_why(data, reason):
    with pytest.raises(BadImageError, match=reason):
        usable_image(data, longest_side=None, jpeg_quality=90)


def test_a_webp_cut_short_is_bad():
    with pytest.raises(BadImageError):
        usable_image(WHOLE["WEBP"][: len(WHOLE["WEBP"]) // 2], longest_side=None, jpeg_quality=90)


@pytest.mark.parametrize("format", ["GIF", "TIFF"])
def test_what_comes_after_a_whole_first_frame_may_be_cut(format):
    made, reencoded = usable_image(WHOLE[format][:-100], longest_side=None, jpeg_quality=90)
    assert reencoded and Image.open(io.BytesIO(made)).size == (64, 64)


def test_a_decompression_bomb_is_bad():
    huge = encode(Image.new("1", (20000, 20000)), "PNG")  # 400 million pixels in 50 kB
    with pytest.raises(BadImageError, match="more than 178956970 pixels"):
        usable_image(huge, longest_side=None, jpeg_quality=90)


@pytest.mark.parametrize("format", WHOLE)
def test_no_damage_raises_anything_else(format):
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(WHOLE[format])
        for place in generator.integers(len(data), size=generator.integers(1, 30)):
            data[place] = generator.integers(256)
        with contextlib.suppress(BadImageError):
            usable_image(bytes(data[: generator.integers(1, len(data) + 1)]), longest_side=32, jpeg_quality=90)
