"""What a run would meet, found out in seconds: data, captions, towers, memory, disk, one step and its time.

Nothing is trained and nothing is written: the weights of the step are thrown away and no embeddings are stored.
"""

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from threetowers.config import RunConfig, replace_nested
from threetowers.data.decode import decode
from threetowers.data.loader import Batch, BatchReader
from threetowers.data.order import Order, hash64
from threetowers.data.source import Source
from threetowers.data.transforms import fixed_view
from threetowers.errors import BadSample, CheckpointError, DataError, NonFiniteError, UsageError
from threetowers.objective.pairs import objective
from threetowers.progress import duration
from threetowers.run.setup import Prepared, assemble, check_settings, describe_data, open_data
from threetowers.towers.frozen.load import FrozenTower
from threetowers.train.accumulate import accumulate, masked_ids
from threetowers.train.guards import differing_keys
from threetowers.train.optim import adamw

IMAGES = 200  # decoded
CAPTIONED = 20_000  # images whose captions are compared
TOKENIZED = 2_000  # captions whose length is looked at
CPU_BATCH = 64  # samples of the step on a CPU, where a large batch takes minutes
STEPS = 3  # the first one warms up


def validate(config: RunConfig, folder: Path) -> Iterator[str]:
    """The findings, line by line; the last one is `valid`. folder: where the run would be.

    Raises what training would raise: UsageError, DataError, CheckpointError, NonFiniteError.
    """
    check_settings(config)
    objective(config)
    if (folder / "config.toml").is_file() and differing_keys(folder / "config.toml", config):
        yield f"note: {folder} holds a run with other settings; train asks for another --out, or for --fresh"
    yield describe_data(config)
    train, val, test = open_data(config)
    yield from _images(config, train)
    run = assemble(config, folder)
    yield from _captions(run)
    yield from _towers(run)
    try:
        yield from _step(run)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"batch_size: {config.batch_size} does not fit into the memory of {run.device}; take a smaller batch, "
            "or precision bf16"
        ) from error
    yield from _disk(run, folder, len(train) + len(val) + len(test))
    yield "valid"


def _drawn(seed: int, count: int, most: int) -> list[int]:
    """At most `most` of the indices below count, the same ones for the same seed, in ascending order."""
    if count <= most:
        return list(range(count))
    return sorted({hash64("validate", seed, draw) % count for draw in range(most)})


def _images(config: RunConfig, source: Source) -> Iterator[str]:
    """Decodes a sample of the images; DataError when their bad share cannot be as small as is let pass."""
    indices = _drawn(config.seed, len(source), IMAGES)
    bad: list[BadSample] = []
    sizes: list[int] = []
    start = time.perf_counter()
    for index in indices:
        id = source.record(index).id
        try:
            image = decode(source.image(index), id, decoder=config.inputs.decoder)
            sizes.append(min(image.size))
        except BadSample as problem:
            bad.append(problem)
    rate = len(indices) / (time.perf_counter() - start)
    share, limit = len(bad) / len(indices), config.inputs.max_bad_share
    sides = f", shorter side {min(sizes)} to {max(sizes)} pixels" if sizes else ""
    yield (
        f"images: {len(indices)} of {len(source):,} decoded, {rate:,.0f} a second, {len(bad)} bad ({share:.1%})"
        + sides
    )
    yield from (f"  {problem}" for problem in bad[:10])
    if len(bad) > 10:
        yield f"  and {len(bad) - 10} more"
    if bad and binomtest(len(bad), len(indices), min(limit, 1.0), alternative="greater").pvalue < 0.01:
        reasons = Counter(problem.reason for problem in bad)
        listed = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        raise DataError(
            f"{source.name}: {len(bad)} of {len(indices)} images drawn cannot be used, more than inputs.max_bad_share "
            f"= {limit:g} allows. {listed}"
        )


