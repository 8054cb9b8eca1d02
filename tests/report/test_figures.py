import io
import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bvae.errors import UserError
from bvae.report import figures
from bvae.report.figures import curves, factor_correlation, image_grid, latent_curves, reconstruction_grid, save_png

FACTORS = ["number", "kind", "x", "y", "size", "rotation", "hue", "background"]


def flat(n, height, width, channels, first=10):
    """n images, the i-th of the one value first + i."""
    values = np.arange(first, first + n, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(values, (n, height, width, channels))


def run_records(epochs, latents=8, stages=(1,)):
    """What a plausible run logs: all but a quarter of the latents become active, the test set is seen now and then."""
    rng = np.random.default_rng(0)
    active = np.arange(latents) < latents * 3 // 4
    records = []
    for stage in stages:
        for epoch in range(1, epochs + 1):
            mse = 0.006 + 0.06 / epoch
            var_mu = np.where(active, 1 - 0.5**epoch, 0.02) * (1 + 0.02 * rng.standard_normal(latents))
            record = {
                "stage": stage,
                "epoch": epoch,
                "loss": -1000.0 * math.log(epoch) + 50,
                "nll": -1000.0 * math.log(epoch),
                "kl": 50.0 + epoch,
                "mse": mse,
                "gamma2": 1.1 * mse,
                "balance": 0.5 / 1.1,
                "lr": 1e-4 * 0.5 ** (epoch // 200),
                "skipped": 0,
                "latent_var_mu": var_mu.tolist(),
                "latent_sigma2": (1 - var_mu).tolist(),
            }
            if epoch % 10 == 0:
                record |= {"test_mse": 1.2 * mse, "test_kl": 51.0 + epoch}
            records.append(record)
    return records


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved during the test, as matplotlib objects."""
    saved = []
    savefig = Figure.savefig

    def keep(self, *args, **kwargs):
        saved.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def pixels(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def assert_readable(path):
    """A light picture of a sensible size with something on it."""
    image = pixels(path)
    assert min(image.shape[:2]) > 200
    dark = (image.sum(axis=2) < 500).mean()
    assert 0.003 < dark < 0.7
    assert (image[0, 0] == 255).all()


def panel(figure, title):
    parts = figure.subfigs or [figure]
    return [axes for part in parts for axes in part.axes if axes.get_title(loc="left") == title]


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def test_image_grid_places_every_image():
    grid = image_grid(flat(5, 3, 4, 3), columns=2, pad=1)
    assert grid.shape == (3 * 4 + 1, 2 * 5 + 1, 3) and grid.dtype == np.uint8
    expected = np.full_like(grid, 255)
    for i, (top, left) in enumerate([(1, 1), (1, 6), (5, 1), (5, 6), (9, 1)]):
        expected[top : top + 3, left : left + 4] = 10 + i
    np.testing.assert_array_equal(grid, expected)


def test_image_grid_keeps_channels_apart_and_spreads_grey():
    colour = np.zeros((1, 2, 2, 3), np.uint8)
    colour[..., 0], colour[0, 0, 1, 2] = 200, 90
    np.testing.assert_array_equal(image_grid(colour, 1, pad=0), colour[0])
    grey = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(image_grid(grey, 1, pad=0), np.repeat(grey[0], 3, axis=2))


def test_image_grid_has_no_empty_columns():
    assert image_grid(flat(3, 4, 4, 1), columns=8).shape == (2 + 4 + 2, 2 + 3 * 6, 3)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, 4, 3), np.float32),
        np.zeros((3, 4, 3), np.uint8),
        np.zeros((2, 3, 4, 2), np.uint8),
        np.zeros((0, 3, 4, 3), np.uint8),
    ],
)
def test_image_grid_refuses_other_arrays(images):
    with pytest.raises(ValueError, match="images must be uint8"):
        image_grid(images, 2)


def test_image_grid_refuses_no_columns():
    with pytest.raises(ValueError, match="columns"):
        image_grid(flat(1, 2, 2, 1), 0)


def test_reconstruction_grid_puts_each_pair_together():
    x, x_hat = flat(3, 4, 4, 3), flat(3, 4, 4, 3, first=110)
    grid = reconstruction_grid(x, x_hat, columns=2)[:, :, 0]
    assert grid.shape == (2 * (9 + 6) + 6, 2 * (4 + 6) + 6)
    for i in range(3):
        (rows, columns), (rows_hat, columns_hat) = (np.nonzero(grid == value + i) for value in (10, 110))
        assert len(rows) == len(rows_hat) == 16
        np.testing.assert_array_equal(columns, columns_hat)
        # One white row inside a pair, six around it.
        np.testing.assert_array_equal(rows_hat, rows + 5)
    assert (grid[15:21] == 255).all()


def test_reconstruction_grid_refuses_unlike_arrays():
    with pytest.raises(ValueError, match="differ in shape"):
        reconstruction_grid(flat(2, 4, 4, 3), flat(2, 4, 4, 1))
    with pytest.raises(ValueError, match="x_hat must be uint8"):
        reconstruction_grid(flat(2, 4, 4, 3), flat(2, 4, 4, 3).astype(float))


def test_save_png_enlarges_without_smoothing(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_png(tmp_path / "a.png", array, scale=3)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.kron(array, np.ones((3, 3, 1), int)))
    save_png(tmp_path / "auto.png", array)
    assert pixels(tmp_path / "auto.png").shape == (5 * 114, 7 * 114, 3)
    large = np.zeros((900, 1200), np.uint8)
    save_png(tmp_path / "large.png", large)
    assert pixels(tmp_path / "large.png").shape == (900, 1200, 3)
    with pytest.raises(ValueError, match="scale"):
        save_png(tmp_path / "a.png", array, scale=0)
    with pytest.raises(ValueError, match="picture must be uint8"):
        save_png(tmp_path / "a.png", array.astype(float))


@pytest.mark.parametrize("epochs", [1, 12, 700])
def test_curves_and_latents_of_any_length(tmp_path, epochs):
    records = run_records(epochs)
    curves(records, tmp_path / "curves.png")
    latent_curves(records, tmp_path / "latents.png")
    assert_readable(tmp_path / "curves.png")
    assert_readable(tmp_path / "latents.png")


def test_curves_show_the_values(tmp_path, drawn):
    records = run_records(20, stages=(1, 2))
    curves(records, tmp_path / "curves.png")
    (figure,) = drawn
    assert [part.get_suptitle() for part in figure.subfigs] == ["Stage 1: images", "Stage 2: latent vectors"]
    for axes in panel(figure, "Mean squared error"):
        np.testing.assert_allclose(lines(axes)["train"].get_ydata(), [r["mse"] for r in records[:20]])
        np.testing.assert_array_equal(lines(axes)["test"].get_xdata(), [10, 20])
        assert axes.get_yscale() == "log"
    gamma = panel(figure, r"Estimated error, $\gamma$")[0]
    np.testing.assert_allclose(lines(gamma)["gamma"].get_ydata() ** 2, [r["gamma2"] for r in records[:20]])
    assert list(lines(panel(figure, "Balance")[0])["1/2"].get_ydata()) == [0.5, 0.5]
    assert all(axes.get_ylabel() and axes.get_xlabel() for part in figure.subfigs for axes in part.axes)


def test_curves_leave_gaps_for_what_is_not_finite(tmp_path, drawn):
    records = run_records(6)
    for record in records[2:4]:
        record |= {"loss": math.nan, "nll": None, "mse": math.inf, "gamma2": math.nan, "kl": -math.inf, "skipped": 7}
        record["latent_sigma2"] = [None] * 8
        record["latent_var_mu"] = [math.inf] * 8
    records[3]["gamma2"] = -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves(records, tmp_path / "curves.png")
        latent_curves(records, tmp_path / "latents.png")
    gaps = [False, False, True, True, False, False]
    for title in ("Loss and reconstruction term", "KL divergence", "Mean squared error", r"Estimated error, $\gamma$"):
        for line in panel(drawn[0], title)[0].lines:
            assert np.isnan(line.get_ydata()).tolist() == gaps, title
    assert "14 steps skipped" in drawn[0].subfigs[0].get_suptitle()
    assert "6 active, 2 inactive" in drawn[1].get_suptitle()
    assert_readable(tmp_path / "curves.png")


def test_curves_of_nothing_but_nan_or_missing_keys(tmp_path, drawn):
    record = {"stage": 1, "epoch": 1, "loss": math.nan, "mse": 0.0, "gamma2": -1.0}
    curves([record], tmp_path / "curves.png")
    texts = [text.get_text() for axes in drawn[0].subfigs[0].axes for text in axes.texts]
    assert texts == ["no finite values"] * 6
    record |= {"latent_var_mu": [math.nan] * 2, "latent_sigma2": [math.nan, 0.1]}
    latent_curves([record], tmp_path / "latents.png")
    assert "1 active, 0 inactive, 1 never finite" in drawn[1].get_suptitle()
    with pytest.raises(ValueError, match="no records"):
        curves([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="no records of stage 2"):
        latent_curves([record], tmp_path / "none.png", stage=2)
    assert not (tmp_path / "none.png").exists()


def test_latent_curves_part_the_inactive_by_the_last_value(tmp_path, drawn):
    # Latent 0 ends active after a bad start, latent 1 at the threshold itself, latent 2 above it.
    sigma2 = [[0.9, 0.1, 0.5], [0.7999, 0.8, 0.95]]
    records = [
        {"stage": 1, "epoch": e, "latent_var_mu": [0.5, 0.4, 0.3], "latent_sigma2": sigma2[e - 1]} for e in (1, 2)
    ]
    latent_curves(records, tmp_path / "latents.png")
    (figure,) = drawn
    assert "3 latents after epoch 2: 1 active, 2 inactive" in figure.get_suptitle()
    var_mu, noise = figure.axes
    for axes in (var_mu, noise):
        assert [line.get_color() for line in axes.lines[:3]] == [figures.BLUE, figures.ORANGE, figures.ORANGE]
    np.testing.assert_array_equal([line.get_ydata() for line in noise.lines[:3]], np.transpose(sigma2))
    assert list(noise.lines[3].get_ydata()) == [0.8, 0.8]
    latent_curves(records, tmp_path / "latents.png", inactive_threshold=0.9)
    assert "2 active, 1 inactive" in drawn[1].get_suptitle()


def test_factor_correlation_orders_the_active_by_kl(tmp_path, drawn):
    corr = np.array([[0.1, -0.9], [0.2, 0.3], [np.nan, 0.4], [0.5, 0.6]])
    factor_correlation(corr, ["x", "y"], np.array([1, 0, 1, 1], bool), tmp_path / "c.png", kl=np.array([1, 9, 2.5, 0]))
    (axes,) = drawn[0].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["z2  (2.50 nats)", "z0  (1.00 nats)", "z3  (0.00 nats)"]
    assert [t.get_text() for t in axes.texts] == ["n/a", "0.40", "0.10", "0.90", "0.50", "0.60"]
    assert "3 active of 4 latents" in axes.get_title(loc="left")
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown.filled(-1), [[-1, 0.4], [0.1, 0.9], [0.5, 0.6]])


def test_factor_correlation_at_the_ends(tmp_path, drawn):
    rng = np.random.default_rng(0)
    corr = rng.uniform(-1, 1, (64, 8))
    factor_correlation(corr, FACTORS, np.ones(64, bool), tmp_path / "all.png")
    assert_readable(tmp_path / "all.png")
    assert [t.get_text() for t in drawn[0].axes[0].get_yticklabels()][:2] == ["z0", "z1"]
    factor_correlation(corr, FACTORS, np.zeros(64, bool), tmp_path / "none.png")
    assert [t.get_text() for t in drawn[1].axes[0].texts] == ["no active latent"]
    for bad in (
        (corr, FACTORS[1:], np.ones(64, bool)),
        (corr, FACTORS, np.ones(8, bool)),
        (corr, FACTORS, np.ones(64)),
    ):
        with pytest.raises(ValueError, match="do not agree"):
            factor_correlation(*bad, tmp_path / "bad.png")
    with pytest.raises(ValueError, match="do not agree"):
        factor_correlation(corr, FACTORS, np.ones(64, bool), tmp_path / "bad.png", kl=np.ones(8))


def draw_all(folder: Path):
    records = run_records(5)
    save_png(folder / "grid.png", image_grid(flat(4, 8, 8, 3), 2))
    curves(records, folder / "curves.png")
    latent_curves(records, folder / "latents.png")
    factor_correlation(np.eye(8), FACTORS, np.ones(8, bool), folder / "corr.png")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_depend_on_the_input_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = draw_all(tmp_path / "a")
    # Somebody's own matplotlib settings: neither used nor changed.
    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "black", "savefig.dpi": 20}):
        settings = dict(matplotlib.rcParams)
        assert draw_all(tmp_path / "b") == first
        assert dict(matplotlib.rcParams) == settings
    for data in first.values():
        assert not Image.open(io.BytesIO(data)).info.keys() & {"Software", "Creation Time", "date"}


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out.png"
    records = run_records(2)
    for write in (
        lambda: save_png(out, np.zeros((4, 4), np.uint8)),
        lambda: curves(records, out),
        lambda: latent_curves(records, out),
        lambda: factor_correlation(np.eye(2), ["x", "y"], np.ones(2, bool), out),
    ):
        with pytest.raises(UserError, match=r"cannot write .*out\.png: Not a directory"):
            write()
