"""The one description of a run, and the presets."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..datasets.manifest import write_atomically
from . import phema


class Section(BaseModel):
    """A part of the description: immutable, and without fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Section):
    path: str = ""
    """The data set: a folder made by `styleloom prepare`, or where such a folder was copied to: https://host/set,
    s3://bucket/set, gs://..., hf://datasets/USER/REPO/set, or pipe:COMMAND with {} for the file's name."""
    reduce: int = Field(default=1, ge=1)
    """Train at the data set's size divided by this: 2, 4, 8, ..."""
    mirror: bool = False
    """Show about half of the images flipped left to right."""
    labels: bool = False
    """Train a class-conditional network on the data set's labels."""
    workers: int = Field(default=-1, ge=-1)
    """Processes that read and decode, for each training process; -1: by the number of cores."""
    window: int = Field(default=16, ge=1)
    """Shards that are mixed with one another; memory and randomness grow with it."""
    decoder: Literal["cpu", "gpu"] = "cpu"
    """Where JPEG images are decoded; gpu: by nvJPEG, whose pixels differ by a little. There an image that is damaged
    within, which its hash does not show (in sets that others wrote), ends the run instead of being replaced."""
    max_bad: float = Field(default=0.01, ge=0, le=1)
    """Share of samples that may be unusable (broken, of another size, without label) and are replaced by others; above
    it the run stops."""
    verify: Literal["auto", "hash", "size", "none"] = "auto"
    """What is checked of local shards before training: their sizes, or also their sha256 (auto: all < 2 GiB). Remote
    ones are always checked, as they come."""
    cache: str = ""
    """Folder on each node for copies of remote shards, best on a disk of its own; by default shards/ in STYLELOOM_CACHE
    or ~/.cache/styleloom."""
    cache_gb: float = Field(default=100.0, gt=0)
    """Bytes that all copies together may take on a node, in 10^9."""


class StyleGAN2Network(Section):
    kind: Literal["stylegan2"] = "stylegan2"
    """Which generator and discriminator."""
    z_dim: int = Field(default=512, ge=1)
    """Size of the latent z."""
    w_dim: int = Field(default=512, ge=1)
    """Size of the intermediate latent w."""
    mapping_layers: int = Field(default=8, ge=1)
    """Layers of the mapping network."""
    discriminator_mapping_layers: int | None = Field(default=None, ge=0)
    """Layers between label and projection in the discriminator; None: as many as in the mapping network."""
    channel_base: int = Field(default=32768, ge=4)
    """Channels times resolution, the same at every level ..."""
    channel_max: int = Field(default=512, ge=1)
    """... but at most this many channels."""
    noise: bool = True
    """Noise maps in every layer of the generator, for detail that follows no latent."""
    mbstd_group: int = Field(default=4, ge=1)
    """Group of the minibatch standard deviation; 1 switches it off."""


class MSGNetwork(StyleGAN2Network):
    kind: Literal["msg"] = "msg"  # type: ignore[assignment]
    """Which generator and discriminator."""


class StyleGAN1Network(StyleGAN2Network):
    kind: Literal["stylegan1"] = "stylegan1"  # type: ignore[assignment]
    """Which generator and discriminator."""
    channel_base: int = Field(default=16384, ge=4)
    """Channels times resolution, the same at every level ..."""
    latent_input: bool = False
    """Begin the synthesis with a layer on w instead of a learned constant."""


class ProgressiveNetwork(Section):
    kind: Literal["progressive"] = "progressive"
    """Which generator and discriminator."""
    z_dim: int = Field(default=512, ge=1)
    """Size of the latent z."""
    channel_base: int = Field(default=16384, ge=4)
    """Channels times resolution, the same at every level ..."""
    channel_max: int = Field(default=512, ge=1)
    """... but at most this many channels."""
    mbstd_group: int = Field(default=4, ge=1)
    """Group of the minibatch standard deviation; 1 switches it off."""


class R3GANNetwork(Section):
    kind: Literal["r3gan"] = "r3gan"
    """Which generator and discriminator."""
    z_dim: int = Field(default=64, ge=1)
    """Size of the latent z."""
    channel_base: int = Field(default=24576, ge=4)
    """Channels times resolution, the same at every level ..."""
    channel_max: int = Field(default=768, ge=1)
    """... but at most this many channels."""
    blocks: int = Field(default=2, ge=1)
    """Residual blocks a level."""
    expansion: int = Field(default=2, ge=1)
    """The channels within a block, as a multiple of those outside it."""
    group_width: int = Field(default=16, ge=1)
    """Channels in a group of a block's 3x3 convolution."""
    mbstd_group: ClassVar[int] = 1
    """Its discriminator has no minibatch standard deviation."""


