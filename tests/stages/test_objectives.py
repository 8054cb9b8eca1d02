"""The objectives of the families against their definitions in float64: values, gradients, estimates."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bvae import ops
from bvae.balance import FixedGammaLoss, LearnedGammaLoss
from bvae.engine.step import Step
from bvae.models.mlp import mlp
from bvae.models.norm import BatchNorm2d
from bvae.models.vae import VAE
from bvae.models.vamp import VampPrior
from bvae.stages.families.ae import AEObjective
from bvae.stages.families.rae import RAEObjective, kernels_of
from bvae.stages.families.rae_gp import GradientPenaltyObjective
from bvae.stages.families.vamp import VampObjective
from bvae.stages.families.wae_mmd import InfoVAEObjective, WAEObjective, mmd
from bvae.stages.objective import Noise, VAEObjective

B, K, SHAPE = 6, 3, (2, 4, 4)
D = math.prod(SHAPE)


class Encoder(nn.Module):
    def __init__(self, outputs: int, norm: bool = False):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, 2, 1)
        self.norm = BatchNorm2d(4) if norm else nn.Identity()
        self.last = nn.Linear(16, outputs)

    def forward(self, x):
        y = self.last(torch.tanh(self.norm(self.first(x))).flatten(1))
        return y if self.last.out_features == K else y.chunk(2, 1)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(K, 16)
        self.last = nn.ConvTranspose2d(4, 2, 4, 2, 1)

    def forward(self, z):
        return self.last(torch.tanh(self.first(z)).view(-1, 4, 2, 2))


def autoencoder():
    torch.manual_seed(0)
    return VAE(Encoder(K), Decoder(), deterministic=True)


def vae(prior=None, norm=False):
    torch.manual_seed(0)
    return VAE(Encoder(2 * K, norm), Decoder(), prior=prior)


def images(count=B):
    g = torch.Generator().manual_seed(3)
    target = torch.randint(0, 256, (count, *SHAPE), generator=g, dtype=torch.uint8)
    return target.float() / 255, target


def noise(seed=5):
    return Noise(ops.make_rng(seed))


def normal(rows, columns, seed=5):
    return ops.philox_normal(ops.make_rng(seed), rows, columns).double()


def gradients(total, model):
    return torch.autograd.grad(total, list(model.parameters()))


def agrees(objective, model, defined):
    """The objective's total and gradients are those of `defined(model in float64, images in float64)`."""
    x, target = images()
    total, parts, moments = objective(model, x, target, noise())
    found = gradients(total, model)
    wide = model.double()
    wanted = defined(wide, target.double() / 255)
    assert total.item() == pytest.approx(wanted.item(), rel=2e-5)
    for ours, theirs in zip(found, gradients(wanted, wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-5)
    assert len(parts) == len(objective.parts) and not parts.requires_grad
    return dict(zip(objective.parts, parts.tolist(), strict=True)), moments


def sse(model, x, z):
    return (torch.sigmoid(model.decoder(z)) - x).square().sum() / len(x)


def test_the_autoencoder_minimises_the_squared_error():
    model = autoencoder()
    kernels = [model.encoder.first]

    def defined(model, x):
        return sse(model, x, model.encoder(x)) + 0.3 * model.encoder.first.weight.square().sum()

    figures, moments = agrees(AEObjective(l2=0.3, penalised=kernels), model, defined)
    assert moments is None
    x = images()[0].double()
    assert figures["mse"] == pytest.approx(sse(model, x, model.encoder(x)).item() / D, rel=1e-5)


def test_a_deterministic_family_takes_mu_of_an_encoder_that_gives_sigma_too():
    torch.manual_seed(0)
    model = VAE(Encoder(2 * K), Decoder(), deterministic=True)
    x, target = images()
    total, _, _ = AEObjective()(model, x, target, noise())
    assert total.item() == pytest.approx(sse(model, x, model.encoder(x)[0]).item(), rel=1e-5)


def test_rae_l2():
    model = autoencoder()

    def defined(model, x):
        z = model.encoder(x)
        weights = model.decoder.first.weight.square().sum() + model.decoder.last.weight.square().sum()
        return sse(model, x, z) + 0.7 * z.square().sum(1).mean() + 0.02 * weights

    objective = RAEObjective(0.7, 0.02, kernels_of(model.decoder, "all"))
    figures, _ = agrees(objective, model, defined)
    z = model.encoder(images()[0].double())
    assert figures["latent_norm2"] == pytest.approx(z.square().sum(1).mean().item(), rel=1e-5)
    assert kernels_of(model.decoder, "transposed") == [model.decoder.last]


def test_under_bf16_the_decoders_kernels_keep_the_penaltys_gradient():
    """A step takes the gradient of a bf16 copy of a weight, which the penalty does not see."""
    torch.manual_seed(0)
    model = VAE(*mlp(2, 4, 4, K, deterministic=True), deterministic=True)
    before = [m.weight.detach().clone() for m in kernels_of(model.decoder, "all")]
    objective = RAEObjective(0.0, 1e6, kernels_of(model.decoder, "all"), amp=True)
    step = Step(model, objective, noise(), 0, True)
    assert step.copies.of
    step.set_lr(1e-4)
    x, target = images()
    step(x.bfloat16(), target)
    for old, m in zip(before, kernels_of(model.decoder, "all"), strict=True):
        assert (m.weight.square() < old.square())[old.abs() > 1e-3].all()


def jacobians(model, z):
    """[B,D,k] of the images."""
    return torch.stack(
        [
            torch.autograd.functional.jacobian(lambda v: torch.sigmoid(model.decoder(v[None])).flatten(), row)
            for row in z
        ]
    )


def test_rae_gp_is_the_probed_jacobian():
    def defined(model, x):
        z = model.encoder(x)
        v = normal(B, D).view(B, *SHAPE)
        (row,) = torch.autograd.grad((v * torch.sigmoid(model.decoder(z))).sum(), z, create_graph=True)
        return sse(model, x, z) + 0.1 * z.square().sum(1).mean() + 0.4 * row.square().sum(1).mean()

    agrees(GradientPenaltyObjective(0.1, 0.4), autoencoder(), defined)


def test_rae_gp_probes_estimate_the_jacobians_norm_without_bias():
    model = autoencoder()
    x, target = images()
    exact = jacobians(model, model.encoder(x).detach()).square().sum((1, 2)).mean().item()
    objective, rng = GradientPenaltyObjective(0.0, 1.0), noise()
    draws = torch.tensor([objective(model, x, target, rng)[1][-1].item() for _ in range(400)])
    error = draws.std() / 20
    assert error < 0.05 * exact  # sharp enough to tell
    assert abs(draws.mean() - exact) < 4 * error


def test_rae_gp_as_the_authors_code_has_it():
    def defined(model, x):
        z = model.encoder(x)
        (row,) = torch.autograd.grad(torch.sigmoid(model.decoder(z)).square().sum(), z, create_graph=True)
        return sse(model, x, z) + 0.3 * row.square().sum(1).mean()

    agrees(GradientPenaltyObjective(0.0, 0.3, "energy"), autoencoder(), defined)


def slow_mmd(z, n):
    """The estimator of the WAE's authors, pair by pair."""
    count, k = z.shape

    def kernel(a, b):
        base = 2 * k
        distance2 = sum((a[i] - b[i]) ** 2 for i in range(k))
        return sum(s * base / (s * base + distance2) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    own = sum(kernel(z[i], z[j]) + kernel(n[i], n[j]) for i in range(count) for j in range(count) if i != j)
    cross = sum(kernel(z[i], n[j]) for i in range(count) for j in range(count))
    return own / (count * (count - 1)) - 2 * cross / count**2


def test_mmd_against_a_double_loop():
    torch.manual_seed(1)
    z, n = (3 * torch.randn(5, K, dtype=torch.float64)).requires_grad_(), torch.randn(5, K, dtype=torch.float64)
    wanted = slow_mmd(z, n)
    assert mmd(z, n).item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (mmd(z, n), wanted)))
    torch.testing.assert_close(mmd(z.float(), n.float()).double(), wanted, rtol=1e-4, atol=1e-5)


