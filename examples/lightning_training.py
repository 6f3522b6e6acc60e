"""Train a network with Lightning on patches of a dataset with masks; a stopped run continues where it was.

Usage: lightning_training.py DATASET [--checkpoints FOLDER] [--patch N] [--epochs N] [--steps N] …
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, callbacks
from torch.utils.data import DataLoader

import beam_nifti as bn

NUMBERS = {"patch": 96, "epochs": 2, "steps": -1, "batch-size": 2, "workers": 2, "devices": 1}


class Batches:
    """The batches of one process, epoch after epoch. Lightning keeps their state in its checkpoints."""

    def __init__(self, patches: bn.PatchDataset, options: Namespace, rank: int, num_ranks: int) -> None:
        self.patches, self.size, self.workers = patches, options.batch_size, options.workers
        self.rank, self.num_ranks, self.step = rank, num_ranks, 0  # step: of the batches of all epochs

    def __len__(self) -> int:
        return len(self.patches) // self.num_ranks // self.size

    def __iter__(self) -> Iterator[dict]:
        (epoch, done), count = divmod(self.step, len(self)), len(self) * self.num_ranks * self.size
        order = torch.randperm(len(self.patches), generator=torch.Generator().manual_seed(epoch))[:count]
        steps = order.reshape(len(self), -1)[done:, self.rank :: self.num_ranks].tolist()
        for batch in DataLoader(self.patches.epoch(epoch), batch_sampler=steps, num_workers=self.workers):
            self.step += 1
            yield batch

    def state_dict(self) -> dict:
        run = [self.patches.records.digest, repr(self.patches.patches), self.size, self.num_ranks]
        return {"step": self.step, "run": run}

    def load_state_dict(self, state: dict) -> None:
        if state["run"] != self.state_dict()["run"]:
            raise ValueError("the checkpoint is of another dataset, patch, batch size or number of devices")
        self.step = state["step"]


class Data(LightningDataModule):
    def __init__(self, options: Namespace) -> None:
        super().__init__()
        self.records = bn.Dataset(options.dataset, columns=["image", "mask", "id"], channels_first=True)
        drawn = bn.Patches((options.patch,) * 3, per_volume=4, foreground=0.5)
        self.patches, self.options = bn.PatchDataset(self.records, drawn, seed=0), options

    def train_dataloader(self) -> Batches:
        return Batches(self.patches, self.options, self.trainer.global_rank, self.trainer.world_size)


class Network(LightningModule):
    def __init__(self, labels: int) -> None:
        super().__init__()
        self.layers = torch.nn.Conv3d(1, labels, kernel_size=5, padding=2)

    def training_step(self, batch: dict, number: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.layers(batch["image"]), batch["mask"][:, 0].long())
        place = f"process {self.global_rank}, epoch {self.current_epoch}, batch {number}"
        print(f"{place}: {', '.join(batch['id'])}: loss {loss:.6f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


if __name__ == "__main__":
    parser = ArgumentParser(description="Train a network with Lightning on patches of a dataset.")
    parser.add_argument("dataset", help="folder or URL")
    parser.add_argument(
        "--checkpoints", default="checkpoints", help="folder to save to, and to continue from"
    )
    for name, number in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    keep = callbacks.ModelCheckpoint(options.checkpoints, save_last=True, every_n_train_steps=1)
    ends = {"max_epochs": options.epochs, "max_steps": options.steps}
    trainer = Trainer(devices=options.devices, callbacks=[keep], logger=False, **ends)
    data = Data(options)
    trainer.fit(Network(max(data.records.info.mask_labels) + 1), data, ckpt_path="last")
