"""A check of a run in seconds: data, captions, towers, memory, disk, one step and its time.

Nothing is trained and nothing is written: the weights of the step are thrown away and no embeddings are stored.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from threetowers.commands.arguments import ValidateArguments
from threetowers.config import RunConfig
from threetowers.data.decode import decode
from threetowers.data.loader import Batch, BatchReader
from threetowers.data.order import Order, hash64
from threetowers.data.overlap import describe_near_copies, describe_overlap, near_copies
from threetowers.data.repeats import describe_repeats
from threetowers.data.source import Source
from threetowers.data.transforms import fixed_view
from threetowers.errors import BadSample, DataError, NonFiniteError, UsageError
from threetowers.evaluate.evaluation import check_evaluation
from threetowers.objective.pairs import objective
from threetowers.progress import Detail, duration
from threetowers.run.setup import Setup, assemble, check_settings, describe_data, open_data
from threetowers.system import PeakMemory
from threetowers.train.guards import differing_keys
from threetowers.train.optim import describe_groups
from threetowers.train.room import amount, check_room, num_bytes, room, trained_bytes
from threetowers.train.step import StepResult, TrainingStep
from threetowers.train.together import check_divisible
from threetowers.train.trackers import check_trackers

IMAGES, MOST_IMAGES = 200, 2_000  # decoded: so many in any case, and up to so many within the time
IMAGE_SECONDS = 5.0
CAPTIONED = 20_000  # images whose captions are compared
TOKENIZED = 2_000  # captions whose length is looked at
CPU_BATCH = 64  # samples of the step on a CPU, where a large batch takes minutes
STEPS, MOST_STEPS = 3, 12  # at least and at most; the first one warms up
STEP_SECONDS = 1.5  # of steps that are measured
EMBEDDED = 256  # images that go through a frozen tower at once while they are stored


def validate(config: RunConfig, folder: Path, *, near: bool = False, processes: int = 1) -> Iterator[str]:
    """The findings, line by line; the last one is `valid`, and those that few readers need are of type `Detail`.

    folder: where the run would be. near: decode every image, and look for test images that are nearly equal to training
    images. processes: which are to share a batch.

    Raises what training would raise: UsageError, DataError, CheckpointError, NonFiniteError.
    """
    check_settings(config)
    check_trackers(config.trackers)
    objective(config)
    check_divisible(config, processes)
    if (folder / "config.toml").is_file() and differing_keys(folder / "config.toml", config):
        yield f"note: {folder} holds a run with other settings; train asks for another --out, or for --fresh"
    if config.optim.warmup_steps >= config.steps:
        yield (
            f"note: the warm-up of {config.optim.warmup_steps} steps takes the whole run, so the learning rate never "
            "falls; lower --optim.warmup-steps"
        )
    yield describe_data(config)
    train, val, test = open_data(config)
    yield from check_evaluation(config)
    yield from _images(config, [train, val, test], every=near)
    setup = assemble(config, folder)
    yield from _captions(setup)
    yield from describe_repeats("validation", val)
    yield from describe_repeats("test", test)
    yield from describe_overlap(train, test)
    if near:
        yield from describe_near_copies(near_copies(train, test), len(test))
    yield from _towers(setup)
    try:
        needs = yield from _step(setup)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"batch_size: {config.batch_size} does not fit into the memory of {setup.device}; take a smaller batch, "
            "or precision bf16-autocast"
        ) from error
    needs.append((yield from _disk(setup, folder)))
    yield f"needs: {', '.join(needs)}"
    yield "valid"


def show_findings(arguments: ValidateArguments, folder: Path) -> None:
    """Prints the findings about the run that the arguments describe; details only where they ask for them."""
    for line in validate(arguments.run, folder, near=arguments.near_copies, processes=arguments.processes):
        if arguments.details or not isinstance(line, Detail):
            print(line, flush=True)


def _drawn(seed: int, count: int, most: int) -> list[int]:
    """At most `most` of the indices below count, the same ones for the same seed, in ascending order."""
    if count <= most:
        return list(range(count))
    return sorted({hash64("validate", seed, draw) % count for draw in range(most)})


def _place(parts: Sequence[Source], number: int) -> tuple[Source, int]:
    """The part that holds a sample, and its index there, by its number among the samples of all parts."""
    for part in parts[:-1]:
        if number < len(part):
            return part, number
        number -= len(part)
    return parts[-1], number


def _images(config: RunConfig, parts: Sequence[Source], *, every: bool = False) -> Iterator[str]:
    """Decodes images, or every one; DataError when the share of bad ones is significantly above the limit."""
    total = sum(map(len, parts))
    drawn = _drawn(config.seed, total, total if every else MOST_IMAGES)
    drawn.sort(key=lambda number: hash64("order", config.seed, number))  # the first ones are a sample too
    places: list[tuple[Source, int]] = []
    bad: list[BadSample] = []
    sizes: list[int] = []
    start = time.perf_counter()
    for number in drawn:
        if len(places) >= IMAGES and not every and time.perf_counter() - start > IMAGE_SECONDS:
            break
        source, index = _place(parts, number)
        places.append((source, index))
        id = source.record(index).id
        try:
            image = decode(source.image(index), id, decoder=config.inputs.decoder)
            sizes.append(min(image.size))
        except BadSample as problem:
            bad.append(problem)
    rate = len(places) / (time.perf_counter() - start)
    share, limit = len(bad) / len(places), config.inputs.max_bad_share
    sides = ""
    if sizes:
        least, most = min(sizes), max(sizes)
        sides = f", shorter side {least}{f' to {most}' if most > least else ''} pixels"
    yield (
        f"images: {len(places)} of {total:,} decoded, {rate:,.0f} a second, {len(bad)} bad ({share:.1%})"
        + sides
    )
    yield from (f"  {problem}" for problem in bad[:10])
    if len(bad) > 10:
        yield f"  and {len(bad) - 10} more"
    if bad and binomtest(len(bad), len(places), min(limit, 1.0), alternative="greater").pvalue < 0.01:
        reasons = Counter(problem.reason for problem in bad)
        listed = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        raise DataError(
            f"{parts[0].name}: {len(bad)} of {len(places)} images drawn cannot be used, more than inputs.max_bad_share "
            f"= {limit:g} allows. {listed}"
        )


def _captions(setup: Setup) -> Iterator[str]:
    """Some captions as the text tower sees them, and the shares that are cut or not unique."""
    source, tokenizer = setup.train, setup.tokenizer
    records = [source.record(index) for index in _drawn(setup.config.seed, len(source), CAPTIONED)]
    captions = [caption for record in records for caption in record.captions]
    if not captions:
        raise DataError(f"{source.name}: none of {len(records)} images drawn has a caption")
    chosen = [captions[index] for index in _drawn(setup.config.seed, len(captions), TOKENIZED)]
    tokens = tokenizer(chosen)
    lengths = tokenizer.lengths(tokens)
    yield (
        f"captions: {len(captions) / len(records):.1f} per image, {float(lengths.float().mean()):.1f} tokens on "
        f"average and {int(lengths.max())} at most; the text tower reads {tokens.shape[1]}"
    )
    for index in range(min(3, len(chosen))):
        yield Detail(f"  {chosen[index]!r} → {tokenizer.decode(tokens[index, : lengths[index]].tolist())!r}")
    cut = sum(tokenizer.is_cut(chosen)) / len(chosen)
    counts = Counter(captions)
    repeated = sum(count for count in counts.values() if count > 1) / len(captions)
    shares = f"  {cut:.1%} are cut at the context length, {repeated:.1%} occur more than once"
    yield shares if cut or repeated else Detail(shares)
    if repeated > 0.1 and not setup.config.inputs.mask_duplicates:
        yield (
            "  note: training holds an image and the equal caption of another one for a wrong pair; "
            "--inputs.mask-duplicates True leaves such pairs out"
        )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _towers(setup: Setup) -> Iterator[str]:
    """Shapes and parameters of every tower, and what they take of the device's memory."""
    model = setup.model
    if model.img is not None:
        size = model.image.size
        yield Detail(
            f"img: 3 × {size} × {size} → {model.embed_dim}, {_size(model.img) / 1e6:.2f} M parameters"
        )
    context = int(setup.architecture.model_cfg["text_cfg"].get("context_length", 77))
    yield Detail(f"txt: {context} tokens → {model.embed_dim}, {_size(model.txt) / 1e6:.2f} M parameters")
    for view, tower in setup.thirds.towers.items():
        taken = "tokens"
        if tower.reads == "images":
            taken = f"3 × {tower.image.size} × {tower.image.size}"
        yield Detail(
            f"{view}: {taken} → {tower.width}, {_size(tower.module) / 1e6:.2f} M parameters, frozen: {tower.spec}"
        )
    for view, layer in model.heads.items():
        yield Detail(f"head {view}: {_size(layer) / 1e6:.3f} M parameters")
    yield Detail(f"rows of {setup.config.method}: {model.objective.weighting()}")
    schedule, steps = model.objective.schedule, setup.config.steps
    if schedule is not None and schedule.last > steps:
        yield (
            f"note: the run ends at step {steps:,}, before the schedule of the weights does; see "
            "--objective.weights-steps"
        )
    weights, trained = num_bytes(dict(model.named_parameters())), trained_bytes(setup)
    frozen = sum(num_bytes(dict(tower.module.named_parameters())) for tower in setup.thirds.towers.values())
    total = weights + 3 * trained + frozen
    yield Detail(
        f"memory: parameters {amount(weights)}, gradients {amount(trained)}, moments {amount(2 * trained)}, "
        f"frozen towers {amount(frozen)}: {amount(total)} before activations"
    )


