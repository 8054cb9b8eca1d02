"""One rank of a Lightning job under torchrun: trains without noise and writes gamma2 as rank 0 and this rank see it.

python lightning_job.py OUT BATCH PARTS STEPS
"""

import json
import os
import sys
from pathlib import Path

import lightning
import torch
from snippets import blobs, classes
from torch.utils.data import DataLoader

LitVAE = classes("Lightning")["LitVAE"]


class Noiseless(LitVAE):
    """On every rank the reconstruction depends on the images alone."""

    def training_step(self, x, index):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return self.criterion(self.decoder(mu), x, mu, logvar=logvar).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)  # Adam's first steps make much of roundings


def main(out, batch, parts, steps):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=parts,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Noiseless()
    trainer.fit(model, DataLoader(blobs(steps * 32).flatten(1), batch_size=batch))
    rank = int(os.environ.get("RANK", 0))
    Path(out, f"{rank}.json").write_text(json.dumps(model.criterion.gamma2.item()))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