Network = Annotated[
    StyleGAN2Network | MSGNetwork | StyleGAN1Network | ProgressiveNetwork | R3GANNetwork, Field(discriminator="kind")
]


class StyleGAN2Recipe(Section):
    kind: Literal["stylegan2"] = "stylegan2"
    """Which losses, phases and optimizers."""
    lr: float = Field(default=0.0025, gt=0)
    """Learning rate of both networks, before the correction for lazy regularisation."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Adam's second-moment decay, before that correction; beta1 is 0."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    r1_gamma: float | None = Field(default=None, ge=0)
    """Weight of the R1 penalty; 0 switches it off, None takes 0.0002 * width * height / batch, of the size and batch
    that it is trained at."""
    r1_interval: int = Field(default=16, ge=1)
    """Iterations from one R1 phase to the next."""
    pl_weight: float = Field(default=2.0, ge=0)
    """Weight of the path-length penalty; 0 switches it off."""
    pl_decay: float = Field(default=0.01, gt=0, le=1)
    """Speed of the running mean of path lengths."""
    pl_interval: int = Field(default=4, ge=1)
    """Iterations from one path-length phase to the next."""
    pl_batch_shrink: int = Field(default=2, ge=1)
    """The path-length phase uses batch / this many images."""
    style_mixing: float = Field(default=0.9, ge=0, le=1)
    """Probability that a generated image takes its later layers' w from a second latent."""
    w_avg_beta: float = Field(default=0.995, ge=0, lt=1)
    """Decay of the running mean of w that truncation uses."""


class MSGRecipe(StyleGAN2Recipe):
    kind: Literal["msg"] = "msg"  # type: ignore[assignment]
    """Which losses, phases and optimizers."""


class StyleGAN1Recipe(Section):
    kind: Literal["stylegan1"] = "stylegan1"
    """Which losses, phases and optimizers."""
    lr: float = Field(default=0.001, gt=0)
    """Learning rate of both networks, at sizes for which `growth` gives none."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Adam's second-moment decay; beta1 is 0."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    r1_gamma: float = Field(default=10.0, ge=0)
    """Weight of the R1 penalty of every step; 0 switches it off."""
    style_mixing: float = Field(default=0.9, ge=0, le=1)
    """Probability that a generated image takes its later layers' w from a second latent."""
    w_avg_beta: float = Field(default=0.995, ge=0, lt=1)
    """Decay of the running mean of w that truncation uses."""


class ProgressiveRecipe(Section):
    kind: Literal["progressive"] = "progressive"
    """Which losses, phases and optimizers."""
    loss: Literal["wgan-gp", "logistic"] = "wgan-gp"
    """The published Wasserstein loss with gradient penalty, or the non-saturating one with R1."""
    lr: float = Field(default=0.001, gt=0)
    """Learning rate of both networks, at sizes for which `growth` gives none."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Adam's second-moment decay; beta1 is 0."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    gp_weight: float = Field(default=10.0, ge=0)
    """With wgan-gp, weight of the gradient penalty between real and generated images."""
    gp_target: float = Field(default=1.0, gt=0)
    """With wgan-gp, the gradient norm that is not penalised."""
    drift: float = Field(default=0.001, ge=0)
    """With wgan-gp, weight of the reals' squared scores, which keeps the scores near 0."""
    r1_gamma: float = Field(default=10.0, ge=0)
    """With logistic, weight of the R1 penalty of every step; 0 switches it off."""
    class_weight: float = Field(default=1.0, ge=0)
    """With labels, weight of the auxiliary classifier's cross entropy in both networks' losses."""


