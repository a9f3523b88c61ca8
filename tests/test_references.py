"""The files that references are kept in: ADM's, torch-fidelity's, folders, and what only looks like them."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from tiny_evaluation import random_images
from torch_fidelity.utils import cache_lookup_one_recompute_on_miss

from marval_rl.errors import DataError
from marval_rl.evaluation.references import list_images, open_reference

FEATURES = 2048
MU = np.linspace(0, 1, FEATURES)
SIGMA = np.eye(FEATURES, dtype=np.float32)
IMAGES = np.arange(5 * 8 * 8 * 3, dtype=np.uint8).reshape(5, 8, 8, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_as_adm_keeps_them(tmp_path, dtype):
    np.savez(tmp_path / "adm_in256_stats.npz", mu=MU.astype(dtype), sigma=SIGMA.astype(dtype))
    reference = open_reference(tmp_path / "adm_in256_stats.npz")
    assert reference.images is None
    assert reference.gaussian.mean.dtype == reference.gaussian.covariance.dtype == torch.float64
    np.testing.assert_allclose(reference.gaussian.mean, MU, atol=1e-7)
    assert np.array_equal(reference.gaussian.covariance, np.eye(FEATURES))


def test_adms_reference_batch_has_images_as_well(tmp_path):
    extra = {"mu_s": np.zeros(3), "sigma_s": np.zeros((3, 3))}
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", arr_0=IMAGES, mu=MU, sigma=SIGMA, **extra)
    reference = open_reference(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    assert np.array_equal(reference.images.read(range(5)).permute(0, 2, 3, 1), IMAGES)
    assert np.array_equal(reference.gaussian.mean, MU)
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    assert open_reference(tmp_path / "images.npz").gaussian is None


def test_statistics_that_torch_fidelity_keeps(tmp_path):
    cache_lookup_one_recompute_on_miss(
        "real",
        lambda: {"mu": MU.astype(np.float32), "sigma": SIGMA.astype(np.float64)},
        cache_root=tmp_path,
        verbose=False,
    )
    reference = open_reference(tmp_path / "real.pt")
    np.testing.assert_allclose(reference.gaussian.mean, MU, atol=1e-7)
    assert np.array_equal(reference.gaussian.covariance, np.eye(FEATURES))
    assert reference.images is None


def test_a_folder_and_its_class_folders(tmp_path):
    random_images(tmp_path / "dog", 2, seed=0), random_images(tmp_path / "cat", 3, seed=0)
    (tmp_path / "notes.txt").write_text("")
    reference = open_reference(tmp_path)
    assert reference.gaussian is None and len(reference.images) == 5
    assert reference.images.read([0, 4]).shape == (2, 3, 16, 16)
    assert open_reference(tmp_path, image_size=8).images.read([0, 4]).shape == (2, 3, 8, 8)
    assert [str(file.relative_to(tmp_path)) for file in list_images(tmp_path)] == [
        *(f"cat/0{n}.png" for n in range(3)),
        *(f"dog/0{n}.png" for n in range(2)),
    ]


def broken_npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def broken_pt(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


NAN = np.where(np.arange(FEATURES) == 3, np.nan, MU)
CASES = {
    "no statistics.npz": (broken_npz(a=MU), "has no mu and sigma; it has a"),
    "half.npz": (broken_npz(mu=MU), "has no mu and sigma; it has mu"),
    "short.npz": (broken_npz(mu=MU[:10], sigma=SIGMA), r"sigma of .* \[10, 10\], not float32 \[2048, 2048\]"),
    "square.npz": (broken_npz(mu=MU, sigma=SIGMA[:3]), r"sigma of .* \[2048, 2048\], not float32 \[3, 2048\]"),
    "integers.npz": (broken_npz(mu=MU.astype(int), sigma=SIGMA), "must hold real numbers"),
    "nan.npz": (broken_npz(mu=NAN, sigma=SIGMA), "mu of .* holds NaN or infinity"),
    "floats.npz": (broken_npz(arr_0=IMAGES.astype(np.float32)), "arr_0 of .* must hold images, uint8"),
    "text.npz": (b"not found", "cannot read the reference"),
    "empty.npz": (b"", "cannot read the reference"),
    "cut.npz": (broken_npz(mu=MU, sigma=SIGMA[:2])[:9000], "cannot read the reference"),
    "list.pt": (broken_pt([1, 2]), "has no mu and sigma"),
    "keys.pt": (broken_pt({"mu": MU}), "has no mu and sigma"),
    "text.pt": (b"not found", "cannot read the reference"),
    "statistics.csv": (b"1,2", "is neither of these: a folder of images, an .npz"),
}


@pytest.mark.parametrize("name", CASES)
def test_files_that_are_not_references(tmp_path, name):
    content, message = CASES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_reference(tmp_path / name)


def test_no_file_executes_anything(tmp_path):
    executed = tmp_path / "executed"
    (tmp_path / "code.pt").write_bytes(broken_pt({"mu": Malicious(executed), "sigma": SIGMA}))
    np.savez(tmp_path / "code.npz", mu=np.array([Malicious(executed)], dtype=object), sigma=SIGMA)
    (tmp_path / "inner.pt").write_bytes(
        broken_pt({"mu": np.array([Malicious(executed)], dtype=object), "sigma": SIGMA})
    )
    for name in ("code.pt", "code.npz", "inner.pt"):
        with pytest.raises(DataError, match="cannot read the reference"):
            open_reference(tmp_path / name)
    assert not executed.exists()


def test_a_damaged_archive_is_noticed_by_its_checksum(tmp_path):
    file = tmp_path / "stats.npz"
    np.savez(file, mu=MU, sigma=SIGMA[:2])
    content = bytearray(file.read_bytes())
    content[zipfile.ZipFile(file).infolist()[0].header_offset + 500] ^= 255
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot read the reference"):
        open_reference(file)


def test_places_without_a_reference(tmp_path):
    with pytest.raises(DataError, match=r"no reference at .*nowhere\.npz: give a folder of images"):
        open_reference(tmp_path / "nowhere.npz")
    with pytest.raises(DataError, match="holds no image"):
        open_reference(tmp_path)
