"""The contract that every prior keeps, and the traps of fitting one to an aggregate posterior."""

import math

import numpy as np
import pytest
import torch

from bvae import ops
from bvae.errors import UserError
from bvae.models.posterior import Posterior
from bvae.models.priors import find_prior, names
from bvae.models.priors.base import Codes, Whitening, split
from bvae.models.priors.normal import NormalPrior
from bvae.models.priors.saved import load_prior, save_prior

EXTRAS = {"gmm": "sklearn", "flow": "zuko"}
SMALL = {
    "gmm": {"gmm_components": 3},
    "flow-matching": {
        "flow_matching_steps": 20,
        "flow_matching_batch": 64,
        "flow_matching_width": 16,
        "flow_matching_depth": 2,
        "flow_matching_heun": 8,
    },
    "flow": {"flow_steps": 10, "flow_batch": 64, "flow_layers": 2, "flow_width": 8},
}
FITTED = [name for name in names() if find_prior(name).fitted]


def make(name, latents, **changes):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason=f"{EXTRAS[name]} is not installed: bvae[{name}]")
    kind = find_prior(name)
    return kind(latents, None if kind.Settings is None else kind.Settings(**{**SMALL.get(name, {}), **changes}))


def posterior(n=600, seed=0):
    """Three latents: one that carries a cluster's place, a narrow one that goes with it, and a collapsed one."""
    g = torch.Generator().manual_seed(seed)
    cluster = torch.randint(2, (n,), generator=g) * 2.0 - 1
    carried = cluster + 0.3 * torch.randn(n, generator=g)
    mu = torch.stack([carried, 0.01 * carried + 0.002 * torch.randn(n, generator=g), torch.zeros(n)], 1)
    sigma = torch.tensor([0.1, 0.001, 1.0]).expand(n, 3)
    return Posterior(mu, sigma.log())


@pytest.fixture(scope="module")
def fits():
    """Priors fitted to `posterior()`, each once: (prior, figures) by name."""
    done = {}

    def fitted(name):
        if name not in done:
            prior = make(name, 3)
            done[name] = prior, prior.fit(posterior(), seed=5)
        return done[name]

    return fitted


@pytest.mark.parametrize("name", FITTED)
def test_a_seed_fixes_the_fit_and_leaves_torchs_generator_alone(name, fits):
    first, figures = fits(name)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = make(name, 3)
    torch.set_rng_state(before)
    assert again.fit(posterior(), seed=5) == figures
    assert torch.equal(torch.get_rng_state(), before)
    for tensor, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
    assert again.fit(posterior(), seed=6) != figures


@pytest.mark.parametrize("name", names())
def test_samples_depend_on_the_rng_alone_and_begin_alike(name, fits):
    prior = make(name, 3) if name == "normal" else fits(name)[0]
    rng = ops.make_rng(3)
    many = prior.sample(40, rng)
    assert many.shape == (40, 3) and many.dtype == torch.float32
    assert rng.tolist() == ops.make_rng(3).tolist()
    assert torch.allclose(prior.sample(7, rng), many[:7], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prior.sample(40, ops.make_rng(4)), many, atol=1e-2)
    assert len(torch.unique(many, dim=0)) == 40
    assert prior.sample(0, rng).shape == (0, 3)


@pytest.mark.parametrize("name", names())
def test_log_prob_integrates_to_one_and_is_what_is_sampled(name):
    g = torch.Generator().manual_seed(0)
    mu = 4 + 2 * torch.randn(500, 1, generator=g).sign() + 0.3 * torch.randn(500, 1, generator=g)
    prior = make(name, 1)
    prior.fit(Posterior(mu, None), seed=0)
    z = torch.linspace(-14, 22, 4001)[:, None]
    density = prior.log_prob(z).exp()
    step = 36 / 4000
    assert density.sum().item() * step == pytest.approx(1, abs=0.01)
    # The distribution function of the density against that of samples, at every point: Kolmogorov's distance.
    samples = prior.sample(4000, ops.make_rng(1))[:, 0].sort().values
    counted = torch.searchsorted(samples, z[:, 0], right=True) / 4000
    assert (density.cumsum(0) * step - counted).abs().max() < 1.95 / math.sqrt(4000) + 0.01


@pytest.mark.parametrize("name", FITTED)
def test_a_collapsed_latent_keeps_its_variance(name, fits):
    # Fitted to posterior means alone it would get none.
    prior, figures = fits(name)
    z = prior.sample(2000, ops.make_rng(0))
    assert z.std(0).tolist() == pytest.approx([1.05, 0.0107, 1], rel=0.25)
    assert figures["degenerate"] == 0
    assert (figures["fitted_on"], figures["held_out"], figures["scored"]) == (540, 60, 60)


@pytest.mark.parametrize("name", FITTED)
def test_a_latent_that_never_varies_stays_where_it_is(name):
    codes = posterior().mu.clone()
    codes[:, 2] = 7.0
    prior = make(name, 3)
    figures = prior.fit(Posterior(codes, None), seed=0)
    assert figures["degenerate"] == 1
    assert math.isfinite(figures["log_likelihood"])
    z = prior.sample(500, ops.make_rng(0))
    # The floor's standard deviation is a thousandth of the root mean variance of all three, 0.6.
    assert (z[:, 2] - 7).abs().max() < 0.02
    assert z[:, 0].std() > 0.5


@pytest.mark.parametrize("name", FITTED)
def test_a_file_restores_it(name, fits, tmp_path):
    prior, figures = fits(name)
    path = tmp_path / "prior.safetensors"
    save_prior(path, prior, seed=5, stage1="abc", figures=figures)
    loaded = load_prior(path, "abc")
    assert (loaded.seed, loaded.figures, loaded.prior.settings) == (5, figures, prior.settings)
    assert torch.equal(loaded.prior.sample(9, ops.make_rng(1)), prior.sample(9, ops.make_rng(1)))
    with pytest.raises(UserError, match=r"prior\.safetensors.*other weights.*bvae\.prior RUN " + name):
        load_prior(path, "abd")


