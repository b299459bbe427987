"""A run, described: frozen dataclasses with every setting and its default. `settings.py` reads and writes them."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from threetowers.errors import UsageError

Method = Literal[
    "baseline", "lit", "lit-unlocked", "3t", "3t-main", "3t-regression", "3t-warm", "3t-main-warm"
]
Scalar = str | bool | int | float


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """The two main towers, an open_clip model by name or by its inline configuration."""

    model: str | None = None
    """An open_clip model name such as ViT-B-32; `none` when vision and text are given here."""
    embed_dim: int = 128
    """Width D of the shared space; a named model brings its own."""
    vision: dict[str, Scalar] = field(default_factory=dict)
    """open_clip's vision_cfg, for example timm_model_name and image_size."""
    text: dict[str, Scalar] = field(default_factory=dict)
    """open_clip's text_cfg, for example context_length, width, heads and layers."""
    tokenizer: str = "open_clip"
    """`open_clip` (its 49k BPE), `trained` (a BPE learned from the captions), or a tokenizer.json or its folder."""
    vocab_size: int = 2048
    """Upper bound of a trained vocabulary."""
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each colour channel that the image tower is fed with, in [0, 1]; open_clip's default."""
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each colour channel, in [0, 1]; open_clip's default."""
    weights: str | None = None
    """A safetensors file in open_clip's layout to start both towers from."""


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Towers that start at the weights of another model, whose network and preprocessing they take over."""

    image: str | None = None
    """`third` (one of several: third_NAME), or a tower of images by its name: timm:NAME, open_clip:NAME@TAG, file:RUN
    or a transformers CLIP hf:DIR_OR_ID; `none`: the image tower that `pair` describes."""
    text: str | None = None
    """open_clip:NAME@TAG, file:RUN, a transformers CLIP hf:DIR_OR_ID or a sentence encoder hf-text:DIR_OR_ID, with its
    tokenizer; `none`: the text tower that `pair` describes."""
    image_size: int | None = None
    """Side of the image tower's square input in pixels; `none`: that of its source."""
    lr: float = 0.15
    """Learning rate of what starts at given weights, as a multiple of optim.lr; a new projection behind it has the
    whole rate. Rules in optim.rules come before this."""
    batchnorm: Literal["frozen", "train"] = "frozen"
    """Whether the running statistics of a started image tower's BatchNorm stay as they are and are used in training."""


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How files become batches."""

    image_column: str | None = None
    """Column of image paths in a table; `none` finds it."""
    caption_columns: tuple[str, ...] = ()
    """Columns of captions in a table; empty finds them."""
    split_column: str | None = "split"
    """Column of each row's part (train, val, test), if the table has it; `none` uses no column."""
    val_fraction: float = 0.05
    """Share of images kept for validation when the data brings no val folder."""
    test_fraction: float = 0.05
    """Share of images kept for the test when the data brings no test folder."""
    train_images: int = 0
    """Train on so many of the training images, drawn by their ids; 0 takes all. Those of a smaller number are among
    those of a larger one."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the area of the random crop, as a share of the image."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333)
    """Range of the aspect ratio of the random crop."""
    flip: bool = False
    """Mirror half of the images; leave off when captions say left and right."""
    third_view: Literal["fixed", "same"] = "fixed"
    """What a frozen tower sees: one fixed view, stored once, or the main tower's augmented view, computed live."""
    stored_views: int = 0
    """0: one fixed view is stored; K: K random views, of which each visit draws one and the main tower sees the same
    region. LiT and evaluation take the fixed view."""
    mask_duplicates: bool = False
    """Do not count samples of the same image, or of captions with the same token ids, as each other's negatives."""
    max_bad_share: float = 0.01
    """Share of unusable samples above which training refuses to start or stops."""
    decoder: Literal["pillow", "simplejpeg"] = "pillow"
    """What decodes the JPEGs of augmented views; simplejpeg gives the same pixels sooner, and must be installed."""
    draft: bool = False
    """Decode a JPEG that is larger than its crop needs at a reduced scale: faster, and pixels differ slightly."""
    keep_pixels: bool = True
    """Keep decoded images in memory for the next pass, up to a quarter of what is free; batches are the same."""
    workers: int = 2
    """Loader processes; 0 loads in the training process."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The options of the table of rows; `method` chooses the table."""

    weights: tuple[float, ...] | None = None
    """Weights of img-txt, img-third and txt-third, used as written; K third towers share the last two. `none`: the
    method's own."""
    weights_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Whether the weights stay as they are, or move to weights_end along a line or half a cosine."""
    weights_end: tuple[float, ...] | None = None
    """The three weights at the end of the schedule; at its start they are `weights`."""
    weights_steps: tuple[int, ...] | None = None
    """First and last step of the schedule, counted from 0; `none`: 0 and `steps`, the whole run."""
    kind: Literal["softmax", "sigmoid"] = "softmax"
    """Contrastive form of every row that is not a regression."""
    heads: Literal["both", "third", "main", "none"] = "both"
    """Which sides of the third rows of 3T have a linear head; `none` needs a frozen tower of the width embed_dim. The
    combination needs `both`."""
    regression: Literal["cosine", "mse"] = "cosine"
    """Distance of the third rows of 3t-regression."""
    lit_projection: bool = True
    """LiT: a trainable linear projection on the frozen image tower; without it the text tower takes its width. A
    sentence encoder that `start.text` names has a projection anyway, unless its width is the pair's and this is false.
    """
    scale: Literal["shared", "per-row"] = "shared"
    """One learned scale for all rows, or one for each."""
    init_scale: float = 1 / 0.07
    """Start of the scale that multiplies the cosines."""
    max_scale: float = 100.0
    """The scale is clamped to at most this after every step."""
    init_bias: float = -10.0
    """Start of the learned bias of a sigmoid row."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and which parameters it touches."""

    lr: float = 1e-3
    """Highest learning rate, after the warm-up; from there it falls along a cosine."""
    weight_decay: float = 0.1
    """Applied to matrices only; never to heads, biases, norms or the scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_steps: int = 100
    """Steps in which the learning rate rises to lr."""
    clip_norm: float = 1.0
    """Largest norm of the gradient over all parameters; 0 does not clip."""
    scale_lr_multiplier: float = 1.0
    """Learning rate of the scale, as a multiple of lr."""
    freeze: tuple[str, ...] = ()
    """Parameter-name patterns (* and ?) that do not train; one that matches nothing is an error."""
    no_decay: tuple[str, ...] = ()
    """Parameter-name patterns that train without weight decay; one that matches nothing is an error."""
    rules: tuple[str, ...] = ()
    """Rules such as "img.trunk.* lr=0.05 from=200": the learning rate of the parameters that a pattern matches, as a
    multiple of lr, and the step, counted from 0, up to which they stay as they are. Of several rules for a parameter
    the last one holds; one that matches nothing is an error."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer of a started tower to the layer below it; 1: the same everywhere."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, complete: with the data, this file alone repeats it."""

    data: str | None = None
    """Folder, table or tar shards with images and captions; `shapes` is the built-in world."""
    classes: str | None = None
    """Labelled images for zero-shot classification: class folders or CLIP_benchmark's layout; `shapes` is built in."""
    third: tuple[str, ...] = ()
    """Frozen third towers, such as timm:NAME; several as NAME=SPEC. `threetowers towers` lists what there is."""
    method: Method = "3t"
    """How to train. `baseline` trains the pair alone, the other methods need a third tower; see docs/method.md."""
    steps: int = 1000
    """Batches to train on."""
    batch_size: int = 256
    """Images, each with a caption, in a batch. Each of them is compared with all the others."""
    micro_batch_size: int = 0
    """Samples that go through the towers at once, for batches beyond memory; 0 is the whole batch. The loss is that
    of the whole batch all the same; the towers' forward pass is done twice."""
    seed: int = 0
    """Decides initial weights, the order of the data and augmentation."""
    log_every_steps: int = 20
    """Log the metrics each time this many steps are done."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers that get the metrics too: `tensorboard`, `wandb`, `trackio`."""
    eval_every_steps: int = 0
    """Validate each time this many steps are done; 0 only at the end."""
    suite: str | None = None
    """Further data and tasks to measure at each validation: a suite's file or folder, or `shapes`. `compare` measures
    the finished runs on all of it."""
    suite_images: int = 1000
    """Images of each of its data sets that are measured while training, at equal distances; 0 takes all."""
    keep_best: str | None = None
    """A validation metric such as val/mean_r@1 or zero_shot/SET/top1: the finished run holds the weights of the step
    where it was highest."""
    patience: int = 0
    """End the run after this many validations in a row without a better keep_best; 0 never does."""
    checkpoint_every_steps: int = 500
    """Save each time this many steps are done; a run that is stopped saves too."""
    keep_checkpoints: int = 2
    """Checkpoints that stay in the run folder."""
    background_saves: bool = True
    """Write checkpoints in a thread, from a copy of the weights and moments in host memory."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    precision: Literal["fp32", "bf16-autocast"] = "fp32"
    """Precision of the main towers; weights, heads and losses are fp32 all the same. `threetowers doctor` says whether
    the device has bf16."""
    grad_checkpointing: bool = False
    """Keep fewer activations and compute them again for the gradient: less memory, about a third more time."""
    compile: bool = False
    """Run the trained towers through torch.compile: the first steps take minutes; measure whether later ones gain."""
    shard: Literal["none", "blocks"] = "none"
    """How several processes keep the towers: `none` gives each a copy; `blocks` gives each a share of the weights, the
    gradients and the moments, and gathers one block of layers at a time (FSDP2). For models that do not fit one GPU."""
    third_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the frozen towers' weights and arithmetic; bf16 is faster where the device has it."""
    third_features: Literal["pooled", "cls", "mean"] = "pooled"
    """What a frozen tower gives: its own pooled features, its class token, or the mean over patches or words."""
    embeddings: str | None = None
    """A store that `threetowers embed` made, or the folder of several; what is missing there is made on first use.
    `none` puts the folder beside the run folder."""
    pair: PairConfig = field(default_factory=PairConfig)
    start: StartConfig = field(default_factory=StartConfig)
    inputs: InputConfig = field(default_factory=InputConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def thirds(self) -> dict[str, str]:
        """The frozen towers by view name: `third` when there is one, `third_NAME` when several are named.

        Raises UsageError when several towers have no names of their own, or two share one.
        """
        named: dict[str, str] = {}
        for entry in self.third:
            label, equals, spec = entry.partition("=")
            if not equals or ":" in label:
                label, spec = "", entry
            if not label and len(self.third) > 1:
                raise UsageError(
                    f"third: {entry!r} has no name, and {len(self.third)} third towers are given. "
                    f"Write each as NAME=SPEC, for example dino={spec}"
                )
            if label and not label.isidentifier():
                raise UsageError(f"third: {label!r} in {entry!r} is not a plain name (letters, digits, _)")
            view = f"third_{label}" if label else "third"
            if view in named:
                raise UsageError(f"third: the name {label!r} is given twice")
            named[view] = spec
        return named


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A timm classifier, what it is trained on, and for how long."""

    data: str = "objects"
    """Labelled images (class folders, or CLIP_benchmark's layout); `objects`, `scenes`, `attributes` are built in."""
    only: tuple[str, ...] = ()
    """Class-name patterns (* and ?) to train on; empty takes all classes. One that matches nothing is an error."""
    heads: Literal["classes", "words"] = "classes"
    """One softmax over the classes, or one over each word of the class names, which then have equally many words."""
    model: str = "test_nfnet"
    """A timm architecture; it starts from random weights."""
    model_args: dict[str, Scalar] = field(default_factory=dict)
    """Further arguments of the architecture, for example num_features or img_size."""
    size: int = 32
    """Side of the square input in pixels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    steps: int = 1000
    """0 writes the untrained weights."""
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    inputs: InputConfig = field(
        default_factory=lambda: InputConfig(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), workers=0)
    )
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=4e-3, weight_decay=0.05, warmup_steps=40)
    )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Several methods on equal data, batch and steps; everything not listed here is each run's own configuration."""

    methods: tuple[Method, ...] = ("baseline", "lit", "3t")
    """What to compare: baseline, lit, lit-unlocked, 3t, 3t-main, 3t-regression, 3t-warm, 3t-main-warm."""
    seeds: tuple[int, ...] = (0,)
    """Each method is trained once per seed; intervals over seeds need at least two."""
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Learning rates tried for every method with the first seed; validation picks one."""
    margin: float = 0.02
    """A mean R@1 lower by at most this share counts as not worse; fix it before the runs."""
    title: str = "Which method wins on this data"


def data_of(config: RunConfig) -> str:
    """What to train on; raises UsageError where the configuration names nothing."""
    if config.data is None:
        raise UsageError(
            "data: say what to train on: --data FOLDER|TABLE|SHARDS, or --data shapes for the built-in world"
        )
    return config.data


def check(config: RunConfig) -> None:
    """Raises UsageError for a number that no run can have, by its key."""
    inputs, optim, objective = config.inputs, config.optim, config.objective
    (low, high), (flat, tall) = inputs.crop_scale, inputs.crop_ratio
    one, zero, above = "1 or more", "0 or more", "above 0"
    rules = {
        "steps": (config.steps >= 1, one),
        "batch_size": (config.batch_size >= 1, one),
        "micro_batch_size": (config.micro_batch_size >= 0, zero),
        "log_every_steps": (config.log_every_steps >= 1, one),
        "eval_every_steps": (config.eval_every_steps >= 0, zero),
        "checkpoint_every_steps": (config.checkpoint_every_steps >= 1, one),
        "suite_images": (config.suite_images >= 0, zero),
        "keep_checkpoints": (config.keep_checkpoints >= 1, one),
        "patience": (config.patience >= 0, zero),
        "inputs.workers": (inputs.workers >= 0, zero),
        "inputs.train_images": (inputs.train_images >= 0, zero),
        "inputs.stored_views": (inputs.stored_views >= 0, zero),
        "inputs.max_bad_share": (0 <= inputs.max_bad_share <= 1, "from 0 to 1"),
        "inputs.crop_scale": (0 < low <= high <= 1, "two shares above 0, the smaller first, up to 1"),
        "inputs.crop_ratio": (0 < flat <= tall, "two numbers above 0, the smaller first"),
        "start.image_size": (config.start.image_size is None or config.start.image_size >= 1, one),
        "start.lr": (0 <= config.start.lr < float("inf"), zero),
        "optim.lr": (0 < optim.lr < float("inf"), above),
        "optim.weight_decay": (optim.weight_decay >= 0, zero),
        "optim.betas": (all(0 <= beta < 1 for beta in optim.betas), "from 0 to below 1"),
        "optim.warmup_steps": (optim.warmup_steps >= 0, zero),
        "optim.layer_decay": (0 < optim.layer_decay <= 1, "above 0, up to 1"),
        "optim.clip_norm": (optim.clip_norm >= 0, zero),
        "objective.init_scale": (0 < objective.init_scale <= objective.max_scale, "above 0, up to max_scale"),
    }
    for key, (fits, allowed) in rules.items():
        if not fits:
            raise UsageError(f"{key}: {attrgetter(key)(config)!r} is out of range; it must be {allowed}")
    if config.shard == "blocks" and config.compile:
        raise UsageError(
            "shard: blocks and compile exclude each other; give --shard none, or --compile False"
        )
    if config.patience and config.keep_best is None:
        raise UsageError("patience: name the metric in keep_best, for example --keep-best val/mean_r@1")
    if config.keep_best is not None and not config.eval_every_steps:
        raise UsageError(
            f"keep_best: {config.keep_best} needs validations to choose from; give --eval-every-steps"
        )
    if inputs.stored_views and inputs.third_view == "same":
        raise UsageError(
            f"inputs.stored_views: {inputs.stored_views} stored views and inputs.third_view = same (live) exclude each "
            "other; leave one out"
        )
