"""One image, one meaning: every reader of a file gets the same 8-bit RGB pixels, or the reason why there are none."""

from __future__ import annotations

import resource
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tiny_images import noise_image, png_bytes

from marval_rl.data import CroppedImages
from marval_rl.data.crop import LONGEST, center_crop
from marval_rl.data.decoding import CorruptImageError, decode_image
from marval_rl.data.image_folder import ImageFolder
from marval_rl.data.moments.shards import Crops
from marval_rl.errors import DataError
from marval_rl.evaluation.image_set import read_images
from marval_rl.evaluation.scored_images import read_image

SIZE = 32
RAMP = np.linspace(0, 255, SIZE).round().astype(np.uint8)[None].repeat(SIZE, 0)  # grey [H, W]
NOISE = noise_image(5, SIZE, SIZE)
RED, WHITE = (200, 40, 40), (255, 255, 255)


def grey_rgb(levels: np.ndarray) -> np.ndarray:
    return np.stack([levels] * 3, axis=-1)


def transparent(mode: str) -> Image.Image:
    """Noise that is transparent on the left and opaque on the right."""
    image = NOISE.convert(mode[:-1])
    image.putalpha(
        Image.fromarray(np.uint8(255) * (np.arange(SIZE) >= SIZE // 2).astype(np.uint8)[None].repeat(SIZE, 0))
    )
    return image


def on_white(image: Image.Image) -> np.ndarray:
    pixels = np.array(image.convert("RGB"))
    pixels[:, : SIZE // 2] = 255
    return pixels


def with_key(palette: Image.Image) -> np.ndarray:
    """What a palette image shows whose colour 0 is transparent."""
    pixels = np.array(palette.convert("RGB"))
    pixels[np.array(palette) == 0] = 255
    return pixels


PALETTE = NOISE.convert("P", palette=Image.Palette.ADAPTIVE)
DEEP = RAMP.astype(np.uint16) * 257
LAB = ImageCms.profileToProfile(NOISE, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
# name of the file -> (what is saved, its settings, the pixels it means)
MEANINGS = {
    "grey16.png": (Image.fromarray(DEEP), {}, grey_rgb(RAMP)),
    "grey16.tif": (Image.fromarray(DEEP), {}, grey_rgb(RAMP)),
    "grey16big.tif": (Image.fromarray(DEEP.astype(">u2")), {}, grey_rgb(RAMP)),
    "float.tif": (Image.fromarray(RAMP.astype(np.float32) / 255), {}, grey_rgb(RAMP)),
    "grey16.pgm": (Image.fromarray(DEEP.astype(np.int32)), {}, grey_rgb(RAMP)),
    "key16.png": (Image.fromarray(DEEP), {"transparency": 0}, np.where(grey_rgb(RAMP) == 0, 255, grey_rgb(RAMP))),
    "rgba.png": (transparent("RGBA"), {}, on_white(NOISE)),
    "la.png": (transparent("LA"), {}, on_white(NOISE.convert("L"))),
    "rgba.webp": (transparent("RGBA"), {"lossless": True}, on_white(NOISE)),
    "palette.png": (PALETTE, {}, np.array(PALETTE.convert("RGB"))),
    "key.png": (PALETTE, {"transparency": 0}, with_key(PALETTE)),
    "bytes.png": (PALETTE, {"transparency": b"\0" + b"\xff" * 255}, with_key(PALETTE)),
    "key.gif": (PALETTE, {"transparency": 0}, with_key(PALETTE)),
    "onebit.png": (Image.fromarray(RAMP > 127), {}, grey_rgb(np.where(RAMP > 127, 255, 0).astype(np.uint8))),
    "lab.tif": (LAB, {}, None),  # within a few levels
    "pages.tif": (NOISE, {"save_all": True, "append_images": [Image.new("RGB", NOISE.size)]}, np.array(NOISE)),
    "animated.png": (NOISE, {"save_all": True, "append_images": [Image.new("RGB", NOISE.size)]}, np.array(NOISE)),
    "animated.webp": (
        NOISE,
        {"save_all": True, "append_images": [Image.new("RGB", NOISE.size)], "lossless": True},
        np.array(NOISE),
    ),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_every_reader_sees_the_same_pixels(tmp_path, name):
    image, settings, expected = MEANINGS[name]
    file = tmp_path / "ant" / name
    file.parent.mkdir()
    image.save(file, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of palettes whose transparency is lost
        found = np.array(ImageFolder(tmp_path).read(0))
    if expected is None:
        assert np.abs(found.astype(int) - np.array(NOISE)).mean() < 4
    else:
        assert np.array_equal(found, expected)
    pixels = torch.from_numpy(found).permute(2, 0, 1)
    assert torch.equal(CroppedImages(ImageFolder(tmp_path), SIZE, flip=False)[0]["images"], pixels.float() / 255)
    assert torch.equal(Crops(ImageFolder(tmp_path), SIZE)[0].pixels, pixels)
    assert torch.equal(read_images([file])[0], pixels)
    assert torch.equal(read_image(file), pixels.float() / 255)


def test_colours_of_cmyk_and_others_are_kept(tmp_path):
    for mode in ("CMYK", "YCbCr"):
        Image.new("RGB", (SIZE, SIZE), RED).convert(mode).save(tmp_path / f"{mode}.jpg", quality=95)
        pixels = np.array(decode_image((tmp_path / f"{mode}.jpg").read_bytes(), mode))
        assert np.abs(pixels.astype(int) - RED).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_upright(tmp_path, ending, orientation):
    upright = Image.new("RGB", (24, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))  # the corner that is at the top left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that stores it so
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{ending}", exif=exif, **({} if ending == "tif" else {"quality": 100}))
    pixels = np.array(decode_image((tmp_path / f"a.{ending}").read_bytes(), "a"))
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels.astype(int) - np.array(upright))[1:7, 1:7].max() < 12
    assert pixels[10:, 10:].min() > 240


def test_damaged_metadata_do_not_spoil_an_image(tmp_path):
    NOISE.save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff broken")
    assert np.array_equal(np.array(decode_image((tmp_path / "a.png").read_bytes(), "a")), np.array(NOISE))


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (RAMP.astype(np.float32), r"levels lie in 0..255, not in 0..1: convert it"),
        (np.full((4, 4), np.nan, np.float32), "levels lie in nan..nan"),
        (RAMP.astype(np.int32) * 2**22, "32 bits a pixel, whose white is not known"),
    ],
)
def test_levels_whose_white_is_not_known_are_refused_by_name(tmp_path, levels, reason):
    (tmp_path / "ant").mkdir()
    file = tmp_path / "ant" / "deep.tif"
    Image.fromarray(levels).save(file)
    for read in (ImageFolder(tmp_path).read, lambda _: read_images([file])):
        with pytest.raises(DataError, match=rf"ant/deep.tif.*{reason}"):
            read(0)
    with pytest.raises(ValueError, match=rf"ant/deep.tif.*{reason}"):
        read_image(file)
    assert reason[:10] in Crops(ImageFolder(tmp_path), SIZE)[0].reason  # listed by `marval-rl cache`


def test_a_bomb_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CorruptImageError, match=r"bomb.png is corrupt: Image size \(1024 pixels\) exceeds limit"):
        decode_image(png_bytes(NOISE), "bomb.png")


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyError("tag"), AttributeError("x"), OverflowError("big")])
def test_whatever_a_decoder_raises_names_the_image(monkeypatch, error):
    def fail(*_):
        raise error

    data = png_bytes(NOISE)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(CorruptImageError, match=r"a.png is corrupt: "):
        decode_image(data, "a.png")