def test_a_file_of_another_version_or_of_something_else_is_refused_by_name(tmp_path):
    from bvae.run.checkpoint import load_checkpoint, save_checkpoint

    path = tmp_path / "prior.safetensors"
    prior = make("gaussian", 3)
    save_prior(path, prior, seed=0, stage1="abc", figures={})
    tensors, good = load_checkpoint(path)
    for change, text in (
        ({"prior": "magic"}, "magic"),
        ({"prior": "normal"}, "normal"),
        ({"latents": 4}, "tensor whitening"),
        ({"latents": "3"}, "not a prior"),
        ({"settings": {"depth": 1}}, "another version"),
        ({"prior": "gmm"}, "another version"),
        ({"prior": "gmm", "settings": {"gmm_components": "3", "gmm_iterations": 1, "gmm_tolerance": 0.1}}, "'3'"),
        ({"prior": "gmm", "settings": {"gmm_components": 0, "gmm_iterations": 1, "gmm_tolerance": 0.1}}, "from 1 to"),
    ):
        save_checkpoint(path, tensors, {**good, **change})
        with pytest.raises(UserError, match=f"prior.safetensors.*{text}"):
            load_prior(path, "abc")


def test_codes_have_fresh_noise_and_an_epoch_has_every_image_once():
    p = posterior(10)
    whitening = Whitening(3)
    whitening.measure(p)
    codes = Codes(p, whitening, seed=0)
    draws = torch.stack([whitening.inverse(codes.draw()) for _ in range(400)])
    assert len(torch.unique(draws[:, 0, 0])) == 400
    error = (draws.mean(0) - p.mu) / (p.log_sigma.exp() / math.sqrt(400))
    assert error.abs().max() < 4.5
    assert draws.std(0) == pytest.approx(p.log_sigma.exp().numpy(), rel=0.2)
    batches = Codes(Posterior(p.mu, None), whitening, seed=0).batches(4)
    for _ in range(3):
        epoch = torch.cat([next(batches) for _ in range(2)])
        assert len(torch.unique(epoch, dim=0)) == 8
    few = Codes(Posterior(p.mu, None), whitening, seed=0).batches(512)
    assert next(few).shape == (10, 3)


def test_moments_are_those_of_many_draws_and_whitening_makes_them_unit():
    p = posterior(300)
    mean, covariance = p.moments()
    mu, sigma = p.mu.double().numpy(), p.log_sigma.double().exp().numpy()
    expected = np.cov(mu.T, bias=True) + np.diag((sigma**2).mean(0))
    assert mean.numpy() == pytest.approx(mu.mean(0), abs=1e-12)
    assert covariance.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    whitening = Whitening(3)
    whitening.measure(p)
    rng = ops.make_rng(0)
    z = torch.cat([p.draw(rng) for _ in range(200)])
    w = whitening(z)
    assert torch.cov(w.T).numpy() == pytest.approx(np.eye(3), abs=0.02)
    assert w.mean(0).abs().max() < 0.02
    assert torch.allclose(whitening.inverse(w), z, rtol=1e-4, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(whitening, z[:1])[0, :, 0].double()
    assert whitening.log_det().item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), rel=1e-5)


def test_gaussian_is_the_normal_distribution_of_those_moments():
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    p = posterior()
    prior = make("gaussian", 3)
    prior.fit(p, seed=2)
    mean, covariance = p.rows(split(600, 2)[0]).moments()
    z = p.draw(ops.make_rng(9))
    expected = scipy.multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(z.double().numpy())
    assert prior.log_prob(z).numpy() == pytest.approx(expected, abs=1e-3)
    assert NormalPrior(3).log_prob(z).numpy() == pytest.approx(
        scipy.multivariate_normal(np.zeros(3)).logpdf(z.double().numpy()), abs=1e-9
    )


def test_one_in_ten_is_held_out():
    fitted, held_out = split(105, seed=1)
    assert len(held_out) == 10
    assert sorted([*fitted.tolist(), *held_out.tolist()]) == list(range(105))
    assert split(105, seed=2)[1].tolist() != held_out.tolist()


@pytest.mark.parametrize("name", FITTED)
def test_codes_that_cannot_be_fitted_are_refused(name):
    p = posterior(50)
    for bad, text in (
        (Posterior(p.mu.index_fill(0, torch.tensor([3]), math.nan), p.log_sigma), "not finite"),
        (Posterior(p.mu, p.log_sigma + math.inf), "not finite"),
        (Posterior(torch.ones(50, 3), None), "same code"),
        (Posterior(p.mu[:19], None), "at least 20 images"),
    ):
        with pytest.raises(UserError, match=text):
            make(name, 3).fit(bad, seed=0)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_settings_that_cannot_be_are_refused(name):
    for key in SMALL[name]:
        with pytest.raises(UserError, match="--" + key.replace("_", "-")):
            make(name, 3, **{key: 0})


def test_an_unknown_name():
    with pytest.raises(UserError, match=r"'magic'.*normal, gaussian"):
        find_prior("magic")


@pytest.mark.gpu
@pytest.mark.parametrize("name", names())
def test_the_same_samples_on_cuda(name, fits):
    import copy

    prior = make(name, 3) if name == "normal" else fits(name)[0]
    there = copy.deepcopy(prior).cuda().sample(300, ops.make_rng(3, "cuda")).cpu()
    assert torch.allclose(there, prior.sample(300, ops.make_rng(3)), rtol=1e-3, atol=1e-4)
