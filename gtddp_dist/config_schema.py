"""The configuration schema: one frozen dataclass per group, with types, ranges, defaults and docs.

`Config` cannot hold an invalid configuration: ranges are checked field by field, and what several fields must
satisfy together by `consistency_problems`. Reading files and the command line is `gtddp_dist.config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from .bench.names import CONTENDERS
from .registry import DATA_SETS, MODELS, OPTIMIZERS, nearest_first

_GROUP = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _known(kind: str, names: Iterable[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            listed = ", ".join(nearest_first(name, names))
            # As context, not as template: the name is the user's and may hold braces.
            raise PydanticCustomError(
                "unknown_name",
                "one of the {kind}s (nearest first): {listed}",
                {"kind": kind, "listed": listed},
            )
        return name

    return AfterValidator(check)


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
FolderName = Annotated[str, Field(min_length=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
# YAML has lists and no tuples, hence not strict on the outside; the items stay strict.
IntList = Annotated[tuple[PositiveInt, ...], Strict(False)]
TextList = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)]
Duration = Annotated[str, Field(pattern=r"^(\d+-)?\d+(:[0-5]?\d){0,2}$")]
RatePair = Annotated[tuple[DecayRate, DecayRate], Strict(False)]


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class RunConfig:
    """Where a run is kept."""

    dir: FolderName | None = None
    """Run directory to create; null: runs/<config>-<time>."""
    baseline: bool = False
    """After training, also train the base optimizer at the same settings, into <run>/baseline."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class TrainConfig:
    """The training loop."""

    epochs: PositiveInt = 8
    """Passes over the training set."""
    steps: PositiveInt | None = None
    """Training steps; where set, it takes the place of train.epochs."""
    batch_size: PositiveInt = 32
    """Samples of one training step, over all replicas and micro-batches."""
    micro_batches: PositiveInt = 1
    """Micro-batches that a replica's share of the batch is cut into (gradient accumulation)."""
    replica_groups: PositiveInt = 1
    """Data-parallel replicas emulated in one process: a recursion each, and averaged controls."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initial weights, data order and every other random number."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Arithmetic; bfloat16 and float16 keep float32 weights under autocast, float16 with loss scaling."""
    channels_last: bool = False
    """Weights and activations of 2d convolutions with channels last in memory; the same numbers, faster on GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: the GPU where there is one."""
    threads: PositiveInt | None = None
    """CPU threads of torch; null: torch's own choice."""
    clip_norm: PositiveFloat | None = None
    """Largest global norm of the mean gradient; a longer one is scaled down to it."""
    max_nonfinite: PositiveInt = 10
    """Steps in a row refused for a non-finite loss or gradient before training stops with a checkpoint."""
    stalled_after_s: Annotated[float, Field(ge=1)] | None = 1200.0
    """Seconds without an end of a step after which the run ends, with all stacks in <run>/stalled; null: never."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class ScheduleConfig:
    """The learning rate over the run."""

    name: Literal["constant", "cosine", "step"] = "constant"
    """Shape of the decay after warm-up."""
    warmup_steps: Count = 0
    """Training steps over which the rate rises linearly to its full value."""
    min_factor: Share = 0.0
    """cosine: the rate at the end, as a share of the full rate."""
    milestones: IntList = ()
    """step: training steps after which the rate is multiplied by schedule.gamma, in increasing order."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: the factor."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class EvalConfig:
    """Measuring on the validation set."""

    every: PositiveInt | None = None
    """Training steps between two evaluations; null: one after each epoch."""
    batch_size: PositiveInt = 512
    """Samples of one forward pass."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class LogConfig:
    """What is shown and written while training."""

    every: PositiveInt = 10
    """Training steps between two lines of metrics.jsonl."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = True
    """Write TensorBoard files to <run>/tb."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class CheckpointConfig:
    """What `--resume` continues from."""

    every: PositiveInt | None = None
    """Training steps between two checkpoints; null: one after each epoch."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept; older ones are removed."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class DataConfig:
    """The data set."""

    name: Annotated[str, _known("data set", DATA_SETS)] = "digits"
    """Registered name of the data set."""
    dir: FolderName | None = None
    """Folder of the files of a data set that is not shipped with a library."""
    augment: bool | None = None
    """svhn, cifar10, cifar100: move training images by up to 4 pixels, and mirror CIFAR's, at random; null: yes."""
    download: bool = False
    """mnist, svhn, cifar10, cifar100: download what data.dir lacks, and compare checksums."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class ModelConfig:
    """The network."""

    name: Annotated[str, _known("model", MODELS)] = "small-resnet"
    """Registered name of the network."""
    blocks: PositiveInt = 1
    """small-resnet, nested-resnet, plain-net: number of blocks."""
    width: PositiveInt | None = None
    """Output channels of the first convolution; vit: numbers of a token. null: 16; vit: 64."""
    channels: IntList | None = None
    """small-resnet, plain-net: output channels of each block; null: 2 width if one, else width, 2 width, ..."""
    batch_norm: bool = False
    """small-resnet, nested-resnet, plain-net: a BatchNorm after each convolution."""
    activation: Literal["relu", "gelu", "silu", "elu", "softplus", "tanh", "sigmoid"] | None = None
    """small-resnet, nested-resnet, plain-net, coop-net: the non-linearity. null: relu; coop-net: tanh."""
    init_scale: PositiveFloat = 1.0
    """small-resnet, nested-resnet, plain-net: factor of all initial weights and biases but BatchNorm's."""
    stem: Literal["imagenet", "cifar"] = "cifar"
    """resnet*: the first layers: 7x7 of stride 2 and max-pooling (imagenet), or 3x3 of stride 1 (cifar)."""
    patch_size: PositiveInt | None = None
    """vit: pixels along a patch, a divisor of those along an image. null: 2 for less than 16, else 4."""
    depth: PositiveInt = 4
    """vit: number of transformer blocks."""
    heads: PositiveInt = 4
    """vit: attention heads of a block; a divisor of the width."""
    mlp_ratio: PositiveFloat = 2.0
    """vit: hidden units of a block's two linear layers, in widths."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class OptimizerConfig:
    """The optimizer. An option that is null takes the optimizer's own default."""

    name: Annotated[str, _known("optimizer", OPTIMIZERS)] = "gtddp-adam"
    """Registered name of the optimizer."""
    base: Literal["sgd", "rmsprop", "adam", "ekfac"] | None = None
    """ddpnopt-literal: the base optimizer, whose options count; null: sgd."""
    preset: Literal["paper"] | None = None
    """gtddp-*: paper sets every GT-DDP option as in the paper; options given beside it still count."""
    lr: PositiveFloat | None = None
    """Learning rate."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay (L2; decoupled in adamw, kfac and ekfac)."""
    no_decay: bool = False
    """Exempt biases and the parameters of normalisation layers from weight decay."""
    momentum: DecayRate | None = None
    """sgd, rmsprop: momentum."""
    dampening: Share | None = None
    """sgd: dampening of the momentum."""
    nesterov: bool | None = None
    """sgd: Nesterov momentum; needs momentum, and no dampening."""
    alpha: DecayRate | None = None
    """rmsprop: decay of the running mean of squared gradients."""
    betas: RatePair | None = None
    """adam, adamw: decays of the running means of the gradient and of its square."""
    eps: NonNegativeFloat | None = None
    """rmsprop, adam, adamw: added to the denominator."""
    centered: bool | None = None
    """rmsprop: divide by the standard deviation of the gradient in place of its root mean square."""
    amsgrad: bool | None = None
    """adam, adamw: divide by the largest running mean of squares so far."""
    damping: PositiveFloat | None = None
    """kfac, ekfac: added to the curvature when it is solved with."""
    factor_decay: DecayRate | None = None
    """kfac, ekfac: decay of the running means of factors and second moments."""
    factor_every: PositiveInt | None = None
    """kfac, ekfac: steps from one update of the factors to the next."""
    basis_every: PositiveInt | None = None
    """kfac, ekfac: steps from one decomposition of the factors to the next."""
    basis_method: Literal["eigh", "qr"] | None = None
    """ekfac: eigenvectors of the factors (eigh), or after the first time a step of orthogonal iteration (qr);
    kfac: eigh alone."""
    basis_spread: bool | None = None
    """kfac, ekfac: layers decompose their factors in turn, spread over the steps of basis_every."""
    basis_lag: NonNegativeInt | None = None
    """kfac, ekfac: steps that a decomposition has, in a background thread of the CPU; 0: it is made at once."""
    factors: Literal["unfolded", "spatially_uncorrelated", "reduced"] | None = None
    """kfac, ekfac: what factors of convolutions and token layers are made of."""
    fisher: Literal["empirical", "sampled"] | None = None
    """kfac, ekfac: factors of the batch's own gradients, or of labels sampled from the model."""
    max_factor_dim: PositiveInt | None = None
    """kfac, ekfac: largest factor allowed."""
    max_basis_failures: NonNegativeInt | None = None
    """kfac, ekfac: decompositions in a row that may fail before training stops."""
    gauss_newton_weight: NonNegativeFloat | Literal["1/B"] | None = None
    """Weight rho of the terminal Gauss-Newton Hessian; 0: the base optimizer; 1/B: one over the samples."""
    control_hessian: Literal["proximal", "replace"] | None = None
    """Q_uu: the base curvature with the Gauss-Newton term added (proximal), or by itself (replace)."""
    value_hessian: Literal["batch", "block_diagonal"] | None = None
    """V_zz: coupled over the samples of a recursion (batch), or one block a sample (block_diagonal)."""
    terminal: Literal["loss_gradient", "sampled", "exact"] | None = None
    """Curvature cotangent at the output: the loss gradient, that of sampled labels, or one for every class."""
    rollout: Literal["linear", "nonlinear"] | None = None
    """Forward sweep: linearised, or by running the stages with their new weights."""
    statistics: Literal["gradient", "value"] | None = None
    """What running curvature statistics are made of: the gradient, or the value function's Q_u."""
    metric: Literal["current", "previous"] | None = None
    """Whose curvature measures the sweep: this step's, or the one before's."""
    scope: Literal["batch", "micro_batch"] | PositiveInt | None = None
    """Samples of one recursion: a replica's batch, a micro-batch, or a divisor of the micro-batch."""
    momentum_of: Literal["step", "gradient"] | None = None
    """What momentum buffers keep: the corrected step, or the gradient alone."""
    cooperation: Literal["none", "theorem3", "exact", "corollary7"] | None = None
    """How a projection shortcut's layer and the last main-path layer decide together; other than none: kfac, ekfac."""
    projection: Literal["cooperative", "separate"] | None = None
    """A projection shortcut joins the last player of its main path (cooperative), or has its own stage (separate)."""
    replace_guard: bool | None = None
    """control_hessian=replace: keep the recursion from amplifying."""
    capture: Literal["gradient", "weighted"] | None = None
    """gradient also fills p.grad; weighted skips that pass, so nothing that reads p.grad can be used."""
    recompute: bool | None = None
    """Keep no inputs of layers, and make them anew in the backward pass and in the step: less memory, more time."""
    gram_memory: PositiveFloat | None = None
    """gtddp-sgd, -rmsprop, -adam, -adamw: megabytes for per-sample gradients; null: layers go the fastest way."""
    emsa_weight: PositiveFloat | None = None
    """emsa: weight r of the augmentation, which keeps states and costates where they are; null: 1."""
    emsa_iterations: PositiveInt | None = None
    """msa, emsa: iterations of L-BFGS in which a layer maximises its Hamiltonian; null: 10."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class ParallelConfig:
    """Ranks, as a grid of pipe times data."""

    pipe: PositiveInt = 1
    """Segments the network is cut into, one a rank."""
    data: PositiveInt = 1
    """Replicas, each with its share of the batch."""
    cuts: IntList | None = None
    """First stage of every segment but the first, in increasing order; null: balanced by the work of plan.costs."""
    sync_batch_norm: bool = False
    """BatchNorm over a micro-batch of all replicas, in place of each replica's own."""
    zero: Annotated[int, Field(ge=0, le=1)] = 0
    """1: replicas share out the state of a base optimizer (ZeRO-1)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """What carries tensors between ranks; auto: nccl on GPUs, else gloo."""
    lost_after_s: Annotated[float, Field(ge=5, le=3600)] = 30.0
    """Seconds without a sign of life after which a rank is taken for lost, and the run ends."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class LaunchConfig:
    """How `gtddp submit` and `gtddp sweep` run jobs; `gtddp train` takes no notice of it."""

    executor: Literal["slurm", "local", "debug"] = "slurm"
    """slurm: jobs in its queue; local: processes on this host; debug: in this very process."""
    nodes: PositiveInt = 1
    """Nodes of a job."""
    ranks_per_node: PositiveInt | None = None
    """Ranks on each node; null: parallel.pipe times parallel.data, over launch.nodes."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs on each node; null: none asked for."""
    cpus_per_rank: PositiveInt = 4
    """Cores of each rank."""
    memory_gb: PositiveFloat | None = None
    """Memory on each node; null: the cluster's default."""
    time: Duration | PositiveInt = 60
    """Time limit of one start, in minutes or as Slurm's [days-]hours:minutes:seconds."""
    partition: FolderName | None = None
    """Partition; null: the cluster's default."""
    account: FolderName | None = None
    """Account that is charged."""
    qos: FolderName | None = None
    """Quality of service."""
    constraint: FolderName | None = None
    """Features that nodes must have, such as v100."""
    exclude: FolderName | None = None
    """Nodes not to be used."""
    signal_before_s: PositiveInt = 120
    """Seconds before the time limit at which Slurm asks for a checkpoint."""
    max_restarts: NonNegativeInt = 3
    """How often a job is put back after failures. Time limits and preemptions do not count."""
    max_parallel: PositiveInt | None = None
    """sweep: jobs that run at once; null: as many as the cluster lets run; local: one."""
    pack: PositiveInt = 1
    """sweep: trials that share one job, and run in it at the same time."""
    setup: TextList = ()
    """Lines of shell that the job's script runs first, such as "module load cuda"."""
    sbatch: TextList = ()
    """Further options of sbatch, each as name=value, such as mail-type=END."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class PlanConfig:
    """What `gtddp plan` assumes of the machine."""

    costs: FolderName | None = None
    """File of the stages' measured costs (gtddp bench stages); null: counted from the network."""
    tflops: PositiveFloat = 10.0
    """Counted costs: floating-point operations a rank does in a second, in units of 10^12."""
    bandwidth: PositiveFloat = 10.0
    """Gigabytes that a link between two ranks carries in a second."""
    latency_us: NonNegativeFloat = 20.0
    """Microseconds that a message takes besides."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class BenchConfig:
    """What `gtddp bench` measures with: random images, so that no data set is needed."""

    image: IntList = (3, 32, 32)
    """Channels, height and width of an image."""
    classes: Annotated[int, Field(ge=2)] = 100
    """Classes of the network."""
    steps: PositiveInt = 10
    """Steps that are timed, of every contender in turn."""
    warmup: NonNegativeInt = 2
    """Steps before them that are not."""
    optimizers: Annotated[tuple[Annotated[str, _known("contender", CONTENDERS)], ...], Strict(False)] | None = None
    """step, memory, growth, all: what is measured beside torch's SGD; null: all contenders, of growth a few."""
    batch_sizes: IntList | None = None
    """memory, growth: batch sizes; null: train.batch_size, of growth 8 to 64. growth: [] leaves an axis out."""
    depths: IntList | None = None
    """growth: numbers of blocks (model.blocks; vit: model.depth); null: 1 to 8."""
    widths: IntList | None = None
    """growth: model.width, of all blocks; null: 8 to 64."""


