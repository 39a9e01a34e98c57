"""The one typed tree of settings. Defaults live here (those of tower, scorers, captioner and MLE in config_models.py) and nowhere else.

A run is described by a preset (`presets/<name>.yaml`) or a file of the same form, and dotted overrides:

    settings = load_settings("demo", ["rl.learning_rate=1e-4", "seed=3"])

An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from finecap_ray.config_models import (
    Autocast,
    CaptionerSettings,
    JudgeSettings,
    MleSettings,
    Precision,
    ScorerSettings,
    Section,
    TowerSettings,
)
from finecap_ray.config_trainable import TrainableSettings
from finecap_ray.errors import ConfigError
from finecap_ray.settings_file import explain, read_tree, set_dotted

BagSize = Annotated[int, Field(ge=2)]


class DataSettings(Section):
    examples: str = "fluent"
    """`fluent` (embedded), or a parquet file or folder of examples (path or URI)."""
    max_bad_fraction: float = Field(0.02, ge=0, le=1)
    """A job stops when more than this share of the images can't be used."""


class ImportSettings(Section):
    """`finecap import`; how much may be bad is `data.max_bad_fraction`."""

    format: Literal["auto", "folder", "coco", "parquet", "hf_datasets", "webdataset"] = "auto"
    """`auto` tells by the look of the source."""
    longest_side: int | None = Field(512, ge=32)
    """Pixels; larger images are scaled down. None: no image is made smaller."""
    jpeg_quality: int = Field(90, ge=1, le=100)
    """Of the images that are encoded anew: scaled, turned upright, transparent, animated, or of another kind."""
    split: str = "train"
    """Of the images whose source gives none."""
    fetch_urls: bool = False
    """Fetch the images that a source names by URL alone (a column url, COCO's coco_url). Otherwise they are left out."""
    fetch_timeout_s: float = Field(20, gt=0)
    fetch_max_bytes: int = Field(50_000_000, ge=1)
    """Of one image."""


class BagSettings(Section):
    sizes: tuple[BagSize, ...] = (2, 3, 5)
    """Bag sizes mined on the training split."""
    max_bags_per_image: int | None = Field(1, ge=1)
    """1: disjoint bags. None: one bag per seed (NDLB). Evaluation bags are always disjoint."""
    kind: Literal["look_alike", "conditional", "random"] = "look_alike"
    """`conditional`: alike but for the words of `word_class`. `random`: the control. Of the training split's bags alone."""
    compare: Literal["image", "image_and_captions"] = "image"
    """What is alike: the image embeddings, or these plus the mean embedding of the image's captions (NDLB)."""
    word_class: Literal["colour", "number", "size", "person", "material"] = "colour"
    """What the captions of a conditional bag differ in."""
    near_duplicate: float | None = Field(None, gt=0, le=1)
    """Cosine of the image embeddings above which two images are one picture, and never share a bag. None: no ceiling."""
    least_similarity: float | None = Field(None, gt=-1, le=1)
    """Mean cosine of its pairs below which images are no bag of look-alikes, and left over. None: every bag is kept."""
    truematch: str | None = None
    """File of bags in TrueMatch's format, taken instead of mined ones: of each split those whose images are all in it."""
    neighbours: int = Field(64, ge=1)
    """Nearest neighbours searched per image; a seed whose free neighbours run out is left over."""
    target_recall: float = Field(0.97, gt=0, le=1)
    """Share of the true neighbours that the search of large sets (over 20,000 images) tries to find."""
    rows_per_group: int = Field(32, ge=1)
    """Bags per parquet row group: what a worker reads at a time."""


class Stage(Section):
    """Some epochs over the bags of one size."""

    bag_size: BagSize
    epochs: int = Field(ge=1)
    band: tuple[float, float] = (0.0, 1.0)
    """From and to which quantile of similarity: 0 the bags least alike, 1 those most alike. (0, 1) is all bags."""

    @model_validator(mode="after")
    def _the_band_is_one(self) -> Stage:
        low, high = self.band
        if not 0 <= low < high <= 1:
            raise ValueError(f"the band {low:g} to {high:g} is none: give two numbers from 0 to 1, the lower one first")
        return self


