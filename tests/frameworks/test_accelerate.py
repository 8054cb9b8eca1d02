import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from snippets import blobs, classes, follow, run
from torch.utils.data import DataLoader


@pytest.fixture(autouse=True)
def fresh():
    """accelerate keeps its settings in singletons."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def loader(batches=8, batch=16):
    return DataLoader(blobs(batches * batch).flatten(1), batch_size=batch)


def test_the_snippet_moves_gamma2_once_per_optimizer_step(tmp_path):
    torch.manual_seed(0)
    names = run("accelerate", loader=loader(), folder=tmp_path)
    gamma2 = names["criterion"].gamma2
    assert 0.99**4 < gamma2 < 0.99**4 + 0.04 * 0.5  # four steps of two batches; the mse is far below 1/2
    assert gamma2.dtype == torch.float32
    assert names["loss"].loss.dtype == torch.float32

    names["model"] = None
    fresh = names["VAE"]()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(fresh)
    accelerator.load_state(tmp_path)
    assert accelerator.unwrap_model(prepared).criterion.gamma2 == gamma2


def test_accumulated_batches_are_the_undivided_batch():
    """Two parts of 16 and one batch of 32 from the same weights, without noise: the same gamma2 and gradient."""
    kind = classes("accelerate")["VAE"]

    class Noiseless(kind):
        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, dim=1)
            return self.criterion(self.decoder(mu), x, mu, logvar=logvar)

    found = []
    for parts in (1, 2):
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        accelerator = Accelerator(gradient_accumulation_steps=parts, cpu=True)
        model = Noiseless()
        model, batches = accelerator.prepare(model, loader(batches=2 * parts, batch=32 // parts))
        errors, whole = [], []
        for x in batches:
            with accelerator.accumulate(model):
                loss = model(x)
                accelerator.backward(loss.loss)
                errors.append(float(loss.mse))
                if accelerator.sync_gradients:
                    model.criterion.step()
                    whole.append(sum(errors[-parts:]) / parts)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((model.criterion.gamma2.item(), gradient))
        assert found[-1][0] == pytest.approx(follow(1.0, whole), rel=1e-6)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
