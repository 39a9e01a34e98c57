"""Train a dual encoder: open_clip's model and loss; each tower frozen (its output is cached), or trained in part or whole.

Loss = open_clip's contrastive loss + damaged_weight * (own caption against a damaged copy of it, at the same scale).
"""

from __future__ import annotations

import json
import random
import time
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from finecap_ray.bags.mining import mine_bags
from finecap_ray.config import ScorerSettings
from finecap_ray.errors import DataError
from finecap_ray.evaluation.retrieval import recall_at_1
from finecap_ray.scorers.damage import damage
from finecap_ray.scorers.images import CaptionedFeatures, ImageTable, Standard, fold_standardisation
from finecap_ray.scorers.members import Member, split_heads
from finecap_ray.scorers.packages import minilm_folder
from finecap_ray.scorers.scorer import FACTS_FILE, Scorer, load_scorer, save_scorer, text_lengths
from finecap_ray.scorers.smollm2_text import smollm2_text_folder
from finecap_ray.scorers.tower import FrozenTower

_PRETRAINED_TEXTS = {  # the name that a scorer's config keeps, and the folder
    "minilm": ("all-minilm-l6-v2", minilm_folder),
    "smollm2": ("smollm2-text", partial(smollm2_text_folder, "scorer.text or judge.text")),
}
_EVALUATED = 64  # dev images and captions at a time
_DAMAGED_COPIES = 2  # per caption; drawn anew each epoch from these, so that a frozen text tower embeds each text once


def train_scorer(
    settings: ScorerSettings, tower: FrozenTower, train: CaptionedFeatures, dev: CaptionedFeatures, folder: Path
) -> dict[str, Any]:
    """Trains on the images and captions of `train`, writes a scorer into `folder` and returns its facts (also in scorer.json).

    The facts hold its warrant: R@1 among 100 random dev images from their first caption each (chance 1 %), and from
    all of `dev` at once; and, where it is asked for, that R@1 along the way. Their `tower_digest` is that of the tower whose
    features it takes, "" for one that takes images only. Raises DataError when there are fewer images than two, or no dev image
    with a caption where the best weights are to be chosen by them.
    """
    train, dev = train.captioned(), dev.captioned()
    if len(train) < 2:
        raise DataError(f"a scorer needs at least 2 images with captions to train on, got {len(train)}")
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    model, config, tokenizer = _build(settings, tower)
    frozen_text = settings.pretrained_text and not settings.text_layers
    texts = _TextTable(model, tokenizer, train.captions, rng, frozen_text)
    images = ImageTable(model.visual, tower, settings, train)
    standard = images.standard()

    batches = max(1, len(train) // settings.batch_size)
    optimizer, schedule = _optimizer(settings, model, batches)
    groups = _neighbourhoods(Standard.of(train.features)(train.features), settings.neighbourhood, settings.seed)
    contrastive = open_clip.ClipLoss()
    head, dropout = model.visual.head, nn.Dropout(settings.feature_dropout)
    if settings.members > 1:
        members = split_heads(head, model.text.proj, settings.members)
    else:
        members = [Member(head, model.text.proj if frozen_text else nn.Identity())]
    model.text.train(not frozen_text)
    head.train()  # not the trunk: its BatchNorm keeps the statistics it came with
    best = _Best(
        settings, model, tokenizer, texts, ImageTable(model.visual, tower, settings, dev), standard, dev.captions
    )
    for epoch in range(settings.epochs):
        for rows in _shuffled(groups).tensor_split(batches):
            seen, scale = standard(images.seen(rows)), model.logit_scale.exp()
            losses = []
            for member in members:
                clean, damaged = texts.draw(rows.tolist(), rng)
                image = nn.functional.normalize(member.image(dropout(seen)), dim=-1)
                text = nn.functional.normalize(member.text(texts.read(clean)), dim=-1)
                loss = contrastive(image, text, scale)
                if settings.damaged_weight:
                    worse = nn.functional.normalize(member.text(texts.read(damaged)), dim=-1)
                    loss = loss + settings.damaged_weight * _preference(image, text, worse, scale)
                losses.append(loss)
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)  # at most 100, as in CLIP
        if best.ends_with(epoch):
            break
    best.restore()
    fold_standardisation(head, standard)
    preprocess = {"mean": tower.mean, "std": tower.std, "size": tower.image_size}
    facts = {"tower_digest": "" if settings.looks_at_images else tower.digest}
    facts |= {"images": len(train), "text": settings.text, "seed": settings.seed}
    if best.recalls:
        facts["evaluated"] = best.recalls
    save_scorer(folder, model.eval(), config, preprocess, tokenizer, facts)

    scorer = load_scorer(folder)
    facts |= {
        "digest": scorer.digest,
        "logit_scale": scorer.logit_scale,
        "seconds": time.perf_counter() - started,
    } | _warrant(scorer, dev)
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return facts