class R3GANRecipe(Section):
    kind: Literal["r3gan"] = "r3gan"
    """Which losses, phases and optimizers."""
    lr: float = Field(default=2e-4, gt=0)
    """Learning rate of both networks at the start ..."""
    lr_end: float = Field(default=5e-5, gt=0)
    """... and after `decay_kimg`."""
    beta2: float = Field(default=0.9, ge=0, lt=1)
    """Adam's second-moment decay at the start (beta1 is 0) ..."""
    beta2_end: float = Field(default=0.99, ge=0, lt=1)
    """... and after `decay_kimg`."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    gamma: float = Field(default=2.0, ge=0)
    """Weight of the R1 and R2 penalties of every step at the start ..."""
    gamma_end: float = Field(default=0.2, ge=0)
    """... and after `decay_kimg`."""
    decay_kimg: float = Field(default=20000.0, ge=0)
    """Thousands of images over which these go from one value to the other, along half a cosine; 0: at their ends."""
    w_avg_beta: float = Field(default=0.995, ge=0, lt=1)
    """Of networks with a w, decay of its running mean, which truncation uses."""


Recipe = Annotated[
    StyleGAN2Recipe | MSGRecipe | StyleGAN1Recipe | ProgressiveRecipe | R3GANRecipe, Field(discriminator="kind")
]

# Which networks a recipe trains, where there are others than those of its own kind.
TRAINS = {"r3gan": ("r3gan", "stylegan2")}


class Augment(Section):
    kind: Literal["none", "ada", "fixed", "diffaugment"] = "none"
    """What the discriminator's images, real and generated, go through, so that it cannot learn few images by heart.
    ada: each of `pipe` with a probability p that follows how sure it is of the reals; fixed: with the probability
    `p`; diffaugment: `policy`, on every image."""
    pipe: tuple[Literal["blit", "geom", "color", "filter", "noise", "cutout"], ...] = ("blit", "geom", "color")
    """Of ada and fixed: flips, turns by 90 degrees and whole pixels; other geometry; colours; spectral filters; noise;
    a square cut out."""
    policy: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation", "cutout")
    """Of diffaugment."""
    p: float = Field(default=0.0, ge=0, le=1)
    """Probability of each transform: of ada at the start, of fixed from `warmup_kimg` on."""
    warmup_kimg: float = Field(default=0.0, ge=0)
    """Of fixed: thousands of images over which p rises from 0, along half a cosine."""
    target: float = Field(default=0.6, ge=-1, le=1)
    """Of ada: the mean sign of the reals' scores that p is to bring about."""
    kimg: float = Field(default=500.0, gt=0)
    """Of ada: thousands of images in which p could go from 0 to 1."""
    interval: int = Field(default=4, ge=1)
    """Of ada: iterations from one change of p to the next."""

    @model_validator(mode="after")
    def _does_something(self) -> "Augment":
        if self.kind == "fixed" and not self.p:
            raise ValueError("augment.kind fixed with augment.p 0 changes nothing: give --augment.p")
        if self.p and self.kind in ("none", "diffaugment"):
            raise ValueError(
                f"augment.p has no effect with augment.kind {self.kind}: take ada or fixed, or leave p out"
            )
        if (self.kind in ("ada", "fixed") and not self.pipe) or (self.kind == "diffaugment" and not self.policy):
            raise ValueError(f"augment.kind {self.kind} without any transform changes nothing: name some")
        return self


class Growth(Section):
    start: int = Field(default=0, ge=0)
    """Train at this size first (4, 8, 16, ... px, as square images are counted), then at twice that, and so on, each
    new level of the networks being faded in; 0: at the full size from the start."""
    stabilise_kimg: float = Field(default=600.0, ge=0)
    """Thousands of images at each size without a fade ..."""
    fade_kimg: float = Field(default=600.0, ge=0)
    """... and while the next level fades in."""
    gpus: int = Field(default=0, ge=0)
    """Take batch and learning rate of each size as published for 1, 2, 4 or 8 GPUs (for more by the same rule), on
    however many this runs; 0: `batch` and recipe.lr at every size."""
    batch: tuple[tuple[int, int], ...] = ()
    """Exceptions from that: size and batch, size and batch, ..."""
    lr: tuple[tuple[int, float], ...] = ()
    """Exceptions from that: size and learning rate, size and learning rate, ..."""

    @model_validator(mode="after")
    def _is_a_schedule(self) -> "Growth":
        for px in (self.start or 4, *(px for px, _ in (*self.batch, *self.lr))):
            if px < 4 or px & (px - 1):
                raise ValueError(f"sizes are 4, 8, 16, 32, ... px, not {px}")
        if self.start and not round(1000 * self.stabilise_kimg) + round(1000 * self.fade_kimg):
            raise ValueError("stabilise_kimg and fade_kimg are both 0: give one, or leave growth.start out")
        if any(value <= 0 for _, value in (*self.batch, *self.lr)):
            raise ValueError("a batch and a learning rate are more than 0")
        return self


