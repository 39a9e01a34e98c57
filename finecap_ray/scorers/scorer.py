"""The image-text dual encoder that pays the reward (or judges): any open_clip model, always frozen.

`ViT-B-32/openai` is CLIP, fetched from a hub. What `finecap scorer train` makes is a dual encoder of our own, not CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.hf_model import HFTextEncoder
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finecap_ray.errors import DataError, UnsupportedError
from finecap_ray.images import decode_image
from finecap_ray.scorers import smollm2_text  # noqa: F401 (registers its architecture)
from finecap_ray.scorers.digest import weight_digest
from finecap_ray.scorers.tower import device

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
FACTS_FILE = "scorer.json"
_IMAGE_BATCH = 64
_TEXT_BATCH = 256


class Scorer:
    """A frozen open_clip model with its preprocessing and tokenizer, on the GPU that this process was given, if any.

    What it returns is on the CPU.

    digest        of all weights, kinds of layers and the preprocessing of images; bag sets carry it, the reward compares it
    tower_digest  of the frozen image tower whose cached features `project_features` takes; "" where there is none
    made_here     whether `finecap scorer train` made it
    logit_scale   s of s * cos, as learned
    text_dtype    of the text tower's arithmetic: float32, until who holds the scorer sets another one
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess,
        tokenizer,
        name: str,
        tower_digest: str = "",
        made_here: bool = False,
    ) -> None:
        self.text_dtype = torch.float32
        self.device = device()
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.name = name
        self.tower_digest = tower_digest
        self.made_here = made_here
        layers = sorted({type(module).__name__ for module in model.modules()})  # QuickGELU or GELU: neither has weights
        self.digest = weight_digest(model.state_dict(), layers, model.visual.preprocess_cfg)
        self.logit_scale = float(model.logit_scale.exp())

    @torch.inference_mode()
    def embed_images(self, images: list[bytes], names: Sequence[str] | None = None) -> Float[Tensor, "n D"]:
        """Unit-norm embeddings of encoded images, a batch at a time. Raises DataError for bytes that aren't an image, which it
        calls by its name (default: its number from 0 on)."""
        batches = []
        called = list(zip(names or range(len(images)), images, strict=True))
        for start in range(0, len(called), _IMAGE_BATCH):
            pixels = torch.stack([self._pixels(*one) for one in called[start : start + _IMAGE_BATCH]])
            batches.append(self.model.encode_image(pixels.to(self.device), normalize=True).float().cpu())
        return torch.cat(batches)

    def _pixels(self, name: str | int, image: bytes) -> Float[Tensor, "3 S S"]:
        try:
            return self.preprocess(decode_image(image))
        except DataError as error:
            raise DataError(f"image {name!r}: {error}; `finecap import` leaves such images out") from None

    @torch.inference_mode()
    def project_features(self, features: Float[Tensor, "n F"]) -> Float[Tensor, "n D"]:
        """Unit-norm embeddings from the pooled features of the frozen tower: what `embed_images` gives, without the tower."""
        return torch.nn.functional.normalize(self.model.visual.head(features.float().to(self.device)), dim=-1).cpu()

    def embed_texts(self, texts: list[str]) -> Float[Tensor, "n D"]:
        """Unit-norm embeddings; 0 for a text of which the tokenizer makes no token, such as "" with SmolLM2's.

        Equal strings are embedded once, so that they are equal to the last bit.
        """
        return self.read_texts(texts)[0]

    @torch.inference_mode()
    def read_texts(self, texts: list[str]) -> tuple[Float[Tensor, "n D"], Float[Tensor, " n"]]:
        """What `embed_texts` and `truncated` give, of one tokenisation."""
        unique = list(dict.fromkeys(texts))
        tokens = self.tokenizer(unique)
        # Texts of like length share a batch, and a Hugging Face tower needs no padding past the longest of them.
        cuts = isinstance(getattr(self.model, "text", None), HFTextEncoder)
        own_lengths = text_lengths(tokens, self.tokenizer)
        lengths = own_lengths if cuts else torch.full((len(tokens),), tokens.shape[1])
        order = lengths.argsort(stable=True)
        batches = [tokens[rows, : int(lengths[rows].max())] for rows in order.split(_TEXT_BATCH)]
        embedded = torch.cat([self._embed_tokens(batch) for batch in batches])[order.argsort()]
        row = {text: index for index, text in enumerate(unique)}
        rows = [row[text] for text in texts]
        return embedded[rows], self._full(own_lengths)[rows]

    def _embed_tokens(self, tokens: Int[Tensor, "n T"]) -> Float[Tensor, "n D"]:
        with torch.autocast(self.device, self.text_dtype, enabled=self.text_dtype != torch.float32):
            text = self.model.encode_text(tokens.to(self.device))
        return torch.nn.functional.normalize(text.float(), dim=-1).cpu()

    def truncated(self, texts: list[str]) -> Float[Tensor, n]:
        """1 where a text fills the scorer's context (its end is cut, or just fits), else 0."""
        return self._full(text_lengths(self.tokenizer(texts), self.tokenizer))

    def _full(self, lengths: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return (lengths == self.tokenizer.context_length).float()


def text_lengths(tokens: Tensor, tokenizer) -> Tensor:
    """Tokens [n, T] of a tokenizer of open_clip, padded on the right -> number of tokens of each row.

    At least 1, also of a text without any: a batch of such texts is one padding token wide, not 0.
    """
    # open_clip's own pads with 0, the others wrap one of Hugging Face.
    inner = getattr(tokenizer, "tokenizer", None)
    return (tokens != (0 if inner is None else inner.pad_token_id)).sum(dim=1).clamp(min=1)


def check_scorer(spec: str | Path) -> None:
    """Raises DataError where there is no such scorer. Reads no weights."""
    folder = Path(spec)
    if folder.is_dir():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise DataError(f"{folder} isn't a scorer: {file} is missing")
        return
    name, _, tag = str(spec).partition("/")
    if not tag or name not in open_clip.list_models():
        raise DataError(
            f"no scorer {str(spec)!r}: give a folder with {CONFIG_FILE}, or NAME/TAG of open_clip, such as ViT-B-32/openai"
        )
    if tag not in open_clip.list_pretrained_tags_by_model(name):
        raise DataError(
            f"open_clip has no weights {tag!r} of {name}; it has {', '.join(open_clip.list_pretrained_tags_by_model(name))}"
        )


def load_scorer(spec: str | Path) -> Scorer:
    """`NAME/TAG` of open_clip (fetched from a hub where it isn't cached), or a folder written by `save_scorer`.

    Raises DataError where neither exists, UnsupportedError when the weights can't be had on this machine.
    """
    check_scorer(spec)
    if Path(spec).is_dir():
        return _load_folder(Path(spec))
    name, _, tag = str(spec).partition("/")
    # open_clip goes by the name alone (ViT-B-32-quickgelu), and warns where the weights learned with the other activation.
    quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=tag, force_quick_gelu=quick)
    except (OSError, RuntimeError) as error:
        raise UnsupportedError(
            f"the weights of {spec} can't be fetched here ({error}); give a folder that holds them"
        ) from error
    return Scorer(model, preprocess, open_clip.get_tokenizer(name), name=str(spec))