class RewardSettings(Section):
    """Weights of the reward's components; a component with weight 0 is not computed. Penalties are 0 at best, or negative."""

    self_retrieval: float = 1.0
    kind: Literal["logprob", "probability", "accuracy", "similarity"] = "logprob"
    """What self-retrieval pays: log-probability of the own image, its probability, whether it is first, or the cosine."""
    scope: Literal["bag", "batch"] = "batch"
    """Which images compete: the own bag, or every image of the step."""
    hard_negatives: int = Field(0, ge=0)
    """Images of the training split, those nearest to the own one, that compete as well."""
    logit_scale: float | None = Field(None, gt=0)
    """s in s * cos; None takes the scorer's learned scale. Softer is more robust: a wrong pick then costs less."""
    clip_score: float = 0.0
    """Weight of 2.5 max(cos, 0) with the own image."""
    ref_clip_score: float = 0.0
    """Weight of the harmonic mean of that and the cosine of the closest human caption."""
    text_prefix: str = ""
    """Stands before captions and references where the scorer reads them: "A photo depicts " in CLIPScore's numbers."""
    cider: float = 3.0
    """Weight of CIDEr-D against the image's own captions (in units of CIDEr / 10, so about 0 to 1)."""
    cider_frequencies: Literal["corpus", "batch"] = "corpus"
    """How rare an n-gram is: among the captions of the training split, or of the step's images."""
    length: float = Field(0.0, ge=0)
    """Weight of the penalty on words past `longest`: -1 at twice as many."""
    longest: int = Field(20, ge=1)
    """Words, punctuation included; 3 % of the human captions of Flickr8k are longer."""
    ended: float = Field(0.1, ge=0)
    """Weight of the penalty of -1 on captions that are cut at the token limit, or end in white space."""
    repetition: float = Field(0.5, ge=0)
    """Weight of the penalty on pairs of words said twice: minus their share."""