class Ema(Section):
    half_life_kimg: float = Field(default=10.0, ge=0)
    """Thousands of images after which a weight's influence on the averaged generator has halved."""
    ramp: float | None = Field(default=None, gt=0)
    """Limit the half-life to this fraction of the images shown so far; not with `init`."""
    decay: float | None = Field(default=None, ge=0, lt=1)
    """Instead of both: what the average keeps of itself at each step, whatever the batch."""
    warmup_kimg: float = Field(default=0.0, ge=0)
    """Let the half-life rise from 0 to its value over so many thousand images, along half a cosine; not with `init`."""
    sigma_rel: tuple[float, ...] = (0.05, 0.1)
    """Relative widths of averages that are kept beside it in every snapshot, and from which `styleloom average` makes
    one of any width after the training; each takes a generator's memory. None are kept without a width."""

    @model_validator(mode="after")
    def _has_widths(self) -> "Ema":
        names = {phema.name(width) for width in self.sigma_rel}  # as which they are kept
        if any(not 0 < width < phema.WIDEST for width in self.sigma_rel) or len(names) < len(self.sigma_rel):
            raise ValueError(
                f"sigma_rel {self.sigma_rel}: widths lie between 0 and 0.288 and differ within three decimals"
            )
        return self


class Parallel(Section):
    strategy: Literal["accelerate", "deepspeed"] = "accelerate"
    """How gradients become steps on several processes. accelerate: every process holds all, one flat all-reduce a
    phase. deepspeed: its engines divide the optimizers' state; worth it from some hundred million parameters on."""
    zero_stage: int = Field(default=1, ge=0)
    """With deepspeed, what is divided over the processes: 0 nothing, 1 the optimizers' state, 2 also the summed
    gradients (little: before the sum every process holds a whole one)."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """With accelerate, sum gradients in buckets while the backward pass still computes others; auto: on several
    nodes, where links are slow."""
    bucket_mb: float = Field(default=16.0, gt=0)
    """Size of such a bucket in 10^6 bytes, or a sixth of the gradient if that is less."""
    watchdog_s: float = Field(default=900.0, ge=0)
    """Seconds after which processes that wait for one another in vain end, and say which of them hangs and where; 0:
    never."""
    grace_s: float = Field(default=0.0, ge=0)
    """Seconds from SIGTERM to the end, saving included, that the scheduler grants; 0: as long as it takes."""

    @model_validator(mode="after")
    def _can(self) -> "Parallel":
        if self.zero_stage > 2:
            raise ValueError(
                "ZeRO stage 3 divides the parameters themselves, and its engine cannot differentiate through them "
                "twice, as R1 and path lengths do: take parallel.zero_stage 0, 1 or 2"
            )
        return self


class Metrics(Section):
    names: tuple[Literal["fid", "kid", "is", "pr", "ppl"], ...] = ("fid",)
    """What is measured while training; the first one decides which snapshot is the best."""
    inception: str = ""
    """The feature network: a file such as inception-2015-12-05.pt. Without it, only `score_images` has effect."""
    lpips: str = ""
    """The perceptual network for ppl: a file such as vgg16.pt. Both are programs: take them from whom you trust."""
    resize: Literal["clean", "legacy"] = "clean"
    """How images are brought to the network's size: as clean-fid does, or as the first implementation of the FID."""
    images: int = Field(default=50000, ge=2)
    """Generated images by which a snapshot is measured."""
    tick_images: int = Field(default=5000, ge=2)
    """Generated images of a cheaper estimate in between ..."""
    tick_kimg: float = Field(default=0.0, ge=0)
    """... at the first tick after every so many thousand images; 0: none."""
    cache: str = ""
    """Folder for features of real images; by default features/ in STYLELOOM_CACHE or ~/.cache/styleloom."""

    @model_validator(mode="after")
    def _decides(self) -> "Metrics":
        if not self.names or self.names[0] not in ("fid", "kid"):
            raise ValueError("the first of metrics.names decides which snapshot is the best: begin with fid or kid")
        return self


Action = Literal["ignore", "warn", "roll-back", "stop"]


