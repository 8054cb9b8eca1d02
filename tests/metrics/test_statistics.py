"""Statistics: made from images, compared, written and read, kept in the cache and never taken for others'."""

import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from inception_samples import QuickNetwork

from bvae.errors import UserError
from bvae.metrics.cache import Cache
from bvae.metrics.extract import Extractor
from bvae.metrics.protocols import PROTOCOLS
from bvae.metrics.statistics import Origin, Statistics, check_enough, fid, load_statistics, save_statistics

CPU = torch.device("cpu")
TF1 = Origin("tf1", "sha256:w", "fp32")


def images(n: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 8, 8, channels), np.uint8))


def extractor(protocol: str = "tf1", batch: int = 50) -> Extractor:
    return Extractor(QuickNetwork(), "sha256:w", PROTOCOLS[protocol], batch)  # type: ignore[arg-type]


def small(seed: int = 0, n: int = 30, origin: Origin = TF1, dim: int = 2048) -> Statistics:
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return Statistics(x.double().mean(0), torch.cov(x.double().T), n, origin, x)


# ---- from images ----------------------------------------------------------------------------------------------------


def test_are_numpys_of_the_features() -> None:
    x = images(70)
    e = extractor(batch=16)
    seen: list[int] = []
    s = e.statistics(x.split(30), progress=seen.append)
    features = e.features(x).double().numpy()
    assert s.n == 70 and s.origin == TF1 and seen == [30, 30, 10]
    assert max(e.network.seen) == 16  # type: ignore[arg-type]
    np.testing.assert_allclose(s.mean, features.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(s.covariance, np.cov(features, rowvar=False), rtol=1e-4, atol=1e-7)
    assert s.features is not None and len(s.features) == 70, "fewer than dimensions: the features are kept"


def test_features_are_not_kept_beyond_their_dimension_unless_asked() -> None:
    e = extractor()
    many = [torch.zeros(1030, 8, 8, 3, dtype=torch.uint8)] * 2
    e.features = lambda batch: torch.ones(len(batch), 2048)  # type: ignore[method-assign]
    assert e.statistics(many).features is None
    kept = e.statistics(many, keep=True).features
    assert kept is not None and kept.shape == (2060, 2048)


def test_grey_is_its_colour_and_floats_are_their_pixels() -> None:
    e = extractor()
    grey = images(5, channels=1)
    assert torch.equal(e.features(grey), e.features(grey.expand(-1, -1, -1, 3)))
    x = images(5)
    floats = x.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(e.features(x), e.features(floats))
    assert torch.equal(e.features(floats[:, :1]), e.features(floats[:, :1].expand(-1, 3, -1, -1)))


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(UserError, match="at least 2"):
        extractor().statistics([images(1)])


# ---- compared -------------------------------------------------------------------------------------------------------


def test_few_samples_take_the_features_and_agree_with_the_covariances() -> None:
    a, b = small(0, dim=64), small(1, dim=64)
    assert fid(a, b) == pytest.approx(fid(a.without_features(), b.without_features()), rel=1e-6)


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (Origin("clean", "sha256:w", "fp32"), "protocol tf1 and of clean"),
        (Origin("tf1", "sha256:v", "fp32"), "different weights"),
        (Origin("tf1", "sha256:w", "bf16"), "fp32 and in bf16"),
    ],
)
def test_refuses_to_compare_what_was_made_differently(origin: Origin, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fid(small(0, dim=8), small(1, dim=8, origin=origin))


def test_compares_what_differs_in_the_images_only() -> None:
    fid(small(0, dim=8), small(1, dim=8, origin=Origin("tf1+stretch", "sha256:w", "fp32")))
    fid(small(0, dim=8), small(1, dim=8, origin=Origin("tf1", None, "fp32")))
    with pytest.raises(UserError, match="8 and of 9"):
        fid(small(0, dim=8), small(1, dim=9))


def test_few_are_refused_or_labelled() -> None:
    assert check_enough(2048, "x", False) is None and check_enough(None, "x", False) is None
    assert check_enough(2047, "x", True) == "few images"
    with pytest.raises(UserError, match="2047 images; fewer than 2048"):
        check_enough(2047, "x", False)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files_hold_everything_and_are_pytorch_fids_too(tmp_path: Path) -> None:
    s = small(dim=16)
    save_statistics(tmp_path / "s.npz", s, {"more": 3})
    read, meta = load_statistics(tmp_path / "s.npz")
    assert torch.equal(read.mean, s.mean) and torch.equal(read.covariance, s.covariance)
    assert (read.n, read.origin, meta["more"]) == (30, TF1, 3)
    assert read.features is not None and s.features is not None and torch.equal(read.features, s.features)
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["mu"].shape == (16,) and archive["sigma"].shape == (16, 16)


def test_of_other_tools_files_nothing_is_said_that_they_do_not_say(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4, dtype=np.float32))
    read, _ = load_statistics(tmp_path / "s.npz")
    assert read.origin == Origin(None, None, None) and read.origin.base is None and read.n is None
    assert read.covariance.dtype == torch.float64
    fid(read, small(dim=4))