class RlSettings(Section):
    """The defaults of advantage, reward, average and share of the start are those of the best runs on photographs, which had
    `logit_scale: 10` as well (benchmarks/photos/RESULTS.md); papers' recipes are presets."""

    images_per_step: int = Field(60, ge=2)
    captions_per_image: int = Field(6, ge=1)
    """1 needs an advantage across images (batch_mean, running_mean) or against the greedy caption."""
    micro_batch: int = Field(480, ge=1)
    """Captions per forward pass and worker."""
    curriculum: tuple[Stage, ...] = (
        Stage(bag_size=2, epochs=1),
        Stage(bag_size=3, epochs=1),
        Stage(bag_size=5, epochs=1),
    )
    groups_per_window: int = Field(16, ge=1)
    """Row groups whose bags are shuffled together: a larger window mixes better, and is what a reader holds."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps even if the curriculum isn't over."""
    advantage: Literal["leave_one_out", "group_mean", "group_normalised", "batch_mean", "running_mean", "greedy"] = (
        "group_normalised"
    )
    """What a reward is compared with; `greedy` samples one more caption per image, the most probable one."""
    reward: RewardSettings = RewardSettings()
    trainable: TrainableSettings = TrainableSettings()
    learning_rate: float = Field(3e-4, ge=0)
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    loss_type: Literal["dr_grpo", "grpo", "bnpo", "dapo"] = "dr_grpo"
    """TRL's names. dr_grpo: summed over tokens, over a constant; grpo: mean over a caption's tokens; dapo: over all tokens."""
    updates_per_step: int = Field(1, ge=1)
    """Optimizer steps on the captions of a step. With 1 the policy is the one that sampled them: the ratio is 1, nothing is clipped."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    """PPO: a ratio p / p(sampler) past 1 - clip_low or 1 + clip_high pays no more (DAPO's clip-higher: 0.28)."""
    ratio: Literal["token", "sequence"] = "token"
    """What the ratio is of: each token (PPO), or a caption, as the geometric mean over its tokens (GSPO; clips of about 3e-4)."""
    kl_weight: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the start (k3 estimate)."""
    average_decay: float = Field(0.99, ge=0, lt=1)
    """Of the moving average of the weights that the run ends with, per optimizer step (0.99: of about 100, and a shorter run stays
    near its start); 0: the last weights."""
    start_share: float = Field(0.4, ge=0, lt=1)
    """Share of the start in the weights of the result: the start's times this, those that the run ends with times the rest."""
    temperature: float = Field(1.0, gt=0, le=2)
    """In sampling and in the trainer's log-probs alike; 2 is vLLM's limit."""
    bf16: Autocast = False
    """As `mle.bf16`; raise `drift_bound` with it."""
    drift_bound: float = Field(1e-3, gt=0)
    """Largest mean |log p(sampler) - log p(trainer)| per token, in nats; past it the run stops. Raise it for bfloat16."""
    save_every: int = Field(20, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    num_workers: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _the_advantage_has_something_to_compare(self) -> RlSettings:
        if self.captions_per_image < 2 and self.advantage in ("leave_one_out", "group_mean", "group_normalised"):
            raise ValueError(
                f"advantage {self.advantage} compares the captions of an image, and captions_per_image is "
                f"{self.captions_per_image}: set it to 2 or more, or use batch_mean, running_mean or greedy"
            )
        return self


class EvaluationSettings(Section):
    """`bag_size` to `bootstrap_samples` belong to the evaluation of a run, the others to that of a checkpoint or a captions file."""

    bag_size: BagSize = 5
    """Of the headline."""
    more_bag_sizes: tuple[BagSize, ...] = ()
    """Further sizes, of the same splits: their numbers stand beside the headline's."""
    groups: dict[str, str] = Field({"seen": "test_seen", "unseen": "test_unseen"})
    """Name of a group -> split it is mined on; all groups together are the `whole`."""
    bootstrap_samples: int = Field(2000, ge=100)
    report_bags: int = Field(500, ge=1)
    """Most bags that a report shows."""
    against: tuple[str, ...] = ("random:100",)
    """`bags:FILE` (TrueMatch's form, or a bag set folder), `random:SIZE`, `all`, `imagecode:FILE`."""
    decoding: str = "greedy"
    """`greedy`, or `best:N`: of N samples the one the captioner finds most probable, at `temperature`."""
    temperature: float = Field(0.7, gt=0, le=2)
    """Of the samples of `best:N`."""
    batch_size: int = Field(256, ge=1)
    """Images captioned at a time."""
    tokenisation: Literal["coco", "keep_punctuation"] = "coco"
    java_metrics: tuple[Literal["METEOR", "SPICE"], ...] = ("METEOR", "SPICE")
    """Those of pycocoevalcap that run in Java; where they can't, the results say why."""
    synonyms: str = "coco"
    """Objects and their names for the object precision: `coco` (embedded), or a file in CHAIR's form."""
    finecapeval: str | None = None
    """FineCapEval.csv, for the coverage of its aspects."""
    finecapeval_matching: Literal["paper", "token"] = "token"
    nli_judge: str | None = None
    """MODULE:CLASS of a judge that reads references (finecap_ray/evaluation/faithfulness.py), for the score of MOCHa."""
    vlm_judge: str | None = None
    """MODULE:CLASS of a judge that sees the image."""

    @property
    def bag_sizes(self) -> tuple[int, ...]:
        """The headline's first."""
        return tuple(dict.fromkeys((self.bag_size, *self.more_bag_sizes)))

    @field_validator("groups")
    @classmethod
    def _groups_have_names_of_their_own(cls, groups: dict[str, str]) -> dict[str, str]:
        if not groups or "whole" in groups:
            raise ValueError("name a group or more, none of them `whole`, which is all of them together")
        if "train" in groups.values():
            raise ValueError(
                "the split `train` is what training sees: evaluate on another (`finecap import` says how images get one)"
            )
        return groups


class ResourceSettings(Section):
    """What each process may take. Ray counts logical CPUs; threads are what torch and vLLM really use."""

    address: str | None = None
    """Ray address of a cluster; None uses the one in RAY_ADDRESS, or starts Ray here."""
    num_cpus: int = Field(8, ge=1)
    """Logical CPUs of a Ray started here."""
    object_store_mb: int = Field(512, ge=80)
    threads: int = Field(2, ge=1)
    """torch threads per process."""
    use_gpu: bool = False
    gpu_share: float = Field(1, gt=0, le=1)
    """Of a GPU, what each trainer, sampler, scorer and engine takes with `use_gpu`: with 0.3 one GPU does for RL."""
    scorer_gpu_share: float | None = Field(None, ge=0, le=1)
    """The same of each reward scorer, which may need far less than trainer and sampler; None: `gpu_share`."""
    samplers: int = Field(1, ge=1)
    sampler_dtype: Precision = "float32"
    """`auto`, as of `scorer_dtype`: bfloat16 where the machine that samples (or scores) computes in it, as with `mle.bf16`."""
    sampler_kv_cache_gb: float | None = Field(None, gt=0)
    """GiB of vLLM's cache, which has to hold the longest prompt with its longest caption. None: 1, or on a GPU what 0.9 of
    `gpu_share` leaves."""
    sampler_max_sequences: int = Field(512, ge=1)
    scorers: int = Field(1, ge=1)
    scorer_dtype: Precision = "float32"
    """Of the reward scorer while it reads captions in RL; evaluation is in float32 always."""
    start_timeout_s: float = Field(300, gt=0)
    step_timeout_s: float = Field(300, gt=0)
    work_timeout_s: float = Field(86_400, gt=0)
    """Longest piece of work that one process is given whole: training a scorer, embedding a split, judging it."""

    @property
    def gpus(self) -> float:
        """GPUs that Ray reserves for a process that computes."""
        return self.gpu_share if self.use_gpu else 0

    @property
    def scorer_gpus(self) -> float:
        """The same for a reward scorer."""
        return self.gpus if self.scorer_gpu_share is None else self.scorer_gpu_share * self.use_gpu

    @property
    def asked(self) -> str:
        """What Ray reserves in words, CPU included: for error messages."""
        return f"1 CPU and {self.gpus:g} GPU" if self.use_gpu else "1 CPU"

    @property
    def kv_cache_bytes(self) -> int | None:
        """None: vLLM takes what there is."""
        if self.sampler_kv_cache_gb is None and self.use_gpu:
            return None
        return int((self.sampler_kv_cache_gb or 1) * 2**30)


class ServeSettings(Section):
    """The captioning service. It asks for no password: put it behind something that does before it leaves the machine."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 answers other machines."""
    port: int = Field(8000, ge=1, le=65535)
    replicas: int = Field(1, ge=1)
    """Caption engines; each takes 1 CPU, and `resources.gpu_share` of a GPU where `use_gpu`."""
    max_batch_size: int = Field(32, ge=1)
    """Most images captioned together."""
    batch_wait_s: float = Field(0.01, ge=0)
    """How long the first image of a batch waits for company."""
    max_queued: int = Field(256, ge=1)
    """Images that may wait for an engine; further ones are turned away with 503."""
    max_image_bytes: int = Field(10 * 2**20, ge=1)
    max_image_pixels: int = Field(50_000_000, ge=1)
    """Width times height: a small file may unpack to a huge image."""
    max_captions: int = Field(16, ge=1)
    """Most captions of one image per request."""
    request_timeout_s: float = Field(60, gt=0)


class Settings(Section):
    name: str = "run"
    seed: int = Field(0, ge=0)
    run_dir: str = "runs/run"
    data: DataSettings = DataSettings()
    importing: ImportSettings = ImportSettings()
    tower: TowerSettings = TowerSettings()
    scorer: ScorerSettings = ScorerSettings()
    judge: JudgeSettings = JudgeSettings()
    captioner: CaptionerSettings = CaptionerSettings()
    mle: MleSettings = MleSettings()
    bags: BagSettings = BagSettings()
    rl: RlSettings = RlSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    resources: ResourceSettings = ResourceSettings()
    serve: ServeSettings = ServeSettings()

    @field_validator("run_dir")
    @classmethod
    def _a_run_is_in_a_file_system(cls, path: str) -> str:
        if "://" in path:
            raise ValueError("a run folder is a path, on a file system that all nodes share (examples may be a URI)")
        return path

    @model_validator(mode="after")
    def _there_is_something_to_start_from(self) -> Settings:
        if self.captioner.spec is None and self.mle.epochs == 0:
            raise ValueError(
                "mle.epochs=0 starts RL from captioner.spec, and none is given: name a folder or a hub name"
            )
        if self.captioner.spec is None and self.rl.trainable.vision != "frozen":
            raise ValueError(
                f"rl.trainable.vision={self.rl.trainable.vision}: the captioner is a ClipCap, whose features come with the bags; "
                "leave it frozen, or name an image-text model in captioner.spec"
            )
        return self

    @model_validator(mode="after")
    def _bags_fit_the_curriculum(self) -> Settings:
        missing = sorted({stage.bag_size for stage in self.rl.curriculum} - set(self.bags.sizes))
        if missing:
            raise ValueError(
                f"rl.curriculum uses bags of {missing}, bags.sizes builds {list(self.bags.sizes)}: add the missing sizes"
            )
        return self


def load_settings(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """Settings of a preset or YAML file, with `dotted.key=value` overrides (values are YAML).

    Raises ConfigError for a missing file, an unknown key (naming the nearest one) or a value out of range.
    """
    tree = read_tree(source)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no '=': write key=value, for example rl.learning_rate=1e-4")
        try:
            set_dotted(tree, key.strip().split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(
                f"override {override!r}: the value isn't valid YAML ({' '.join(str(error).split())})"
            ) from None
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, Settings)) from None


def dump_settings(settings: Settings) -> str:
    """The resolved tree as YAML; `load_settings` of it gives equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