def _step(setup: Setup) -> Generator[str, None, list[str]]:
    """Training steps on one real batch, from which it returns what the run needs: time, and memory where it is known.

    Raises NonFiniteError when a row's loss or the gradient is not finite.
    """
    config, live = setup.config, bool(setup.thirds.live)
    num = config.batch_size if setup.device.type == "cuda" else min(config.batch_size, CPU_BATCH)
    batch, data_seconds = _batch(setup, num)
    features, embedding = _third_features(setup, batch)
    batch = replace(batch, third_features=features, third_pixels={})
    torch.manual_seed(config.seed)
    take_step = TrainingStep(config, setup.model, setup.device, lambda batch: batch.third_features)
    for group in describe_groups(take_step.optimizer, config.optim.lr):
        yield Detail(
            f"trains: {group['numbers']:,} numbers of {_names(group['parameters'])}, learning rate {group['lr']:g}, "
            f"weight decay {group['weight_decay']:g}"
            + (f", from step {group['from_step']:,}" if group["from_step"] else "")
        )
    times: list[float] = []
    memory = PeakMemory()
    while len(times) < STEPS or (sum(times[1:]) < STEP_SECONDS and len(times) < MOST_STEPS):
        start = time.perf_counter()
        result = take_step(batch, config.optim.lr)
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            yield Detail(_first_step(result, num, config.batch_size))
    step = statistics.median(times[1:]) / num
    if live:
        step += sum(each.forward for each in embedding)
    stored_seconds = 0.0 if live else sum(map(partial(_all_images, setup), embedding))
    needs = [_time(setup, step, data_seconds / num, stored_seconds)]
    yield Detail(
        f"time: {step * config.batch_size:.3f} s a step and {data_seconds / num * config.batch_size:.3f} s to read its "
        f"batch in one process ({config.inputs.workers} workers); starting, saving, zero-shot and what else this "
        "machine does are left out"
    )
    if setup.device.type == "cuda":
        needs.append(f"{amount(torch.cuda.max_memory_allocated(setup.device))} of the GPU's memory at a step")
    elif memory.known:
        at_once = min(config.micro_batch_size or config.batch_size, config.batch_size)
        whole = memory.peak(at_once / min(num, at_once))
        stored = 0 if live else max((each.memory for each in embedding), default=0)
        needs.append(f"{amount(whole)} of memory at a step")
        if stored > whole:
            needs.append(f"{amount(stored)} while embedding")
    return needs