@dataclass(frozen=True, kw_only=True, config=_GROUP)
class Config:
    """A complete, valid configuration."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = list(consistency_problems(self))
        if problems:
            text = "; ".join(f"{', '.join(problem.keys)}: {problem.message}" for problem in problems)
            raise PydanticCustomError(INCONSISTENT, "{text}", {"text": text, "problems": problems})
        return self


INCONSISTENT = "inconsistent"
"""Type of the pydantic error whose context holds, under "problems", what several fields break together."""

GROUPS: Mapping[str, type] = {
    "run": RunConfig,
    "train": TrainConfig,
    "schedule": ScheduleConfig,
    "eval": EvalConfig,
    "log": LogConfig,
    "checkpoint": CheckpointConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "parallel": ParallelConfig,
    "launch": LaunchConfig,
    "plan": PlanConfig,
    "bench": BenchConfig,
}
"""Group name -> its dataclass, in the order of `Config`."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with fields that are valid one by one."""

    keys: tuple[str, ...]
    """Dotted keys that take part."""
    message: str
    """What is expected, and what to do."""


def consistency_problems(config: Config) -> Iterator[Problem]:
    """What several fields break together; nothing for a consistent configuration."""
    yield from _unused_options("model", config.model, MODELS[config.model.name].options)
    yield from _unused_options("data", config.data, DATA_SETS[config.data.name].options)
    yield from _unused_options("optimizer", config.optimizer, OPTIMIZERS[config.optimizer.name].options)
    yield from _batch_problems(config)
    yield from _schedule_problems(config.schedule)
    yield from _optimizer_problems(config)
    if len(config.bench.image) != 3:
        yield Problem(("bench.image",), "expected channels, height and width")
    if config.model.channels is not None and len(config.model.channels) != config.model.blocks:
        yield Problem(("model.channels", "model.blocks"), "model.channels needs one number for each block")
    yield from _grid_problems(config)