class Health(Section):
    nonfinite: Action = "stop"
    """What happens when a phase's gradients are not finite `patience` times in a row; roll-back: the run goes on from
    the last checkpoint before its trouble, with other latents."""
    patience: int = Field(default=10, ge=1)
    """Of that rule."""
    explosion: Action = "warn"
    """What happens when a network's gradient norm is more than `explosion_factor` times its median so far."""
    explosion_factor: float = Field(default=100.0, gt=1)
    """Of that rule."""
    gap: Action = "warn"
    """What happens when the reals' mean score is more than `gap_limit` above that of generated images, or as much
    below it."""
    gap_limit: float = Field(default=50.0, gt=0)
    """Of that rule."""
    memorised: Action = "warn"
    """What happens when the mean sign of the reals' scores is above `memorised_limit`: the discriminator knows them
    all, and the generator learns nothing from it."""
    memorised_limit: float = Field(default=0.95, gt=0, le=1)
    """Of that rule."""
    collapse: Action = "warn"
    """What happens when generated images differ from one another less than `collapse_limit` times what real ones do."""
    collapse_limit: float = Field(default=0.1, gt=0)
    """Of that rule."""
    saturation: Action = "warn"
    """What happens when the augmentation's p has come to 1, where it can follow no further."""
    ticks: int = Field(default=3, ge=1)
    """Ticks in a row for which a rule has to hold before something happens (not of nonfinite)."""
    rollbacks: int = Field(default=3, ge=0)
    """Times that a run goes back; the next time it stops."""
    images: int = Field(default=64, ge=2)
    """Generated images, always from the same latents, whose differences are measured at each tick."""


class Run(Section):
    preset: str = "custom"
    """The preset that this run began as."""
    data: Data = Data()
    network: Network = StyleGAN2Network()
    recipe: Recipe = StyleGAN2Recipe()
    growth: Growth = Growth()
    augment: Augment = Augment()
    ema: Ema = Ema()
    metrics: Metrics = Metrics()
    health: Health = Health()
    parallel: Parallel = Parallel()
    out: str = ""
    """The folder of the run; a folder that holds a run goes on from its newest checkpoint."""
    init: str = ""
    """A snapshot (or a run's folder) whose networks this run starts from, as far as they fit: it may have another
    resolution, or other labels."""
    freeze_d: int = Field(default=0, ge=0)
    """Leave so many of the discriminator's highest levels as they are (with `init`, to learn from few images)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Everything random follows from it."""
    batch: int = Field(default=32, ge=1)
    """Images of a step over all processes, at sizes for which `growth` gives none."""
    passes: int = Field(default=1, ge=1)
    """Split each process's share of a batch into this many passes (gradient accumulation), to save memory."""
    recompute: bool = False
    """Keep only the activations between the networks' levels and compute the others again in the backward pass: less
    memory in the main phases and the same result, for about a third more time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the top four levels of both networks; the rest is fp32."""
    total_kimg: float = Field(default=25000.0, gt=0)
    """Length of the training, in thousands of images."""
    tick_kimg: float = Field(default=4.0, gt=0)
    """Progress line and statistics every so many thousand images."""
    checkpoint_kimg: float = Field(default=40.0, gt=0)
    """Exact training state every so many thousand images."""
    snapshot_kimg: float = Field(default=200.0, gt=0)
    """Generator snapshot and sample grid every so many thousand images."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints to keep, the newest ones ..."""
    keep_every_kimg: float = Field(default=0.0, ge=0)
    """... and for ever the first one at or after every so many thousand images; 0: none."""
    score_images: int = Field(default=-1, ge=-1)
    """Images by which a snapshot is scored (sliced Wasserstein distance; snapshots/best leads to the lowest); 0: no
    score; -1: 512, but none on a CPU above 64 px."""
    keep_snapshots: int = Field(default=0, ge=0)
    """Snapshots to keep, the newest ones and the best; 0: all."""

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        group = self.network.mbstd_group
        for batch in (self.batch, *(batch for _, batch in self.growth.batch)):
            if batch % (group * self.passes):
                what = "whole images: change batch or passes"
                if group > 1:
                    what = f"minibatch-std groups of {group}: change batch, passes or network.mbstd_group"
                raise ValueError(f"batch {batch} in {self.passes} passes does not divide into {what}")
        if self.network.kind == "stylegan1" and self.network.discriminator_mapping_layers is not None:
            raise ValueError("the discriminator of stylegan1 has no mapping: leave discriminator_mapping_layers out")
        if self.network.kind not in TRAINS.get(self.recipe.kind, (self.recipe.kind,)):
            raise ValueError(f"recipe {self.recipe.kind} does not train networks of kind {self.network.kind}")
        if self.network.kind == "msg" and self.growth.start:
            raise ValueError(
                "msg shows the discriminator all sizes at once, so it does not grow: leave growth.start out"
            )
        if self.recipe.kind == "r3gan" and self.growth != Growth():
            raise ValueError("r3gan has schedules of its own and does not grow: leave growth out")
        wasserstein = isinstance(self.recipe, ProgressiveRecipe) and self.recipe.loss == "wgan-gp"
        if self.augment.kind != "none" and (self.network.kind == "msg" or wasserstein):
            raise ValueError(
                f"augment.kind {self.augment.kind} does not go with {'wgan-gp' if wasserstein else 'msg'}: leave it out"
            )
        if self.freeze_d and not self.init:
            raise ValueError("freeze_d keeps what a snapshot's discriminator has learned: give one with --init")
        return self