def test_too_little_memory_names_the_image_and_is_not_called_corruption(monkeypatch):
    def fail(*_):
        raise MemoryError

    data = png_bytes(NOISE)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(DataError, match=r"not enough memory to decode a.png") as caught:
        decode_image(data, "a.png")
    assert not isinstance(caught.value, CorruptImageError)


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (3, 20000)])
def test_a_rule_is_cropped_before_it_is_enlarged(size):
    image = Image.new("RGB", size, RED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert np.array_equal(np.array(center_crop(image, 256)), np.full((256, 256, 3), RED, np.uint8))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; resized whole it takes 12 GB


@pytest.mark.parametrize(
    ("width", "height"), [(400, 20), (20, 400), (701, 33), (37, 900), (2000, 70), (70, 2001), (2801, 100), (100, 2800)]
)
def test_the_crop_of_long_images_is_that_of_adm_within_a_level(width, height):
    assert max(width, height) > LONGEST * min(width, height)
    image, scale = noise_image(width, width, height), 64 / min(width, height)
    resized = (round(width * scale), round(height * scale))
    left, top = (resized[0] - 64) // 2, (resized[1] - 64) // 2
    whole = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64))
    difference = np.abs(np.array(center_crop(image, 64)).astype(int) - np.array(whole))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001