def _unused_options(
    group: str, config: ModelConfig | DataConfig | OptimizerConfig, taken: tuple[str, ...]
) -> Iterator[Problem]:
    """Options set away from their default, although what `name` stands for does not take them."""
    for item in dataclasses.fields(config):
        if item.name != "name" and item.name not in taken and getattr(config, item.name) != item.default:
            options = ", ".join(taken) if taken else "none"
            yield Problem(
                (f"{group}.{item.name}", f"{group}.name"),
                f"{config.name} takes no option {item.name}; its options: {options}",
            )


def _grid_problems(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.data > 1 and config.train.replica_groups > 1:
        yield Problem(
            ("parallel.data", "train.replica_groups"),
            "replicas are ranks (parallel.data) or emulated in one process (train.replica_groups), not both",
        )
    if parallel.cuts is not None:
        if len(parallel.cuts) != parallel.pipe - 1:
            yield Problem(("parallel.cuts", "parallel.pipe"), f"{parallel.pipe} segments need {parallel.pipe - 1} cuts")
        if list(parallel.cuts) != sorted(set(parallel.cuts)):
            yield Problem(("parallel.cuts",), "expected stages in increasing order, each once")
    if config.train.channels_last and parallel.pipe * parallel.data > 1:
        yield Problem(
            ("train.channels_last", "parallel.pipe", "parallel.data"),
            "DeepSpeed's engine sends weights as they lie in memory, and takes no other layout than torch's own: "
            "take train.channels_last=false on ranks",
        )
    if config.optimizer.gram_memory is not None and parallel.pipe * parallel.data > 1:
        yield Problem(
            ("optimizer.gram_memory", "parallel.pipe", "parallel.data"),
            "gram_memory is not offered on ranks: take null, and a smaller micro-batch or scope",
        )
    if config.optimizer.recompute and parallel.pipe * parallel.data > 1:
        yield Problem(
            ("optimizer.recompute", "parallel.pipe", "parallel.data"),
            "recompute is not offered on ranks: take recompute=false; more micro-batches (train.micro_batches) save "
            "memory there, too",
        )
    if parallel.zero and not config.optimizer.name.startswith(("sgd", "rmsprop", "adam")):
        yield Problem(
            ("parallel.zero", "optimizer.name"),
            f"{config.optimizer.name} needs all of a layer's state in every replica (the sweep's metric is made of "
            "it): ZeRO-1 is for the base optimizers sgd, rmsprop, adam and adamw",
        )


def _batch_problems(config: Config) -> Iterator[Problem]:
    train, scope = config.train, config.optimizer.scope
    replicas = config.parallel.data * train.replica_groups
    parts = train.micro_batches * replicas
    if train.batch_size % parts:
        name = "data" if config.parallel.data > 1 else "replica_groups"
        yield Problem(
            ("train.batch_size", "train.micro_batches", "train.replica_groups", "parallel.data"),
            f"train.batch_size must be a multiple of micro_batches * {name} = {parts}",
        )
    elif isinstance(scope, int) and (train.batch_size // parts) % scope:
        yield Problem(
            ("optimizer.scope", "train.batch_size", "train.micro_batches", "train.replica_groups", "parallel.data"),
            f"a number as optimizer.scope must divide the micro-batch of {train.batch_size // parts} samples",
        )


def _schedule_problems(schedule: ScheduleConfig) -> Iterator[Problem]:
    defaults = ScheduleConfig()
    for key, name in (("min_factor", "cosine"), ("milestones", "step"), ("gamma", "step")):
        if name != schedule.name and getattr(schedule, key) != getattr(defaults, key):
            yield Problem((f"schedule.{key}", "schedule.name"), f"only schedule.name={name} uses schedule.{key}")
    if schedule.name == "step" and not schedule.milestones:
        yield Problem(("schedule.name",), "schedule.name=step needs schedule.milestones, a list of steps")
    if list(schedule.milestones) != sorted(set(schedule.milestones)):
        yield Problem(("schedule.milestones",), "expected steps in increasing order, each once")


def _whole_batch_problems(config: Config) -> Iterator[Problem]:
    """What an optimizer rules out that takes its step from one forward pass over the whole batch."""
    train, parallel, name = config.train, config.parallel, config.optimizer.name
    for key, value in (
        ("parallel.pipe", parallel.pipe),
        ("parallel.data", parallel.data),
        ("train.micro_batches", train.micro_batches),
        ("train.replica_groups", train.replica_groups),
    ):
        if value > 1:
            yield Problem((key, "optimizer.name"), f"{name} takes the whole batch at once, in one process: expected 1")
    if train.clip_norm is not None:
        yield Problem(("train.clip_norm", "optimizer.name"), f"{name} does not step along the gradient: expected null")
    if train.dtype not in ("float32", "float64"):
        yield Problem(("train.dtype", "optimizer.name"), f"{name} needs float32 or float64")


def _optimizer_problems(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    entry = OPTIMIZERS[optimizer.name]
    if entry.whole_batch:
        yield from _whole_batch_problems(config)
    if optimizer.name == "msa" and not optimizer.weight_decay:
        yield Problem(
            ("optimizer.weight_decay", "optimizer.name"),
            "msa needs a weight decay above 0: without a running cost the Hamiltonian of a linear layer has no maximum",
        )
    if "base" in entry.options:
        base = optimizer.base or "sgd"
        for option in entry.options:
            taken = option in ("base", "gauss_newton_weight", *OPTIMIZERS[base].options)
            if not taken and getattr(optimizer, option) not in (None, False):
                yield Problem((f"optimizer.{option}", "optimizer.base"), f"{base} takes no option {option}")
    if config.run.baseline and entry.base is None:
        yield Problem(
            ("run.baseline", "optimizer.name"),
            f"{optimizer.name} is a base optimizer itself; a baseline is for gtddp-* and ddpnopt-* optimizers",
        )
    if optimizer.gram_memory is not None and entry.base in ("kfac", "ekfac"):
        yield Problem(
            ("optimizer.gram_memory", "optimizer.name"),
            f"{entry.base} needs all of a layer's inputs, rotated: take null, and a smaller optimizer.scope",
        )
    # The paper's preset takes its statistics from the value function.
    statistics = optimizer.statistics or ("value" if optimizer.preset == "paper" else "gradient")
    if statistics == "value" and optimizer.metric == "previous":
        yield Problem(
            ("optimizer.statistics", "optimizer.preset", "optimizer.metric"),
            "value statistics are known during the sweep, not before: they need optimizer.metric=current",
        )
    if optimizer.projection == "separate" and optimizer.cooperation not in (None, "none"):
        yield Problem(
            ("optimizer.projection", "optimizer.cooperation"),
            "a projection that is a stage of its own has nobody to cooperate with: take projection=cooperative, or "
            "cooperation=none",
        )
    if config.train.dtype == "float16" and optimizer.capture == "weighted":
        yield Problem(
            ("train.dtype", "optimizer.capture"),
            "loss scaling reads p.grad, which capture=weighted does not fill: take capture=gradient",
        )
    if optimizer.basis_method == "qr" and (entry.base or optimizer.name) == "kfac":
        yield Problem(
            ("optimizer.basis_method", "optimizer.name"),
            "KFAC needs the factors' eigenvectors: in another basis what it solves with is not diagonal; take "
            "basis_method=eigh, or ekfac",
        )
    if optimizer.basis_lag and optimizer.basis_every and optimizer.basis_lag >= optimizer.basis_every:
        yield Problem(
            ("optimizer.basis_lag", "optimizer.basis_every"),
            f"bases are used before the next are begun: expected less than {optimizer.basis_every}, or a larger "
            "optimizer.basis_every",
        )
    if optimizer.nesterov and (not optimizer.momentum or optimizer.dampening):
        yield Problem(
            ("optimizer.nesterov", "optimizer.momentum", "optimizer.dampening"),
            "Nesterov momentum needs a momentum above 0 and no dampening",
        )
