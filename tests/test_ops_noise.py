"""The counter-based noise: the published generator, its layout, its moments, its independence of the batch split."""

import pytest
import torch

from bvae import ops, reference

# Random123's known-answer file (kat_vectors), philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor(int(w, 16)) for w in text.split())


def state(seed, offset, device):
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_twin_is_philox4x32_10(counter, key, result):
    got = reference.philox4x32(words(counter), words(key))
    assert [f"{int(w):08x}" for w in got] == result.split()


@pytest.mark.parametrize(
    ("seed", "offset", "first"),
    [
        (0, 0, 0),
        (1, 0, 5),
        (-1, -1, 2**32 - 3),
        (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3),
        (7, 2**33 + 1, 2**40),
    ],
)
def test_words_equal_the_twins(device, seed, offset, first):
    for rows, k in [(1, 1), (3, 4), (5, 7), (2, 300), (0, 3), (3, 0), (40, 64)]:
        got = ops.philox_words(state(seed, offset, device), rows, k, first)
        expected = reference.philox_words(state(seed, offset, "cpu"), rows, k, first)
        assert got.dtype == torch.int64 and torch.equal(got.cpu(), expected)


def test_word_layout():
    """Latents 4q .. 4q+3 of sample n use the counter (q, n, offset low, offset high) and the seed as key."""
    offset, seed = 5 + (9 << 32), 11 + (13 << 32)
    got = ops.philox_words(state(seed, offset, "cpu"), 3, 10, first_sample=100)[2]
    for quad in range(3):
        counter = tuple(torch.tensor(c) for c in (quad, 102, 5, 9))
        expected = torch.stack(reference.philox4x32(counter, (torch.tensor(11), torch.tensor(13))))
        assert torch.equal(got[4 * quad : 4 * quad + 4], expected[: min(4, 10 - 4 * quad)])


def test_normals_are_within_a_few_ulp_of_exact(device):
    got = ops.philox_normal(ops.make_rng(3, device), 2000, 64).double().cpu()
    exact = reference.philox_normal(ops.make_rng(3), 2000, 64).double()
    ulp = 2.0**-23
    assert ((got - exact) / exact).abs().max().item() <= (3 if device == "cpu" else 4) * ulp  # sqrt.approx there


@pytest.mark.gpu
def test_normals_have_the_same_bits_on_cpu_and_gpu():
    gpu = ops.philox_normal(ops.make_rng(3, "cuda"), 2000, 64).cpu()
    cpu = ops.philox_normal(ops.make_rng(3), 2000, 64)
    assert ((gpu - cpu).abs() <= 2 * torch.finfo(torch.float32).eps * cpu.abs()).all()


def test_moments_of_the_noise(device):
    """Mean, variance, skewness, kurtosis, tails, and no correlation of neighbours, within five standard errors."""
    n, k = 20000, 32
    x = ops.philox_normal(ops.make_rng(17, device), n, k).double().cpu()
    count = n * k
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert (x**power).mean().item() == pytest.approx(expected, abs=5 * (variance / count) ** 0.5)
    assert (x.abs() > 3).double().mean().item() == pytest.approx(0.0026998, abs=5 * (0.0027 / count) ** 0.5)
    five = 5 / count**0.5
    assert abs((x[1:] * x[:-1]).mean().item()) < five  # samples
    for step in (1, 2, 3, 4):  # latents: pairs share a radius, quads a counter
        assert abs((x[:, step:] * x[:, :-step]).mean().item()) < 1.1 * five
        assert abs(((x[:, step:] ** 2 - 1) * (x[:, :-step] ** 2 - 1)).mean().item()) < 2.2 * five
    assert x.abs().max().item() < 6.8


def test_seeds_and_offsets_differ(device):
    base = ops.philox_normal(state(1, 0, device), 50, 8)
    for other in (state(2, 0, device), state(1, 1, device), state(1 + (1 << 32), 0, device), state(1, 1 << 32, device)):
        assert (ops.philox_normal(other, 50, 8) == base).double().mean().item() < 0.01


def test_noise_does_not_depend_on_the_batch_split(device):
    mu, ls = torch.randn(12, 9, device=device), torch.randn(12, 9, device=device)
    whole = ops.sample_kl(mu, ls, ops.make_rng(5, device))
    parts = [
        ops.sample_kl(mu[a:b], ls[a:b], ops.make_rng(5, device), first_sample=a) for a, b in [(0, 5), (5, 6), (6, 12)]
    ]
    assert torch.equal(torch.cat([p.z for p in parts]), whole.z)
    assert torch.allclose(sum(p.kl for p in parts), whole.kl)


def test_sampling_uses_the_public_noise(device):
    rng = ops.make_rng(5, device)
    zero = torch.zeros(4, 6, device=device)
    expected = ops.philox_normal(rng, 4, 6, first_sample=2)
    assert torch.equal(ops.sample_kl(zero, zero, rng, first_sample=2).z, expected)


def test_make_rng_takes_any_seed():
    assert ops.make_rng(-1).tolist() == [-1, 0]
    assert ops.make_rng(2**64 - 1).tolist() == [-1, 0]
    assert ops.make_rng(2**63 - 1).tolist() == [2**63 - 1, 0]
