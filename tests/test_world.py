"""Two ranks against one: what they compute together must be what one rank computes of the whole batch."""

import dataclasses
import math
import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bvae import ops
from bvae.balance import make_loss
from bvae.batches.resident import ImageBatches, LatentBatches
from bvae.config import Config
from bvae.engine.graph import make_runner
from bvae.engine.step import Step
from bvae.errors import UserError
from bvae.metrics.scores import encode_images, score_images, score_latents
from bvae.models.norm import BatchNorm2d, batch_norms
from bvae.models.vae import first_stage, second_stage
from bvae.stages.families.rae_gp import GradientPenaltyObjective
from bvae.stages.families.vamp import VampObjective
from bvae.stages.families.wae_mmd import InfoVAEObjective, WAEObjective
from bvae.stages.objective import Noise, VAEObjective
from bvae.world import ALONE, Lost, World, gather

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

CONFIG = Config(preset="shapes", side=8, scales=2, base=4, fc=8, latents=3, hidden=16)
BATCH = 8
SECONDS = 240  # after which the two ranks are given up
BALANCES = ("computed", "learned", "fixed")


def batch(seed, part=slice(0, BATCH)):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 256, (BATCH, 3, 8, 8), generator=g, dtype=torch.uint8)[part]
    return (target.float() / 255).contiguous(memory_format=torch.channels_last), target


def model():
    torch.manual_seed(0)
    return first_stage(CONFIG).to(memory_format=torch.channels_last)