def test_mmd_of_equal_laws_is_zero_on_average_and_so_often_negative():
    g = torch.Generator().manual_seed(0)
    values = torch.tensor([mmd(*torch.randn(2, 20, K, generator=g)).item() for _ in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20
    assert 0.3 < (values < 0).float().mean() < 0.8
    assert mmd(torch.randn(50, K, generator=g) + 2, torch.randn(50, K, generator=g)) > values.max()


def test_wae_mmd():
    def defined(model, x):
        z = model.encoder(x)
        return sse(model, x, z) + 5 * slow_mmd(z, normal(B, K))

    model = autoencoder()
    figures, _ = agrees(WAEObjective(5), model, defined)
    assert figures["mmd"] == pytest.approx(slow_mmd(model.encoder(images()[0].double()), normal(B, K)).item(), rel=1e-4)


def test_the_codes_of_several_ranks_are_not_compiled():
    step = Step(autoencoder(), WAEObjective(5, world=SimpleNamespace(size=2)), noise(), 0, False)
    assert step.compile(*images()).startswith("the family's MMD")


@pytest.mark.parametrize("make", [lambda: FixedGammaLoss(gamma=0.4, kl_weight=2.0), LearnedGammaLoss])
def test_info_vae_adds_the_mmd_to_the_squared_error(make):
    """One draw for the posterior, then one for the prior's sample: the rng's second."""

    def defined(model, x):
        mu, log_sigma = model.encoder(x)
        rng = ops.make_rng(5)
        eps = ops.philox_normal(rng, B, K).double()
        rng[1] += 1
        z = mu + log_sigma.exp() * eps
        kl = 0.5 * (mu.square() + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum() / B
        gamma2, weight = (0.16, 2.0) if make is not LearnedGammaLoss else (1.0, 1.0)
        error = sse(model, x, z) + 5 * slow_mmd(z, ops.philox_normal(rng, B, K).double())
        return error / (2 * gamma2) + weight * kl + D / 2 * math.log(2 * math.pi * gamma2)

    agrees(InfoVAEObjective(5, make()), vae(), defined)


def vamp_terms(model, x):
    """(z, log q - log p) of the rng's first draw, components included, in float64."""
    mu, log_sigma = model.encoder(x)
    z = mu + log_sigma.exp() * normal(len(x), K)
    posterior = torch.distributions.Normal(mu, log_sigma.exp())
    m, s = model.encoder(model.prior.inputs.clamp(0, 1))
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(len(m), dtype=m.dtype)),
        torch.distributions.Independent(torch.distributions.Normal(m, s.exp()), 1),
    )
    return z, posterior.log_prob(z).sum(1) - mixture.log_prob(z)


def prior_of(count=4):
    prior = VampPrior(count, SHAPE)
    g = torch.Generator().manual_seed(8)
    prior.inputs.data.copy_(torch.rand(count, *SHAPE, generator=g) * 1.2 - 0.1)
    return prior


def test_vamp_against_torchs_distributions():
    def defined(model, x):
        z, divergence = vamp_terms(model, x)
        return sse(model, x, z) / (2 * 0.16) + divergence.mean() + D / 2 * math.log(2 * math.pi * 0.16)

    model = vae(prior_of())
    figures, moments = agrees(VampObjective(FixedGammaLoss(gamma=0.4)), model, defined)
    assert figures["kl"] == pytest.approx(vamp_terms(model, images()[0].double())[1].mean().item(), rel=1e-4, abs=1e-5)
    assert moments.shape == (4, K)


def test_vamps_density_is_the_mixtures():
    model = vae(prior_of())
    z = 3 * normal(300, K).float()
    m, s = (t.double() for t in model.prior.components(model.encoder))
    terms = torch.distributions.Normal(m, s.exp()).log_prob(z[:, None].double()).sum(2)
    wanted = torch.logsumexp(terms, 1) - math.log(4)
    torch.testing.assert_close(model.prior.density(model.encoder)(z), wanted.detach(), rtol=1e-5, atol=1e-4)


def test_vamp_of_one_component_has_the_kl_of_two_gaussians_on_average():
    model = vae(prior_of(1))
    x = images(1)[0].expand(4000, *SHAPE)
    with torch.no_grad():
        mu, log_sigma = model.encoder(x[:1])
        z = mu + log_sigma.exp() * normal(4000, K).float()
        values = model.prior.divergence(model.encoder, z, mu.expand_as(z), log_sigma.expand_as(z))
        m, s = model.prior.components(model.encoder)
    q, p = (torch.distributions.Normal(a, b.exp()) for a, b in ((mu, log_sigma), (m, s)))
    exact = torch.distributions.kl_divergence(q, p).sum().item()
    assert abs(values.mean().item() - exact) < 4 * values.std().item() / math.sqrt(4000)


def test_pseudo_inputs_stay_out_of_the_datas_batch_norm():
    x, target = images()
    with_prior, without = vae(prior_of(), norm=True).train(), vae(norm=True).train()
    VampObjective(FixedGammaLoss(gamma=0.4))(with_prior, x, target, noise())
    VAEObjective(FixedGammaLoss(gamma=0.4))(without, x, target, noise())
    for name, buffer in without.named_buffers():
        assert torch.equal(dict(with_prior.named_buffers())[name], buffer), name
    # By their own batch they have the same components in either mode.
    trained = with_prior.prior.components(with_prior.encoder)
    for ours, evaluated in zip(trained, with_prior.eval().prior.components(with_prior.encoder), strict=True):
        assert torch.equal(ours, evaluated)
    assert not with_prior.encoder.norm.training


def test_a_sample_of_vamp_is_of_a_random_pseudo_inputs_posterior():
    model = vae(prior_of(3)).eval()
    mu, log_sigma = (t.double() for t in model.prior.components(model.encoder))
    rng = ops.make_rng(2)
    z = model.prior.sample(model.encoder, 30_000, rng).double()
    assert torch.equal(model.prior.sample(model.encoder, 10, rng).double(), z[:10])
    wanted = mu.mean(0)
    variance = mu.var(0, correction=0) + (2 * log_sigma).exp().mean(0)
    assert ((z.mean(0) - wanted).abs() < 4 * (variance / 30_000).sqrt()).all()
    torch.testing.assert_close(z.var(0), variance, rtol=0.05, atol=0.0)