def save_scorer(
    folder: Path, model: torch.nn.Module, model_config: dict, preprocess_config: dict, tokenizer, facts: dict
) -> None:
    """Writes a folder that `load_scorer` and open_clip's own `local-dir:` read. `facts` must hold `tower_digest`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    if "hf_model_name" in model_config["text_cfg"]:
        model.text.transformer.config.save_pretrained(folder)
        tokenizer.tokenizer.save_pretrained(folder)
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _load_folder(folder: Path) -> Scorer:
    try:
        return _read_folder(folder)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise DataError(f"{folder} isn't a scorer that can be read ({type(error).__name__}: {error})") from error


def _read_folder(folder: Path) -> Scorer:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["model_cfg"]
    overrides = {}
    if "hf_model_name" in config["text_cfg"]:
        # open_clip resolves neither a relative hf_model_name nor the tokenizer beside the weights.
        local = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_model_pretrained": False}
        overrides["text_cfg"] = config["text_cfg"] | local
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", **overrides)
    facts_file = folder / FACTS_FILE
    made_here = facts_file.is_file()
    facts = json.loads(facts_file.read_text(encoding="utf-8")) if made_here else {"tower_digest": ""}
    return Scorer(
        model,
        preprocess,
        open_clip.get_tokenizer(f"local-dir:{folder}"),
        name=folder.name,
        tower_digest=facts["tower_digest"],
        made_here=made_here,
    )