def _captions(run: Prepared) -> Iterator[str]:
    """Some captions as the text tower sees them, and the shares that are cut or not unique."""
    source, tokenizer = run.train, run.tokenizer
    records = [source.record(index) for index in _drawn(run.config.seed, len(source), CAPTIONED)]
    captions = [caption for record in records for caption in record.captions]
    if not captions:
        raise DataError(f"{source.name}: none of {len(records)} images drawn has a caption")
    chosen = [captions[index] for index in _drawn(run.config.seed, len(captions), TOKENIZED)]
    tokens = tokenizer(chosen)
    lengths = tokenizer.lengths(tokens)
    yield (
        f"captions: {len(captions) / len(records):.1f} per image, {float(lengths.float().mean()):.1f} tokens on "
        f"average, {int(lengths.max())} at most of {tokens.shape[1]}"
    )
    for index in range(min(3, len(chosen))):
        yield f"  {chosen[index]!r} → {tokenizer.decode(tokens[index, : lengths[index]].tolist())!r}"
    cut = sum(tokenizer.is_cut(chosen)) / len(chosen)
    counts = Counter(captions)
    repeated = sum(count for count in counts.values() if count > 1) / len(captions)
    yield f"  {cut:.1%} are cut at the context length, {repeated:.1%} occur more than once"
    if repeated > 0.1 and not run.config.inputs.mask_duplicates:
        yield "  note: equal captions count as each other's negatives, but not with --inputs.mask-duplicates True"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _amount(size: float) -> str:
    """Bytes for people: 7.2 kB, 12.3 MB, 4.56 GB."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _towers(run: Prepared) -> Iterator[str]:
    """Shapes and parameters of every tower, and what they take of the device's memory."""
    model = run.model
    if model.img is not None:
        size = model.spec.size
        yield f"img: 3 × {size} × {size} → {model.embed_dim}, {_size(model.img) / 1e6:.2f} M parameters"
    context = int(run.architecture.model_cfg["text_cfg"].get("context_length", 77))
    yield f"txt: {context} tokens → {model.embed_dim}, {_size(model.txt) / 1e6:.2f} M parameters"
    for view, tower in run.thirds.items():
        taken = "tokens"
        if isinstance(tower, FrozenTower):
            taken = f"3 × {tower.image.size} × {tower.image.size}"
        yield (
            f"{view}: {taken} → {tower.width}, {_size(tower.module) / 1e6:.2f} M parameters, frozen: {tower.spec}"
        )
    for view, layer in model.heads.items():
        yield f"head {view}: {_size(layer) / 1e6:.3f} M parameters"
    rows = ", ".join(f"{row.name} × {row.weight:.3g}" for row in model.objective.rows)
    yield f"rows of {run.config.method}: {rows}"
    weights, trained = _bytes(dict(model.named_parameters())), _trained_bytes(model)
    frozen = sum(_bytes(dict(tower.module.named_parameters())) for tower in run.thirds.values())
    total = weights + 3 * trained + frozen
    yield (
        f"memory: parameters {_amount(weights)}, gradients {_amount(trained)}, moments {_amount(2 * trained)}, "
        f"frozen towers {_amount(frozen)}: {_amount(total)} before activations"
    )


def _trained_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def _step(run: Prepared) -> Iterator[str]:
    """Steps on one real batch; NonFiniteError when a row's loss or the gradient is not finite."""
    config, model, live = run.config, run.model, run.live()
    num = config.batch_size if run.device.type == "cuda" else min(config.batch_size, CPU_BATCH)
    batch, data_seconds = _batch(run, num)
    thirds, embed_seconds = _third_features(run, batch)
    batch = replace(batch, third_features=thirds, third_pixels={})
    run = replace(
        run, config=replace_nested(config, {"inputs": {"third_view": "fixed"}})
    )  # they are there now
    torch.manual_seed(config.seed)
    optimizer = adamw(model, config.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    seconds = math.inf
    for step in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        if 0 < config.micro_batch_size < num:
            loss, rows, _ = accumulate(run, batch)
        else:
            loss, rows = model.loss(run.features(batch), masked_ids(run, batch))
            loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm or math.inf))
        if step == 0:
            yield _first_step(loss, rows, norm, num, config.batch_size)
        optimizer.step()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        if step:
            seconds = min(seconds, time.perf_counter() - start)
    if run.device.type == "cuda":
        yield f"memory at the step: {_amount(torch.cuda.max_memory_allocated(run.device))}"
    stored = 0.0 if live or not thirds else embed_seconds / num * len(run.train)
    yield _time(config, (seconds + (embed_seconds if live else 0.0)) / num, data_seconds / num, stored)