# What a run may change when it goes on: how long it lasts, how often it tells, where things lie, what it costs.
FREE = {
    "preset", "data.path", "data.workers", "data.verify", "data.cache", "data.cache_gb", "data.max_bad", "out",
    "passes", "recompute", "total_kimg", "tick_kimg", "checkpoint_kimg", "snapshot_kimg", "keep_checkpoints",
    "keep_every_kimg", "keep_snapshots", "score_images", "parallel.strategy", "parallel.zero_stage", "parallel.overlap",
    "parallel.bucket_mb", "parallel.watchdog_s", "parallel.grace_s",
    *(f"metrics.{name}" for name in Metrics.model_fields), *(f"health.{name}" for name in Health.model_fields),
}  # fmt: skip


def protected_differences(old: Run, new: Run) -> list[str]:
    """'name: old -> new' of each field that may not change between a checkpoint and the run that goes on from it."""
    a, b = flat(old), flat(new)
    return [f"{name}: {a.get(name)} -> {b[name]}" for name in b if name not in FREE and a.get(name) != b[name]]


def flat(run: Run) -> dict[str, Any]:
    """Dotted names and values of all fields."""

    def walk(prefix: str, value: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, x in value.items():
            out |= walk(f"{prefix}{name}.", x) if isinstance(x, dict) else {prefix + name: x}
        return out

    return walk("", run.model_dump(mode="json"))


def write_run(run: Run, path: Path) -> None:
    """Writes `run.json`, whole or not at all. Raises OSError naming it."""
    write_atomically(path, (json.dumps(run.model_dump(mode="json"), indent=1) + "\n").encode())


def read_run(path: Path) -> Run:
    """The run in a `run.json`. Raises ValueError (pydantic's) if it is not one of this version."""
    return Run.model_validate_json(path.read_text())


PRESETS: dict[str, Run] = {
    run.preset: run
    for run in [
        Run(
            preset="stylegan2-cpu",
            # Tuned by eye on 32 px for a good picture after minutes: small batches (more steps), no noise maps (a
            # generator that has learned little leans on them), a stronger R1 than the rule gives, a long average.
            network=StyleGAN2Network(
                z_dim=128, w_dim=128, mapping_layers=2, channel_base=1024, channel_max=128, noise=False
            ),
            recipe=StyleGAN2Recipe(lr=0.003, r1_gamma=1.0, pl_weight=0, style_mixing=0),
            ema=Ema(half_life_kimg=10.0, ramp=0.1),
            batch=16,
            total_kimg=300,
            tick_kimg=1,
            checkpoint_kimg=10,
            snapshot_kimg=10,
        ),
        # For one GPU: what the published "auto" rule gives at this size.
        Run(
            preset="stylegan2-128",
            precision="fp16",
            network=StyleGAN2Network(mapping_layers=2, channel_base=16384, mbstd_group=4),
            ema=Ema(half_life_kimg=10.0, ramp=0.05),
            batch=32,
        ),
        # Minibatch, minibatch-std, R1 and averaging of the published configurations for FFHQ.
        Run(
            preset="stylegan2-256",
            precision="fp16",
            network=StyleGAN2Network(channel_base=16384, mbstd_group=8),
            recipe=StyleGAN2Recipe(r1_gamma=1.0),
            ema=Ema(half_life_kimg=20.0),
            batch=64,
        ),
        Run(
            preset="stylegan2-512",
            precision="fp16",
            network=StyleGAN2Network(mbstd_group=8),
            recipe=StyleGAN2Recipe(r1_gamma=0.5),
            ema=Ema(half_life_kimg=20.0),
            batch=64,
        ),
        Run(
            preset="stylegan2-1024",
            precision="fp16",
            network=StyleGAN2Network(mbstd_group=4),
            recipe=StyleGAN2Recipe(r1_gamma=2.0, lr=0.002),
            ema=Ema(half_life_kimg=10.0),
            batch=32,
        ),
        # Multi-scale gradients instead of growing, on what is otherwise stylegan2-256.
        Run(
            preset="msg-256",
            precision="fp16",
            network=MSGNetwork(channel_base=16384, mbstd_group=8),
            recipe=MSGRecipe(r1_gamma=1.0),
            ema=Ema(half_life_kimg=20.0),
            batch=64,
        ),
        # Grows from 4 px to that of the data set (64 px is meant) within a quarter of an hour on two CPU cores.
        Run(
            preset="progressive-cpu",
            network=ProgressiveNetwork(z_dim=128, channel_base=1024, channel_max=128),
            recipe=ProgressiveRecipe(loss="logistic", lr=0.003, r1_gamma=1.0),
            growth=Growth(start=4, stabilise_kimg=6, fade_kimg=3, batch=((4, 8), (8, 8))),
            ema=Ema(half_life_kimg=5.0, ramp=0.1),
            batch=16,
            total_kimg=52,
            tick_kimg=1,
            checkpoint_kimg=10,
            snapshot_kimg=10,
        ),
        # Weights of the penalties, averages and augmentation as published for FFHQ at this size. (The groups of the
        # augmentation and the length of the run are ours.)
        Run(
            preset="r3gan-256",
            precision="bf16",
            network=R3GANNetwork(),
            recipe=R3GANRecipe(gamma=150.0, gamma_end=15.0),
            augment=Augment(kind="fixed", p=0.3, warmup_kimg=20000.0),
            ema=Ema(half_life_kimg=500.0, warmup_kimg=20000.0),
            batch=256,
        ),
        Run(
            preset="r3gan-64",
            precision="bf16",
            network=R3GANNetwork(),
            recipe=R3GANRecipe(gamma=2.0, gamma_end=0.2),
            augment=Augment(kind="fixed", p=0.3, warmup_kimg=20000.0),
            ema=Ema(half_life_kimg=500.0, warmup_kimg=20000.0),
            batch=256,
        ),
        # A small one for some minutes on a CPU, up to 64 px. It trains; nobody has tuned it.
        Run(
            preset="r3gan-cpu",
            network=R3GANNetwork(channel_base=512, channel_max=128, blocks=1),
            recipe=R3GANRecipe(lr=1e-3, lr_end=2.5e-4, gamma=1.0, gamma_end=0.1, decay_kimg=100.0),
            ema=Ema(half_life_kimg=5.0, ramp=0.1),
            batch=16,
            total_kimg=100,
            tick_kimg=1,
            checkpoint_kimg=10,
            snapshot_kimg=10,
        ),
        # R3GAN's loss and schedules on StyleGAN2's networks, without minibatch std, path lengths and mixing.
        Run(
            preset="stylegan2-r3gan-256",
            precision="bf16",
            network=StyleGAN2Network(channel_base=16384, mbstd_group=1),
            recipe=R3GANRecipe(gamma=150.0, gamma_end=15.0),
            augment=Augment(kind="fixed", p=0.3, warmup_kimg=20000.0),
            ema=Ema(half_life_kimg=500.0, warmup_kimg=20000.0),
            batch=256,
        ),
        # Schedules, batches, learning rates and averages as published, for 8 GPUs.
        Run(
            preset="progressive-1024",
            network=ProgressiveNetwork(),
            recipe=ProgressiveRecipe(),
            growth=Growth(start=4, gpus=8),
            ema=Ema(decay=0.999),
            total_kimg=12000,
        ),
        Run(
            preset="stylegan1-1024",
            network=StyleGAN1Network(),
            recipe=StyleGAN1Recipe(),
            growth=Growth(start=8, gpus=8),
            ema=Ema(half_life_kimg=10.0),
            total_kimg=25000,
        ),
    ]
}