def _preference(
    image: Float[Tensor, "n D"], text: Float[Tensor, "n D"], worse: Float[Tensor, "n D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """-log of the probability that an image prefers its caption to the damaged copy."""
    margin = scale * ((image * text).sum(-1) - (image * worse).sum(-1))
    return nn.functional.softplus(-margin).mean()


def _build(settings: ScorerSettings, tower: FrozenTower) -> tuple[nn.Module, dict[str, Any], Any]:
    name = f"effnet_lite0_{'pretrained' if settings.pretrained_text else 'scratch'}"
    path = resources.files("finecap_ray.scorers") / "models" / f"{name}.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["embed_dim"] = settings.embed_dim
    config["vision_cfg"] |= {"timm_model_name": tower.name, "image_size": tower.image_size}
    if settings.pooling == "spatial":
        config["vision_cfg"] |= {"timm_pool": "abs_attn", "timm_proj": ""}
    config["text_cfg"]["context_length"] = settings.context_length
    text_config = dict(config["text_cfg"])
    if settings.pretrained_text:
        kept, folder = _PRETRAINED_TEXTS[settings.text]
        config["text_cfg"] |= {"hf_model_name": kept, "hf_tokenizer_name": kept}
        hf = str(folder())
        text_config |= {"hf_model_name": hf, "hf_tokenizer_name": hf, "hf_model_pretrained": True}
    with resources.as_file(path) as file:
        open_clip.add_model_config(file)
    model = open_clip.create_model(
        name, embed_dim=settings.embed_dim, vision_cfg=config["vision_cfg"], text_cfg=text_config
    )
    model.visual.trunk.load_state_dict(tower.model.state_dict())
    if settings.pretrained_text:
        tokenizer = open_clip.tokenizer.HFTokenizer(hf, context_length=settings.context_length)
    else:
        tokenizer = open_clip.SimpleTokenizer(context_length=settings.context_length)
    model.requires_grad_(True)
    model.visual.lock(settings.image_groups)
    if settings.pretrained_text:
        # open_clip's own `lock` knows no layers of either.
        text = model.text.transformer.requires_grad_(False)
        if settings.text == "minilm":
            layers = [text.embeddings, *text.encoder.layer]
        else:
            layers = [text.embed_tokens, *text.layers]
        for layer in layers[::-1][: settings.text_layers]:
            layer.requires_grad_(True)
    return model.eval().to(tower.device), config, tokenizer


def _optimizer(settings: ScorerSettings, model: nn.Module, batches: int):
    """AdamW over what trains, and its schedule: pretrained layers at a rate of their own."""
    pretrained = ("visual.trunk.", "text.transformer.") if settings.pretrained_text else ("visual.trunk.",)
    towers, heads = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (towers if name.startswith(pretrained) else heads).append(parameter)
    groups = [{"params": heads, "lr": settings.learning_rate}]
    if towers:
        groups.append({"params": towers, "lr": settings.tower_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    rates = [group["lr"] for group in groups]
    steps = settings.epochs * batches
    rising = 0.1 if steps != 10 else 0.2  # OneCycleLR divides by (rising * steps - 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=rising)
    return optimizer, schedule


def _neighbourhoods(features: Float[Tensor, "N F"], size: int, seed: int) -> list[Tensor]:
    """Rows in groups of look-alikes; those that fit nowhere stand alone."""
    if size == 1 or len(features) <= size:
        return list(torch.arange(len(features)).split(1))
    unit = nn.functional.normalize(features, dim=-1).numpy()
    groups = [torch.tensor(bag) for bag in mine_bags(unit, size, seed)]
    alone = set(range(len(features))) - set(torch.cat(groups).tolist()) if groups else set(range(len(features)))
    return groups + [torch.tensor([row]) for row in sorted(alone)]


def _shuffled(groups: list[Tensor]) -> Tensor:
    """All rows, groups in a new order."""
    return torch.cat([groups[index] for index in torch.randperm(len(groups)).tolist()])


class _TextTable:
    """The captions of each image and damaged copies of each; behind a frozen text tower each is run through it once."""

    def __init__(
        self, model: nn.Module, tokenizer, captions: list[list[str]], rng: random.Random, frozen: bool
    ) -> None:
        self.model, self.captions, self.frozen = model, captions, frozen
        vocabulary = sorted({word for own in captions for text in own for word in text.split()})
        unique = sorted({text for own in captions for text in own})
        self.damaged = {text: [damage(text, vocabulary, rng) for _ in range(_DAMAGED_COPIES)] for text in unique}
        every = list(dict.fromkeys([*unique, *(copy for copies in self.damaged.values() for copy in copies)]))
        self.row = {text: index for index, text in enumerate(every)}
        self.tokenizer = tokenizer
        self.tokens = tokenizer(every).to(next(model.parameters()).device)
        self.pooled = self.pool(self.tokens) if frozen else None

    def draw(self, images: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
        """Rows of one caption of each image, and of one damaged copy of it."""
        clean = [rng.choice(self.captions[image]) for image in images]
        return [self.row[text] for text in clean], [self.row[rng.choice(self.damaged[text])] for text in clean]

    def read(self, rows: list[int]) -> Tensor:
        """What the head takes, [n, D]: of a frozen tower its pooled output, else the embedding, with gradients, not yet unit-norm."""
        if self.pooled is not None:
            return self.pooled[rows]
        tokens = self.tokens[rows]
        if isinstance(self.model.text, HFTextEncoder):  # needs no padding past the longest of them
            tokens = tokens[:, : int(text_lengths(tokens, self.tokenizer).max())]
        return self.model.encode_text(tokens)

    @torch.no_grad()
    def pool(self, tokens: Tensor) -> Tensor:
        """Pooled output of the frozen tower for texts, in batches of like length."""
        text = self.model.text.eval()
        lengths = text_lengths(tokens, self.tokenizer)
        order = lengths.argsort(stable=True)
        pooled = []
        for rows in order.split(256):
            own = tokens[rows, : int(lengths[rows].max())]
            mask = (own != text.config.pad_token_id).long()
            pooled.append(text.pooler(text.transformer(input_ids=own, attention_mask=mask), mask))
        return torch.cat(pooled)[order.argsort()]


class _Best:
    """The weights with the best R@1 among all dev images, from the first caption of each; measured every so many epochs."""

    def __init__(
        self,
        settings: ScorerSettings,
        model: nn.Module,
        tokenizer,
        texts: _TextTable,
        images: ImageTable,
        standard: Standard,
        captions: list[list[str]],
    ) -> None:
        """captions: of each image at least one."""
        self.recalls: list[float] = []
        self._model, self._texts, self._weights = model, texts, {}
        self._images, self._standard = images, standard
        self._patience = settings.patience
        self._due: set[int] = set()  # epochs, from 0
        if not settings.evaluations:
            return
        if not captions:
            raise DataError(
                "the evaluations of a scorer need images with captions in a split whose name begins with dev or val, and there is none: "
                "set scorer.evaluations and judge.evaluations to 0"
            )
        self._due = {settings.epochs * (place + 1) // settings.evaluations - 1 for place in range(settings.evaluations)}
        tokens = tokenizer([own[0] for own in captions]).to(texts.tokens.device)
        self._read = texts.pool(tokens) if texts.frozen else tokens

    def ends_with(self, epoch: int) -> bool:
        """Measures where it is due. True where patience is at an end."""
        if epoch not in self._due:
            return False
        recall = self._recall()
        if recall > max(self.recalls, default=-1.0):
            self._weights = {name: one.detach().clone() for name, one in self._trained()}
        self.recalls.append(recall)
        since = len(self.recalls) - 1 - self.recalls.index(max(self.recalls))
        return self._patience is not None and since >= self._patience

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best weights back; does nothing where nothing was measured."""
        for name, parameter in self._trained():
            if name in self._weights:
                parameter.copy_(self._weights[name])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, one) for name, one in self._model.named_parameters() if one.requires_grad]

    @torch.inference_mode()
    def _recall(self) -> float:
        model, training = self._model, self._model.text.training
        head = model.visual.head.eval()
        model.text.eval()
        every = torch.arange(len(self._read))
        read = torch.cat(
            [
                model.text.proj(self._read[rows]) if self._texts.frozen else model.encode_text(self._read[rows])
                for rows in every.split(_EVALUATED)
            ]
        )
        seen = torch.cat([head(self._standard(self._images.seen(rows))) for rows in every.split(_EVALUATED)])
        head.train()
        model.text.train(training)
        return recall_at_1(*(nn.functional.normalize(one, dim=-1).cpu() for one in (read, seen)), every)


def _warrant(scorer: Scorer, dev: CaptionedFeatures) -> dict[str, float]:
    if not len(dev):
        return {}
    images = scorer.project_features(dev.features) if scorer.tower_digest else scorer.embed_images(list(dev.images))
    texts = scorer.embed_texts([own[0] for own in dev.captions])
    target = torch.arange(len(dev))
    warrant = {"dev_images": len(dev), "recall_at_1_of_all": recall_at_1(texts, images, target)}
    if len(dev) >= 100:
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randperm(len(dev), generator=generator)[:100] for _ in range(20)]
        hundred = torch.arange(100)
        warrant["recall_at_1_of_100"] = sum(recall_at_1(texts[draw], images[draw], hundred) for draw in draws) / len(
            draws
        )
    return warrant