def _names(parameters: Sequence[str]) -> str:
    """A few words for the names of parameters: the first, and how many more."""
    more = len(parameters) - 1
    return parameters[0] + (f" and {more} more" if more else "")


def _all_images(setup: Setup, each: "_Embedding") -> float:
    """Seconds to store a tower's features of all data once."""
    workers = setup.config.inputs.workers
    one = max(each.forward, each.read / workers) if workers else each.forward + each.read
    views = max(setup.thirds.views.num, 1) if each.read else 1  # of training images; the others have one
    return one * (len(setup.train) * views + len(setup.val) + len(setup.test))


@dataclass(frozen=True)
class _Embedding:
    """What storing a tower's features takes: seconds of a sample to read it and in the tower; bytes at its batches."""

    read: float
    forward: float
    memory: int


def _first_step(result: StepResult, num: int, batch_size: int) -> str:
    norm = result.norm.item()
    values = {name: value.item() for name, value in result.rows.items()}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong or not math.isfinite(norm):
        raise NonFiniteError(
            f"the first step is not finite: {shown}, gradient norm {norm:g}. Look at "
            f"{'the rows ' + ', '.join(wrong) if wrong else 'objective.init_scale'}, at given weights, or take fp32"
        )
    some = f" ({num} of its {batch_size:,} samples)" if num < batch_size else ""
    return f"step{some}: loss {result.loss.item():.3f} ({shown}), gradient norm {norm:.3g}"


