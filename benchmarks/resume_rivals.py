"""The rivals of resume.py: one small image-text pair under Hugging Face's Trainer and under Lightning.

Both are as installed, and get the settings that their documents give for an exact resume.
"""

import importlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from transformers.trainer_utils import get_last_checkpoint

BATCH, EPOCHS, SAVE_EVERY = 16, 3, 2
TOKENS, SEED, LR = 24, 0, 1e-3
RESUMED = "resumed.txt"
"""File in a run folder with the step that its last process started from."""


@dataclass(frozen=True)
class Cell:
    """One set-up of the matrix."""

    epoch: int
    workers: int
    augmented: bool
    accumulation: int

    def __str__(self) -> str:
        return (
            f"{self.epoch:<6}{self.workers:<8}{'yes' if self.augmented else 'no':<8}{self.accumulation:<10}"
        )

    def setup(self) -> str:
        """A name for all but the moment of death."""
        return f"whole-{self.workers}-{self.augmented}-{self.accumulation}"


class Pictures(Dataset[dict[str, Tensor]]):
    """The table as most users would read it: pictures in memory, random transforms from the global generator."""

    def __init__(self, table: Path, augmented: bool) -> None:
        rows = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()[1:]]
        self.images = [v2.functional.pil_to_tensor(Image.open(table.parent / name)) for name, _ in rows]
        self.captions = [torch.tensor(list(caption.ljust(TOKENS).encode())) for _, caption in rows]
        crop = v2.RandomResizedCrop(32, scale=(0.4, 1.0)) if augmented else v2.Resize((32, 32))
        flip = [v2.RandomHorizontalFlip()] if augmented else []
        self.transform = v2.Compose([crop, *flip, v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.transform(self.images[index]), "tokens": self.captions[index]}


class StatefulPictures(Pictures):
    """Hands its process's random state to the stateful loader, which asks each worker for it."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["torch"])


class SeededPictures(Pictures):
    """Draws from a seed of the epoch and the sample, whatever was drawn before."""

    epoch = 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED + 1_000_000 * self.epoch + index)
            return super().__getitem__(index)


class TwoTowers(nn.Module):
    """The rivals' image-text pair, with dropout; kills its process in the given forward pass, counted from 1."""

    def __init__(self, deadly: int | None = None) -> None:
        super().__init__()
        self.calls, self.deadly = 0, deadly
        patches = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.GELU(), nn.Flatten())
        self.image = nn.Sequential(patches, nn.Dropout(0.2), nn.Linear(32 * 16, 24))
        self.text = nn.Sequential(
            nn.Embedding(256, 32), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * TOKENS, 24)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        image, text = (nn.functional.normalize(z, dim=-1) for z in (self.image(pixels), self.text(tokens)))
        logits = self.log_scale.exp() * image @ text.T
        labels = torch.arange(len(logits))
        cross_entropy = nn.functional.cross_entropy
        return {"loss": (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2}


def deadly_call(cell: Cell, death: int | None) -> int | None:
    """The forward pass to die in: the last of the step after `death` steps."""
    return None if death is None else (death + 1) * cell.accumulation


class HFHooks(transformers.TrainerCallback):  # type: ignore[misc]
    """Writes down the step that Hugging Face's Trainer starts from, and tells the pictures their epoch."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        Path(args.output_dir, RESUMED).write_text(str(state.global_step))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate calls a dataset's set_epoch, but not in the epoch that is resumed
        if isinstance(self.pictures, SeededPictures):
            self.pictures.epoch = int(state.epoch)


def train_hf(cell: Cell, table: Path, folder: Path, death: int | None, *, seeded: bool = False) -> None:
    """Hugging Face's Trainer, with the settings that its documents give under resuming and reproducibility."""
    pictures = (SeededPictures if seeded else Pictures)(table, cell.augmented)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH // cell.accumulation,
        gradient_accumulation_steps=cell.accumulation,
        learning_rate=LR,
        dataloader_num_workers=cell.workers,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        seed=SEED,
        data_seed=SEED,
        full_determinism=True,
        ignore_data_skip=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model_init=lambda: TwoTowers(deadly_call(cell, death)),
        args=arguments,
        train_dataset=pictures,
        callbacks=[HFHooks(pictures)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) is not None)
    save_file(trainer.model.state_dict(), folder / "model.safetensors")


class LightningPair(lightning.LightningModule):
    """The pair as a LightningModule; writes down the step that it starts from."""

    def __init__(self, deadly: int | None, note: Path) -> None:
        super().__init__()
        self.pair, self.note = TwoTowers(deadly), note

    def on_train_start(self) -> None:
        self.note.write_text(str(self.global_step))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return torch.as_tensor(self.pair(**batch)["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR)


class RandomStates(lightning.Callback):
    """Keeps the random state of the main process in Lightning's checkpoints."""

    restored: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.restored = state_dict["torch"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # the loader has drawn its seeds and not fetched yet; on_train_epoch_start is not called inside an epoch
        if self.restored is not None:
            torch.set_rng_state(self.restored)
            self.restored = None


def train_lightning(
    cell: Cell,
    table: Path,
    folder: Path,
    death: int | None,
    *,
    stateful: bool = False,
    states: bool = False,
) -> None:
    lightning.seed_everything(SEED, workers=True)
    pictures = (StatefulPictures if states else Pictures)(table, cell.augmented)
    batch_size = BATCH // cell.accumulation
    make: Any = DataLoader
    if stateful:
        make = importlib.import_module("torchdata.stateful_dataloader").StatefulDataLoader
    loader = make(pictures, batch_size=batch_size, shuffle=True, num_workers=cell.workers)
    model = LightningPair(deadly_call(cell, death), folder / RESUMED)
    saves = ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY, save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        accumulate_grad_batches=cell.accumulation,
        deterministic=True,
        callbacks=[saves, RandomStates()] if states else [saves],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, ckpt_path="last")
    save_file(model.pair.state_dict(), folder / "model.safetensors")
