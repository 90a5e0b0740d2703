"""One picture, one result: whatever its format, its source or the decoder that takes it."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from docarray import Document
from PIL import Image, ImageOps

from finetuner.excepts import DataError, PictureError
from finetuner.images import PicturePolicy, fit_picture, load_picture, picture_of

EMOJI = Path(__file__).parents[2] / 'examples' / 'emoji' / 'test'
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')


def picture(height: int = 300, width: int = 420) -> Image.Image:
    """Smooth colours with a dark corner, so that every turn and flip of it looks different."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, 128 + 0 * rows], axis=-1)
    pixels[: height // 3, : width // 4] = 20
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, format_: str = 'PNG', **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def reference(image: Image.Image, size: int) -> np.ndarray:
    """The peer: Pillow decodes, turns, and averages areas."""
    upright = ImageOps.exif_transpose(image).convert('RGB')
    return np.asarray(upright.resize((size, size), Image.Resampling.BOX))


def difference(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(float) - right.astype(float)).mean())


@pytest.mark.parametrize('format_', FORMATS)
def test_every_format_looks_as_pillow_shows_it(format_, tmp_path):
    path = tmp_path / 'picture'
    picture().save(path, format_)
    limit = 5 if format_ == 'GIF' else 2  # its palette has 256 colours, the edges of areas add up
    for size in (32, 96, 224):
        loaded = load_picture(path, size)
        assert loaded.shape == (size, size, 3)
        assert loaded.dtype == np.uint8
        assert loaded.flags.c_contiguous
        assert loaded.flags.owndata
        assert loaded.flags.writeable
        assert difference(loaded, reference(Image.open(path), size)) < limit