def _batch(setup: Setup, num: int) -> tuple[Batch, float]:
    """The first samples of the run on the device, and the seconds that a training step would wait for them."""
    reader = BatchReader(
        setup.train,
        Order(setup.config.seed, len(setup.train), setup.config.batch_size),
        setup.tokenizer,
        setup.config.inputs,
        image=setup.model.image,
        live=setup.thirds.live_images(),
    )
    start = time.perf_counter()
    batch = reader[range(num)]
    seconds = time.perf_counter() - start
    return batch.to(setup.device), seconds if setup.model.needs_pixels() or setup.thirds.live else 0.0


def _third_features(setup: Setup, batch: Batch) -> tuple[dict[str, Tensor], list[_Embedding]]:
    """The frozen features of a batch, and what they took; sets their norms in the model."""
    features: dict[str, Tensor] = {}
    embedding: list[_Embedding] = []
    records = [setup.train.record(index) for index in batch.index.tolist()]
    for view in setup.thirds.used:
        tower = setup.thirds.towers[view]
        start = time.perf_counter()
        if view in batch.third_pixels:
            inputs = batch.third_pixels[view]
        elif tower.reads == "texts":
            inputs = tower.tokenizer([record.captions[0] for record in records])
        else:
            files = [setup.train.image(index) for index in batch.index.tolist()]
            images = [decode(file, record.id) for file, record in zip(files, records, strict=True)]
            inputs = torch.from_numpy(np.stack([fixed_view(image, tower.image) for image in images]))
        read = time.perf_counter() - start if tower.reads == "images" else 0.0
        memory, num = PeakMemory(), len(batch.index)
        forward = math.inf
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            features[view] = tower(inputs.to(setup.device))
            mean_square = float(features[view].square().sum(1).mean())  # waits for the device
            forward = min(forward, time.perf_counter() - start)
        each = statistics.mean(len(record.captions) for record in records) if tower.reads == "texts" else 1
        embedding.append(_Embedding(read / num, forward / num * each, memory.peak(max(EMBEDDED / num, 1.0))))
        if not math.isfinite(mean_square):
            raise NonFiniteError(
                f"{tower.spec}: its features are not finite; take third_precision fp32, or another tower"
            )
        setup.model.set_third_norm(view, mean_square)
    return features, embedding


def _time(setup: Setup, step: float, data: float, stored: float) -> str:
    """The time of the whole run in words, by the seconds that a sample takes in a step and in the loader.

    stored: seconds to embed all images once.
    """
    config = setup.config
    workers = config.inputs.workers
    each = config.batch_size * (max(step, data / workers) if workers else step + data)
    validations = 1 + (config.steps // config.eval_every_steps if config.eval_every_steps else 1)
    seen = len(setup.val) * validations + len(setup.test)
    forward = step / 3  # a step's backward pass takes about twice as long as the forward pass
    evaluation = seen * (max(forward, data / workers) if workers else forward + data)
    embedding = f"{duration(stored)} to embed all images once, " if stored else ""
    return (
        f"about {duration(each * config.steps)} for {config.steps:,} steps, {embedding}{duration(evaluation)} to "
        "evaluate"
    )


def _disk(setup: Setup, folder: Path) -> Generator[str, None, str]:
    """What checkpoints, model and stored embeddings take, of which it returns the sum in words.

    Raises CheckpointError when the disk cannot hold them.
    """
    needs = room(setup)
    kept = setup.config.keep_checkpoints + 1  # an old one goes only when the new one is there
    needed = kept * needs.checkpoint + needs.model + needs.stores
    free = check_room(folder, needed)
    yield Detail(
        f"disk: {kept} checkpoints × {amount(needs.checkpoint)}, model {amount(needs.model)}, stored embeddings "
        f"{amount(needs.stores)}"
    )
    return f"{amount(needed)} of disk ({amount(free)} free)"