@pytest.mark.parametrize(
    ("sigma", "said"),
    [
        (-np.eye(4), "below 0"),
        (np.diag([1.0, 1.0, 1.0, -0.01]), "below 0"),
        (np.triu(np.ones((4, 4))), "not symmetric"),
    ],
)
def test_what_is_no_covariance_is_refused(tmp_path: Path, sigma: np.ndarray, said: str) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=sigma)
    with pytest.raises(UserError, match=f"s.npz: sigma is no covariance.*{said}"):
        load_statistics(tmp_path / "s.npz")


def test_covariances_of_few_samples_in_float32_are_covariances(tmp_path: Path) -> None:
    x = np.random.default_rng(0).exponential(size=(9, 300)).astype(np.float32)
    for sigma in (np.cov(x, rowvar=False).astype(np.float32), np.zeros((300, 300))):
        np.savez(tmp_path / "s.npz", mu=x.mean(0), sigma=sigma)
        load_statistics(tmp_path / "s.npz")


class Code:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "no sigma", "nan", "wide", "text", "meta", "objects", "pickle"]
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.npz"
    arrays: dict = {"mu": np.zeros(4), "sigma": np.eye(4)}
    if damage == "no sigma":
        del arrays["sigma"]
    elif damage == "nan":
        arrays["sigma"][1, 1] = np.nan
    elif damage == "wide":
        arrays["sigma"] = np.eye(5)
    elif damage == "text":
        arrays["mu"] = np.array(["a"] * 4)
    elif damage == "meta":
        arrays["meta"] = np.frombuffer(b'{"n": "many"}', np.uint8)
    elif damage == "objects":
        arrays["mu"] = np.array([Code(tmp_path / "ran")] * 4)
    np.savez(path, **arrays)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(UserError) as refused:
        load_statistics(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path) -> None:
    cache, s = Cache(tmp_path / "new"), small(dim=16)
    assert cache.get("sha256:i", TF1, 30, False, CPU) is None
    cache.put("sha256:i", s)
    found = cache.get("sha256:i", TF1, 30, True, CPU)
    assert found is not None and torch.equal(found.covariance, s.covariance) and found.n == 30
    cache.put("sha256:i", s.without_features())
    assert cache.get("sha256:i", TF1, 30, True, CPU) is None, "features are asked for, and there are none"
    assert cache.get("sha256:i", TF1, 30, False, CPU) is not None
    assert [p.suffix for p in (tmp_path / "new" / "fid").iterdir()] == [".npz"]
    assert Cache(None).get("sha256:i", TF1, 30, False, CPU) is None
    Cache(None).put("sha256:i", s)


def test_the_cache_tells_everything_apart(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("sha256:i", small(dim=16))
    others = [
        ("sha256:j", TF1, 30),
        ("sha256:i", TF1, 29),
        *(("sha256:i", dataclasses.replace(TF1, **{name: "x"}), 30) for name in ("protocol", "weights", "precision")),
    ]
    for images_digest, origin, n in others:
        assert cache.get(images_digest, origin, n, False, CPU) is None
    # A file under another's name is not believed.
    (file,) = (tmp_path / "fid").iterdir()
    path, _ = cache._place("sha256:j", TF1, 30)
    assert path is not None
    file.rename(path)
    assert cache.get("sha256:j", TF1, 30, False, CPU) is None


def test_a_damaged_cache_is_as_good_as_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path)
    cache.put("sha256:i", small(dim=16))
    (file,) = (tmp_path / "fid").iterdir()
    os.truncate(file, 100)
    assert cache.get("sha256:i", TF1, 30, False, CPU) is None
    (tmp_path / "no folder").touch()
    Cache(tmp_path / "no folder").put("sha256:i", small(dim=16))
    assert "not cached" in capsys.readouterr().err


# ---- several processes, and too little memory -----------------------------------------------------------------------


def share_work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    parts = images(70).split(16)[rank::ranks]
    s = extractor(batch=8).statistics(parts, keep=True)
    torch.save((s.n, s.mean, s.covariance, s.features), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_the_images_and_get_the_whole_in_order(tmp_path: Path) -> None:
    mp.spawn(share_work, (2, str(tmp_path)), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: some processors' products depend on it in their last bits
    try:
        whole = extractor(batch=8).statistics(images(70).split(16), keep=True)
    finally:
        torch.set_num_threads(threads)
    for rank in range(2):
        n, mean, covariance, features = torch.load(tmp_path / f"{rank}.pt")
        assert n == 70 and torch.equal(features, whole.features)
        torch.testing.assert_close(mean, whole.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(covariance, whole.covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_ends_with_advice(error: Exception) -> None:
    e = extractor(batch=7)

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise error

    e.network.forward = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not enough memory for 7 images"):
        e.features(images(9))