def test_path_uri_bytes_and_pillow_give_the_same(tmp_path):
    path = tmp_path / 'a picture.png'
    picture().save(path)
    data = path.read_bytes()
    wanted = load_picture(path, 64)
    for source in (str(path), path.as_uri(), data, bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(load_picture(source, 64), wanted)
    np.testing.assert_array_equal(load_picture(Image.open(path), 64), wanted)
    np.testing.assert_array_equal(load_picture(np.asarray(Image.open(path)), 64), wanted)


@pytest.mark.parametrize('format_', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_obeyed_on_every_path(format_, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), format_, exif=exif)
    wanted = reference(Image.open(io.BytesIO(data)), 48)
    assert difference(load_picture(data, 48), wanted) < 2
    if orientation > 1:
        assert difference(load_picture(encoded(picture(), format_), 48), wanted) > 10


@pytest.mark.parametrize('turned_by', ['simplejpeg', 'pillow'])
def test_orientation_of_both_jpeg_decoders(turned_by):
    exif = Image.Exif()
    exif[0x0112] = 6
    mode = 'RGB' if turned_by == 'simplejpeg' else 'CMYK'
    data = encoded(picture().convert(mode), 'JPEG', exif=exif)
    assert difference(load_picture(data, 48), reference(Image.open(io.BytesIO(data)), 48)) < 2


@pytest.mark.parametrize('format_', ['PNG', 'WEBP', 'TIFF'])
def test_transparency_lies_on_white(format_):
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[:, :20] = (200, 0, 0, 128)  # half red; the rest is black and wholly transparent
    options = {'lossless': True} if format_ == 'WEBP' else {}
    data = encoded(Image.fromarray(pixels), format_, **options)
    loaded = load_picture(data, 40)
    np.testing.assert_allclose(loaded[:, :19].astype(int), [[[227, 127, 127]] * 19] * 40, atol=1)
    assert (loaded[:, 21:] == 255).all()
    np.testing.assert_array_equal(load_picture(pixels, 40), loaded)


def test_transparent_colour_of_gif_and_palette_png_lies_on_white():
    image = Image.new('P', (8, 8), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(1, (0, 0, 4, 8))
    for format_ in ('GIF', 'PNG'):
        loaded = load_picture(encoded(image, format_, transparency=0), 8)
        assert (loaded[:, :4] == [10, 20, 30]).all()
        assert (loaded[:, 4:] == 255).all()


@pytest.mark.parametrize('format_', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP'])
def test_grey_becomes_rgb(format_):
    loaded = load_picture(encoded(picture().convert('L'), format_), 48)
    assert difference(loaded, reference(picture().convert('L'), 48)) < 2
    assert difference(loaded[..., 0], loaded[..., 2]) < 1


@pytest.mark.parametrize('format_', ['PNG', 'TIFF'])
def test_16_bits_become_8_over_their_whole_range(format_):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    loaded = load_picture(encoded(Image.fromarray(np.tile(ramp, (256, 1))), format_), 256)
    np.testing.assert_array_equal(loaded[0, :, 0], ramp >> 8)


def test_cmyk_and_one_bit():
    cmyk = picture().convert('CMYK')
    assert difference(load_picture(encoded(cmyk, 'JPEG'), 48), reference(cmyk, 48)) < 3
    checked = Image.fromarray(np.indices((8, 8)).sum(0) % 2 == 0)
    loaded = load_picture(encoded(checked), 8)
    np.testing.assert_array_equal(loaded[..., 1], np.asarray(checked) * 255)


@pytest.mark.parametrize('format_', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_only_the_first_frame_is_seen(format_):
    frames = [Image.new('RGB', (20, 20), colour) for colour in ('red', 'blue', 'green')]
    options = {'lossless': True} if format_ == 'WEBP' else {}
    data = encoded(frames[0], format_, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames > 1
    assert difference(load_picture(data, 20), np.asarray(frames[0])) < 2


def test_the_whole_picture_is_seen_not_its_middle():
    pixels = np.full((60, 240, 3), 90, np.uint8)
    pixels[:, :24] = 250
    pixels[:, -24:] = 10
    loaded = load_picture(encoded(Image.fromarray(pixels)), 60)
    assert (loaded[:, :5] > 240).all()
    assert (loaded[:, -5:] < 20).all()


def test_a_long_strip_is_averaged_where_it_shrinks_and_stretched_where_it_grows():
    stripes = np.zeros((4, 640, 3), np.uint8)
    stripes[:, ::2] = 200
    loaded = load_picture(stripes, 64)
    assert loaded.shape == (64, 64, 3)
    assert (np.abs(loaded.astype(int) - 100) <= 1).all()


def test_enlarging_is_bilinear():
    small = picture(32, 32)
    wanted = np.asarray(small.resize((128, 128), Image.Resampling.BILINEAR))
    assert difference(load_picture(encoded(small), 128), wanted) < 1


def test_emoji_are_as_pillow_shows_them():
    paths = sorted(EMOJI.glob('*/noto.webp'))[::10]
    assert len(paths) >= 20
    for path in paths:
        image = Image.open(path).convert('RGB')
        np.testing.assert_array_equal(load_picture(path, 96), np.asarray(image))
        wanted = np.asarray(image.resize((160, 160), Image.Resampling.BILINEAR))
        assert difference(load_picture(path, 160), wanted) < 0.5
        wanted = np.asarray(image.resize((48, 48), Image.Resampling.BOX))
        assert difference(load_picture(path, 48), wanted) < 0.5


def test_arrays_in_every_accepted_layout():
    pixels = np.asarray(picture(30, 40))
    wanted = load_picture(pixels, 24)
    floats = pixels.astype(np.float32) / 255
    for same in (
        pixels.transpose(2, 0, 1),
        pixels.astype(np.int64),
        floats,
        floats.astype(np.float64).transpose(2, 0, 1),
        torch.from_numpy(pixels.copy()),
        pixels[::-1][::-1],
        np.concatenate([pixels, np.full((30, 40, 1), 255, np.uint8)], axis=2),
    ):
        np.testing.assert_array_equal(load_picture(same, 24), wanted)
    grey = pixels[..., 0]
    for same in (grey, grey[..., None], grey[None]):
        loaded = load_picture(same, 24)
        np.testing.assert_array_equal(loaded, np.stack([loaded[..., 0]] * 3, axis=-1))


def test_the_result_does_not_share_memory_with_the_source():
    pixels = np.zeros((16, 16, 3), np.uint8)
    load_picture(pixels, 16)[:] = 9
    assert not pixels.any()


@pytest.mark.parametrize(
    ('source', 'says'),
    [
        (b'', r'empty \(0 bytes\)'),
        (b'hello world', r"not a picture.* 11 bytes start with b'hello world'"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', 'not a picture'),
        (encoded(picture(8, 8), 'PPM'), 'format PPM is not one of JPEG, PNG'),
        (np.zeros((5, 3, 7)), r'shape \[5, 3, 7\] is not a picture'),
        (np.zeros((0, 5, 3), np.uint8), 'shape'),
        (np.zeros(12, np.uint8), r'shape \[12\]'),
        (np.full((4, 4, 3), -0.5), 'values from -0.5 to -0.5'),
        (np.full((4, 4, 3), 256), 'integers are in 0..255, floats in 0..1'),
        (np.full((4, 4, 3), 1.01), 'floats in 0..1'),
        (np.full((4, 4, 3), np.nan), 'floats in 0..1'),
        (np.ones((4, 4), bool), 'array of bool'),
        (np.full((4, 4), 'x'), 'array of <U1'),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), 'TIFF'), '32 bits a channel'),
        (Image.new('RGB', (0, 5)), 'empty|opened'),
        (17, 'a int is not a picture'),
        (None, 'a NoneType is not a picture'),
    ],
)
def test_what_is_no_picture_is_refused_and_says_why(source, says):
    with pytest.raises(PictureError, match=says):
        load_picture(source, 8)


@pytest.mark.parametrize('size', [0, -1, 2.5, True, '8'])
def test_size_must_be_a_number_of_pixels(size):
    with pytest.raises(ValueError, match='size='):
        load_picture(np.zeros((4, 4, 3), np.uint8), size)


@pytest.mark.parametrize('format_', FORMATS)
def test_caps_and_formats_are_checked_before_decoding(format_):
    data = encoded(picture(30, 40), format_)
    assert load_picture(data, 8, PicturePolicy(max_pixels=1200)).shape == (8, 8, 3)
    with pytest.raises(PictureError, match=r'40 x 30 = 1,200 pixels, more than the 1,199 allowed'):
        load_picture(data, 8, PicturePolicy(max_pixels=1199))
    with pytest.raises(PictureError, match='larger than 10 bytes'):
        load_picture(data, 8, PicturePolicy(max_bytes=10))
    others = tuple(name for name in FORMATS if name != format_)
    with pytest.raises(PictureError, match=f'format {format_} is not one of'):
        load_picture(data, 8, PicturePolicy(formats=others))


def test_a_small_file_that_claims_a_huge_picture_is_not_decoded():
    data = encoded(Image.new('1', (20_000, 8_000)), optimize=True)
    assert len(data) < 100_000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow warns of it too
        with pytest.raises(PictureError, match='160,000,000 pixels, more than the 64,000,000'):
            load_picture(data, 8)


@pytest.mark.parametrize('format_', FORMATS)
def test_cut_off_data_is_an_error_never_half_a_picture(format_):
    data = encoded(picture(120, 90), format_)
    whole = load_picture(data, 32)
    refused = 0
    for end in np.linspace(1, len(data) - 1, 80).astype(int):
        try:
            # All pixels may be there when only the note that the file ends is not.
            np.testing.assert_array_equal(load_picture(data[:end], 32), whole)
        except PictureError:
            refused += 1
    assert refused > 70


def test_a_jpeg_that_was_cut_off_and_closed_again_is_an_error():
    data = encoded(picture(), 'JPEG')
    with pytest.raises(PictureError, match='premature end'):
        load_picture(data[: len(data) // 2] + b'\xff\xd9', 32)


def test_a_jpeg_with_something_behind_it_is_taken():
    data = encoded(picture(), 'JPEG')
    np.testing.assert_array_equal(load_picture(data + b'trailer', 32), load_picture(data, 32))


@pytest.mark.parametrize('format_', FORMATS)
def test_mutations_end_in_a_picture_or_a_picture_error(format_, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if format_ in ('GIF', 'BMP') else {'exif': exif}
    original = encoded(picture(60, 80), format_, **options)
    rng = np.random.default_rng(7)
    opened = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for _ in range(300):
            data = bytearray(original[: rng.integers(1, len(original) + 1)])
            if rng.random() < 0.7:
                data = bytearray(original)
            # Headers are where the damage is interesting, so every other byte is one of theirs.
            for _ in range(rng.integers(1, 8)):
                end = min(len(data), 64) if rng.random() < 0.5 else len(data)
                data[rng.integers(0, end)] = rng.integers(0, 256)
            try:
                assert load_picture(bytes(data), 32).shape == (32, 32, 3)
                opened += 1
            except PictureError:
                pass
    assert 0 < opened < 300
    assert 'OpenCV' not in capfd.readouterr().err


def test_threads_do_not_disturb_each_other():
    sources = [encoded(picture(100 + 7 * i, 90), FORMATS[i % len(FORMATS)]) for i in range(24)]
    wanted = [load_picture(source, 40) for source in sources]
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda source: load_picture(source, 40), sources * 4))
    for one, other in zip(loaded, wanted * 4, strict=True):
        np.testing.assert_array_equal(one, other)


def test_picture_of_takes_tensor_then_blob_then_uri(tmp_path):
    red, blue, green = (Image.new('RGB', (9, 9), name) for name in ('red', 'blue', 'lime'))
    path = tmp_path / 'green.png'
    green.save(path)
    uri, blob, tensor = str(path), encoded(blue), np.asarray(red)
    assert (picture_of(Document(uri=uri), 4) == [0, 255, 0]).all()
    assert (picture_of(Document(uri=uri, blob=blob), 4) == [0, 0, 255]).all()
    doc = Document(uri=uri, blob=blob)
    doc.tensor = tensor
    assert (picture_of(doc, 4) == [255, 0, 0]).all()
    old_style = Document()
    old_style.blob = tensor
    assert (picture_of(old_style, 4) == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ('doc', 'says'),
    [
        (Document(), 'Document 5 is empty: it has no tensor, no blob and no uri'),
        (Document(blob=b''), 'Document 5 is empty'),
        (Document(text='a red car'), r"Document 5 holds text \('a red car'\), not a picture"),
        (Document(blob=b'nonsense'), 'Document 5: not a picture'),
        (Document(uri='/there/is/none.png'), "Document 5: there is no file '/there/is/none.png'"),
    ],
)
def test_picture_of_names_the_document(doc, says):
    with pytest.raises(PictureError, match=says):
        picture_of(doc, 4, position=5)
    with pytest.raises(DataError, match=says.replace('Document 5', 'Document')):
        picture_of(doc, 4)


def test_picture_of_obeys_the_policy(tmp_path):
    path = tmp_path / 'picture.png'
    picture(8, 8).save(path)
    with pytest.raises(PictureError, match=r'Document 0: uri .* is not opened here'):
        picture_of(Document(uri=str(path)), 4, 0, PicturePolicy(uri_allow=()))


def progressive(more=0, notes=b''):
    """A progressive JPEG whose last scan comes so many times again."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, 'JPEG', progressive=True, comment=notes)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b'\xff\xda') : -2] * more + data[-2:]


def test_a_jpeg_of_a_thousand_scans():
    with pytest.raises(PictureError, match='JPEG of more than 50 scans'):
        load_picture(progressive(1000), 16)
    spread = progressive(1000).replace(b'\xff\xda', b'\x00\xff\xff\xda')
    with pytest.raises(PictureError, match='JPEG of more than 50 scans'):
        load_picture(spread, 16)
    # a marker that no length follows: two bytes of the next one are none
    first, *others = progressive(1000).split(b'\xff\xda')
    for bare in (b'\xff\x01', b'\xff\xd8', b'\xff\xd0'):
        with pytest.raises(PictureError, match='JPEG of more than 50 scans'):
            load_picture(first + b'\xff\xda' + (bare + b'\xff\xda').join(others), 16)
    # which pictures inside it, or anything in its notes, may look like
    notes = b'\xff\xda\x00\x0c' * 1000
    assert np.array_equal(
        load_picture(progressive(notes=notes), 16), load_picture(progressive(), 16)
    )


@pytest.mark.parametrize('format_', FORMATS)
@pytest.mark.parametrize(
    ('size', 'expected'), [((420, 300), (100, 71)), ((30, 900), (3, 100)), ((2000, 1), (100, 1))]
)
def test_a_picture_to_look_at_keeps_its_proportions(format_, size, expected):
    shown = fit_picture(encoded(picture(size[1], size[0]), format_), 100)
    # a JPEG is scaled while it is decoded, which rounds too
    assert np.abs(np.subtract(shown.shape[1::-1], expected)).max() <= (format_ == 'JPEG')
    small = encoded(picture(20, 30), 'PNG')
    assert np.array_equal(fit_picture(small, 100), np.asarray(picture(20, 30)))
    turned = picture(40, 60).getexif()
    turned[0x0112] = 6
    assert fit_picture(encoded(picture(40, 60), 'JPEG', exif=turned), 30).shape == (30, 20, 3)
    with pytest.raises(PictureError):
        fit_picture(b'no picture', 100)