def _first_step(loss: Tensor, rows: Mapping[str, Tensor], norm: float, num: int, batch_size: int) -> str:
    values = {name: value.item() for name, value in rows.items()}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong or not math.isfinite(norm):
        raise NonFiniteError(
            f"the first step is not finite: {shown}, gradient norm {norm:g}. Look at "
            f"{'the rows ' + ', '.join(wrong) if wrong else 'objective.init_scale'}, at given weights, or take fp32"
        )
    some = f" ({num} of its {batch_size:,} samples)" if num < batch_size else ""
    return f"step{some}: loss {loss.item():.3f} ({shown}), gradient norm {norm:.3g}"


def _batch(run: Prepared, num: int) -> tuple[Batch, float]:
    """The first samples of the run on the device, and the seconds that a training step would wait for them."""
    live = {view: tower.image for view, tower in run.thirds.items() if isinstance(tower, FrozenTower)}
    reader = BatchReader(
        run.train,
        Order(run.config.seed, len(run.train), run.config.batch_size),
        run.tokenizer,
        run.config.inputs,
        image=run.model.spec,
        live=live if run.live() else {},
    )
    start = time.perf_counter()
    batch = reader[range(num)]
    seconds = time.perf_counter() - start
    return batch.to(run.device), seconds if run.model.needs_pixels() or run.live() else 0.0


def _third_features(run: Prepared, batch: Batch) -> tuple[dict[str, Tensor], float]:
    """The frozen features of a batch, whose norms the model is given, and the seconds that they took."""
    features: dict[str, Tensor] = {}
    start = time.perf_counter()
    for view in run.model.thirds:
        tower = run.thirds[view]
        records = [run.train.record(int(index)) for index in batch.index]
        if not isinstance(tower, FrozenTower):
            features[view] = tower(tower.tokenizer([r.captions[0] for r in records]).to(run.device))
        elif view in batch.third_pixels:
            features[view] = tower(batch.third_pixels[view])
        else:
            indices = batch.index.tolist()
            images = [decode(run.train.image(i), r.id) for i, r in zip(indices, records, strict=True)]
            pixels = np.stack([fixed_view(image, tower.image) for image in images])
            features[view] = tower(torch.from_numpy(pixels).to(run.device))
        mean_square = float(features[view].square().sum(1).mean())
        if not math.isfinite(mean_square):
            raise NonFiniteError(
                f"{tower.spec}: its features are not finite; take third_precision fp32, or another tower"
            )
        run.model.set_third_norm(view, mean_square)
    return features, time.perf_counter() - start


def _time(config: RunConfig, step: float, data: float, stored: float) -> str:
    """The time of the whole run, by the seconds that a sample takes in a step and in the loader.

    stored: seconds to embed the training images once.
    """
    workers = config.inputs.workers
    each = config.batch_size * (max(step, data / workers) if workers else step + data)
    embedding = f" and {duration(stored)} to embed all images once" if stored else ""
    return (
        f"time: {step * config.batch_size:.3f} s a step and {data * config.batch_size:.3f} s to read its batch in one "
        f"process ({workers} workers): about {duration(each * config.steps)} for {config.steps:,} steps{embedding}"
    )


def _disk(run: Prepared, folder: Path, num_images: int) -> Iterator[str]:
    """What checkpoints, model and stored embeddings take; CheckpointError when the disk cannot hold them."""
    model = _bytes(run.model.state_dict())
    checkpoint = model + 2 * _trained_bytes(run.model)
    kept = run.config.keep_checkpoints + 1  # an old one goes only when the new one is there
    stores = 0
    if not run.live():
        stores = sum(2 * num_images * run.thirds[view].width for view in run.model.thirds)
    needed = kept * checkpoint + model + stores
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    yield (
        f"disk: {kept} checkpoints × {_amount(checkpoint)}, model {_amount(model)}, stored embeddings "
        f"{_amount(stores)}: {_amount(needed)} of {_amount(free)} free"
    )
    if needed > free:
        raise CheckpointError(
            f"{there}: the run needs {_amount(needed)}, and {_amount(free)} are free; make room, lower "
            "keep_checkpoints, or give --out and --embeddings on another disk"
        )
