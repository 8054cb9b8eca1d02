"""The beginning and the end of a step: the fused operations against their twins."""

import math

import pytest
import torch

from bvae import ops, reference


def state(device):
    """Tensors as a step moves: of several types, one empty, one at an address that is no multiple of four, one dense
    in another order."""
    g = torch.Generator().manual_seed(0)
    odd = torch.arange(8, dtype=torch.uint8, device=device)[1:]
    turned = torch.randn(3, 5, generator=g).to(device).t()
    return [torch.randn(1000, generator=g).to(device), torch.tensor(0.5, device=device), odd, turned,
            torch.tensor([7], device=device), torch.zeros(0, device=device)]  # fmt: skip


def sums(device, parts=3):
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in ((parts,), (4, 6), (2,), ())]
    return [t.to(device) for t in zeros]


def test_all_are_copied(device):
    tensors = state(device)
    for module in (ops, reference):
        copies = [torch.zeros_like(t) for t in tensors]
        module.copy_all(copies, tensors)
        for a, b in zip(copies, tensors, strict=True):
            assert torch.equal(a, b)
        module.copy_all([], [])


def test_more_tensors_than_a_launch_takes(device):
    tensors = [torch.full((i % 5,), float(i), device=device) for i in range(300)]
    copies = [torch.zeros_like(t) for t in tensors]
    ops.copy_all(copies, tensors)
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True))
    ops.end_step(
        torch.tensor(False, device=device),
        torch.zeros(0, device=device),
        None,
        *sums(device, parts=0),
        copies,
        [t + 1 for t in tensors],
    )
    assert all(torch.equal(a, b + 1) for a, b in zip(copies, tensors, strict=True))


def test_steps_end_as_the_twin_says(device):
    """Good and bad ones, in an order in which trouble rises, falls and reaches zero."""
    outcomes = [True, False, False, True, *[True] * 8, False, True]
    results = []
    for module in (ops, reference):
        g = torch.Generator().manual_seed(1)
        tensors, figures = state(device), sums(device)
        record = []
        for outcome in outcomes:
            kept = [torch.empty_like(t) for t in tensors]
            module.copy_all(kept, tensors)
            for t in tensors:
                t += 1
            parts = torch.randn(3, generator=g).to(device)
            moments = torch.randn(4, 6, generator=g).to(device)
            if not outcome:
                parts[1] = math.nan
                moments[2, 3] = math.inf
            module.end_step(torch.tensor(outcome, device=device), parts, moments, *figures, tensors, kept)
            record += [t.clone() for t in (*tensors, *figures)]
        results.append(record)
        assert figures[2].tolist() == [outcomes.count(True), outcomes.count(False)]
        assert all(t.isfinite().all() for t in figures)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("module", [ops, reference])
def test_trouble_grows_only_where_more_than_one_step_in_five_is_bad(module):
    figures = sums("cpu", parts=0)
    parts = torch.zeros(0)
    for i in range(100):
        module.end_step(torch.tensor(i % 5 != 0), parts, None, *figures, [], [])
        assert figures[3] <= 1
    for i in range(100):
        module.end_step(torch.tensor(i % 4 != 0), parts, None, *figures, [], [])
    assert figures[3] > 5


@pytest.mark.usefixtures("needs_extension")
def test_misfits_are_refused():
    good, one = torch.tensor(True), torch.zeros(())
    with pytest.raises(RuntimeError, match="two lists of one length"):
        ops.copy_all([one], [one, one])
    with pytest.raises(RuntimeError, match="like its tensor"):
        ops.copy_all([one], [one.double()])
    with pytest.raises(RuntimeError, match="like its tensor"):
        ops.copy_all([torch.zeros(4, 4)[:, :2]], [torch.zeros(4, 4)[:, :2]])
    with pytest.raises(RuntimeError, match="sum_parts must be float64, 1 in a row"):
        ops.end_step(good, torch.zeros(1), None, *sums("cpu"), [], [])
    with pytest.raises(RuntimeError, match="sum_moments must be float64, 8"):
        ops.end_step(good, torch.zeros(3), torch.zeros(2, 4), *sums("cpu"), [], [])
    with pytest.raises(RuntimeError, match="parts must be float32"):
        ops.end_step(good, torch.zeros(3).double(), None, *sums("cpu"), [], [])


@pytest.mark.usefixtures("needs_extension")
def test_opcheck(device):
    tensors = [torch.randn(3, device=device), torch.tensor(2, device=device)]
    kept = [torch.zeros_like(t) for t in tensors]
    torch.library.opcheck(torch.ops.bvae.copy_all, (kept, tensors))
    parts, moments = torch.zeros(3, device=device), torch.randn(4, 6, device=device)
    for good in (True, False):
        arguments = torch.tensor(good, device=device), parts, moments, *sums(device), tensors, kept
        torch.library.opcheck(torch.ops.bvae.end_step, arguments)