def images(count):
    return torch.randint(0, 256, (count, 8, 8, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def gradients(net):
    return {f"grad.{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}


def trained(world, part, balance="computed", norm="batch", steps=3, poison=None):
    """What some steps leave behind on this rank: gradients of the last, state, model, and gamma2 on the way."""
    net = model()
    loss = make_loss(balance, gamma=0.3 if balance == "fixed" else None, accumulate=world.size > 1)
    step = Step(net, VAEObjective(loss), Noise(ops.make_rng(7), part.start), 3, False, world)
    step.set_lr(1e-3)
    for n in batch_norms(net):
        if norm == "eval":
            n.eval()
        elif norm == "synchronised":
            n.gather = gather
    gammas = []
    for seed in range(steps):
        x, target = batch(seed, part)
        if seed == poison:
            x[0, 0, 0, 0] = math.nan
        step(x, target)
        gammas.append(loss.current_gamma2().clone())
    kept = {f"model.{name}": t for name, t in net.state_dict().items()} | step.tensors()
    kept |= gradients(net)
    return {name: t.detach().clone() for name, t in kept.items()} | {"gammas": torch.stack(gammas)}


FAMILIES = {
    "wae-mmd": lambda world: WAEObjective(20.0, world=world),
    "info-vae": lambda world: InfoVAEObjective(20.0, make_loss("computed", accumulate=world.size > 1), world=world),
    "rae-gp": lambda world: GradientPenaltyObjective(0.1, 0.1),
    "vamp": lambda world: VampObjective(make_loss("computed", accumulate=world.size > 1)),
}


def trained_family(world, part, family):
    """State and model after three steps of a family, on a dense network."""
    c = dataclasses.replace(CONFIG, network="mlp", family=family, options={"pseudo_inputs": 3})
    torch.manual_seed(0)
    net = first_stage(c)
    if net.prior is not None:
        net.prior.begin(images(9).numpy(), 1)
    k = 0 if net.deterministic else 3
    step = Step(net, FAMILIES[family](world), Noise(ops.make_rng(7), part.start), k, False, world)
    step.set_lr(1e-3)
    for seed in range(3):
        step(*batch(seed, part))
    kept = {f"model.{name}": t for name, t in net.state_dict().items()} | step.tensors() | gradients(net)
    return {name: t.detach().clone() for name, t in kept.items()}


def scores(posterior, count, world=ALONE):
    first = score_images(model(), images(count), 0, world).figures
    torch.manual_seed(0)
    second = score_latents(second_stage(CONFIG), posterior, 0, world).figures
    return first | {f"second {name}": value for name, value in second.items()}


# ---- what each of the two ranks does --------------------------------------------------------------------------------


def rank_main(rank, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with World.join() as world:
            world.connect("cpu")
            results = computed(world)
            world.wait()
            raise UserError("what no rank can do")
    except (UserError, SystemExit) as error:
        results["ended"] = repr(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    while rank == 0 and not os.path.exists(f"{folder}/rank1.pt"):  # rank 0 keeps the store here, not torchrun
        time.sleep(0.01)


def computed(world):
    part = world.share(BATCH)
    results = {f"{norm} {b}": trained(world, part, b, norm) for norm in ("eval", "synchronised") for b in BALANCES}
    results |= {family: trained_family(world, part, family) for family in FAMILIES}
    results["per rank"] = trained(world, part, steps=1)
    results["poisoned"] = trained(world, part, poison=2 if world.rank == 1 else None)
    for count in (1, 21):
        posterior = encode_images(model(), images(count), world)
        results[f"posterior {count}"] = posterior._asdict()
        results[f"scores {count}"] = scores(posterior, count, world)
    return results | {"pieces": pieces(world)}


def pieces(world):
    r = float(world.rank + 1)
    strided = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last) * r
    scalar, strided = world.means([torch.tensor(r), strided])
    x = torch.tensor([r, 10 * r], requires_grad=True)
    gathered = gather(x)
    # A different function on each rank; the total is (1 + 2) * (sum of squares of all) as far as each x sees it.
    (r * gathered.square().sum()).backward()
    return {
        "scalar": scalar,
        "strided": strided,
        "channels_last": strided.is_contiguous(memory_format=torch.channels_last),
        "gathered": gathered.detach(),
        "gradient": x.grad,
        "largest": world.largest(3 * world.rank, -world.rank),
        "said": [world.from_first(f"{text} of {world.rank}") for text in "ab"],
        "again": world.remembered(),
        "share": world.share(7),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.spawn(rank_main, (str(folder), port), nprocs=2, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def close(a, b, rtol=2e-4, atol=2e-5):
    assert a.keys() == b.keys()
    for name, t in a.items():
        torch.testing.assert_close(t, b[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# ---- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("norm", ["eval", "synchronised"])
def test_two_ranks_of_half_a_batch_are_one_of_the_whole(ranks, norm, balance):
    """Gradients, gamma2, weights, Adam's moments, sums, batch-norm statistics: after three steps as on one rank."""
    alone = trained(ALONE, slice(0, BATCH), balance, "eval" if norm == "eval" else "batch")
    largest = max(t.abs().max() for name, t in alone.items() if name.startswith("grad."))
    close(ranks[0][f"{norm} {balance}"], alone, rtol=1e-3, atol=1e-5 * float(largest))
    assert not torch.equal(alone["gammas"][0], alone["gammas"][2]) or balance == "fixed"


def test_without_synchronisation_each_rank_normalises_alone(ranks):
    """Then, and only then, the gradient is the mean of those of the halves, each normalised by itself."""
    halves = [trained_half(part) for part in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH))]
    mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    close({name: ranks[0]["per rank"][name] for name in mean}, mean)
    whole = trained(ALONE, slice(0, BATCH), steps=1)
    assert not torch.allclose(whole["grad.encoder.conv0.weight"], mean["grad.encoder.conv0.weight"], rtol=1e-2)


def trained_half(part):
    """Gradients and statistics of half a batch, by itself."""
    net, loss, rng = model(), make_loss("computed"), ops.make_rng(7)
    x, target = batch(0, part)
    mu, log_sigma = net.encoder(x)
    z = mu + log_sigma.exp() * ops.philox_normal(rng, BATCH // 2, 3, first_sample=part.start)
    loss(net.decoder(z), target, mu, log_sigma).loss.backward()
    running = {f"model.{name}": t for name, t in net.state_dict().items() if "running" in name}
    return running | gradients(net)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_a_family_as_one_does(ranks, family):
    """An MMD is that of the whole batch's codes; a mean over the ranks' halves would be another."""
    alone = trained_family(ALONE, slice(0, BATCH), family)
    largest = max(t.abs().max() for name, t in alone.items() if name.startswith("grad."))
    close(ranks[0][family], alone, rtol=1e-3, atol=1e-5 * float(largest))


@pytest.mark.parametrize("what", [*(f"synchronised {b}" for b in BALANCES), *FAMILIES, "per rank", "poisoned"])
def test_all_ranks_hold_the_same_bits(ranks, what):
    a, b = ranks[0][what], ranks[1][what]
    assert [name for name in a if not torch.equal(a[name].nan_to_num(7), b[name].nan_to_num(7))] == []


def test_a_bad_step_on_one_rank_is_undone_on_all(ranks):
    good, poisoned = trained(ALONE, slice(0, BATCH), steps=2), ranks[0]["poisoned"]
    assert poisoned["sums.counts"].tolist() == [2, 1]
    assert next(t for name, t in poisoned.items() if name.startswith("adam.") and name.endswith(".step")) == 2
    assert torch.equal(poisoned["gammas"][1], poisoned["gammas"][2])
    assert poisoned["sums.parts"].isfinite().all()
    torch.testing.assert_close(poisoned["gammas"][1], good["gammas"][1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("count", [1, 21])
def test_a_shared_evaluation_is_that_of_one(ranks, count):
    """Also of fewer images than ranks."""
    posterior = encode_images(model(), images(count))
    for r in ranks:
        close(r[f"posterior {count}"], posterior._asdict(), rtol=1e-5, atol=1e-6)
        assert r[f"scores {count}"] == pytest.approx(scores(posterior, count), rel=1e-5)


@pytest.mark.parametrize("hflip", [False, True])
def test_parts_of_a_batch_make_up_the_batch(hflip):
    """In order and without overlap: images with their flips, and latents with their noise."""
    parts = [World(rank, 3).share(9) for rank in range(3)]
    assert parts == [slice(0, 3), slice(3, 6), slice(6, 9)]
    posterior = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1)).unbind()
    for make in (
        lambda part=None: ImageBatches(images(50), 9, 3, torch.float32, hflip, part),
        lambda part=None: LatentBatches(*posterior, 9, 3, part),
    ):
        whole = list(make().epoch(4, 1))
        split = [list(make(part).epoch(4, 1)) for part in parts]
        assert len(whole) == 4
        for i, (x, target) in enumerate(whole):
            assert torch.equal(x, torch.cat([mine[i][0] for mine in split]))
            assert torch.equal(target, torch.cat([mine[i][1] for mine in split]))


def test_pieces(ranks):
    for rank, r in enumerate(r["pieces"] for r in ranks):
        assert r["scalar"] == 1.5
        assert torch.equal(r["strided"], 1.5 * torch.arange(24.0).view(1, 2, 3, 4)) and r["channels_last"]
        assert r["gathered"].tolist() == [[1, 10], [2, 20]]
        assert r["gradient"].tolist() == [(1 + 2) * 2 * v for v in ([1, 10], [2, 20])[rank]]
        assert r["largest"] == [3, 0]
        assert r["said"] == ["a of 0", "b of 0"]
    assert [r["pieces"]["share"] for r in ranks] == [slice(0, 3), slice(3, 7)]


def test_one_rank_says_what_all_refuse(ranks):
    assert sorted(r["ended"] for r in ranks) == ["SystemExit(2)", "UserError('what no rank can do')"]


def test_alone_there_is_no_group_and_nothing_changes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World.join() as world:
        world.connect("cpu")
        assert not dist.is_initialized() and world.size == 1 and world.first
        t = torch.ones(3)
        assert world.mean_(t) is t and world.sum_(t) is t and world.largest(4) == [4]
        assert world.share(7) == slice(0, 7) and world.from_first("x") == "x" and world.remembered() is None


def test_a_world_without_its_address_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="use torchrun"):
        World.join()


def test_synchronised_statistics_of_one_rank_are_plain():
    """Means far above the spread: where a sum of squares would cancel."""
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0)) + 300
    plain, over_ranks = BatchNorm2d(4), BatchNorm2d(4)
    over_ranks.gather = lambda t: t[None]
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ya, yb = plain(a), over_ranks(b)
    torch.testing.assert_close(ya, yb, rtol=1e-3, atol=1e-3)
    for y in (ya, yb):
        (y * torch.linspace(0, 1, x.numel()).view_as(x)).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    for p, q in zip(plain.state_dict().values(), over_ranks.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_hanging_rank_is_given_up(monkeypatch):
    class Never:
        def record(self):
            pass

        def query(self):
            return False

    monkeypatch.setattr(torch.cuda, "Event", Never)
    monkeypatch.setattr("bvae.world.TIMEOUT", timedelta(seconds=0.05))
    ALONE.settle()
    world = World(1, 2)
    world.device = torch.device("cuda", 1)
    with pytest.raises(Lost, match="rank 1 waits"):
        world.settle()


class Itself(World):
    """A world of which NCCL's only rank is a part: the mean over the ranks is what each has."""

    def mean_(self, t):
        dist.all_reduce(t)
        return t


@pytest.mark.gpu
def test_a_step_with_an_exchange_is_recorded_in_a_graph(tmp_path):
    """One GPU shows that the code around it can be replayed. NCCL itself launches nothing for a mean over one rank."""
    device = torch.device("cuda", 0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        ends = []
        for recorded in (False, True):
            world = Itself(0, 2)
            world.device = device
            loss = make_loss("computed", accumulate=True).to(device)
            step = Step(model().to(device), VAEObjective(loss), Noise(ops.make_rng(7, device)), 3, False, world)
            step.set_lr(1e-3)
            batches = ImageBatches(images(50).to(device), BATCH, 0, torch.float32)
            batches.begin(0)
            runner = make_runner(batches, step, recorded)
            assert (runner.why_eager is None) == recorded, runner.why_eager
            done = 0
            while done < batches.steps:
                done += runner.run(batches.steps - done)
            ends.append({"gamma2": loss.gamma2, **step.tensors(), **step.model.state_dict()})
            del runner  # before the communicator, of which its graph holds what it replays
        close(*ends, rtol=1e-3, atol=1e-4)
    finally:
        dist.destroy_process_group()
