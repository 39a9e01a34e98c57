"""Scorers: real open_clip models on EfficientNet-lite0, trained for a moment on a few images."""

import os
import random
import subprocess
import sys

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast

from finecap_ray.config import JudgeSettings, ScorerSettings
from finecap_ray.errors import DataError
from finecap_ray.scorers.images import CaptionedFeatures, ImageTable, Standard
from finecap_ray.scorers.packages import minilm_folder
from finecap_ray.scorers.scorer import WEIGHTS_FILE, Scorer, load_scorer, text_lengths
from finecap_ray.scorers.train import _Best, _TextTable, train_scorer

TEXTS = ["a red apple", "", "a green pear on a plate", "a red apple"]


@pytest.fixture(params=["scorer_folder", "judge_folder"], ids=["minilm", "scratch"])
def folder(request):
    return request.getfixturevalue(request.param)


def test_a_saved_scorer_is_read_by_us_and_by_open_clip_to_the_last_bit(folder):
    once, again = load_scorer(folder), load_scorer(str(folder))
    assert once.digest == again.digest
    assert once.logit_scale == again.logit_scale
    assert torch.equal(once.embed_texts(TEXTS), again.embed_texts(TEXTS))
    saved = load_file(folder / WEIGHTS_FILE)
    loaded = once.model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_open_clip_itself_reads_the_scratch_scorer(judge_folder):
    ours = load_scorer(judge_folder)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{judge_folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{judge_folder}")(TEXTS[:1])
    with torch.no_grad():
        theirs = model.eval().encode_text(tokens, normalize=True)
    torch.testing.assert_close(theirs, ours.embed_texts(TEXTS[:1]))


def test_embeddings_are_unit_norm_and_frozen(folder, emoji):
    scorer = load_scorer(folder)
    for embedded in (scorer.embed_texts(TEXTS), scorer.embed_images(emoji.images[:2])):
        assert embedded.dtype == torch.float32 and not embedded.requires_grad
        torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(len(embedded)))
    assert not scorer.model.training
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())


def test_equal_strings_are_bit_equal_wherever_they_stand(folder):
    embedded = load_scorer(folder).embed_texts([*TEXTS, *(f"a {n} of something long" for n in range(9)), TEXTS[0]])
    assert torch.equal(embedded[0], embedded[3]) and torch.equal(embedded[0], embedded[-1])
    assert not torch.equal(embedded[0], embedded[2])


def test_a_text_is_embedded_alike_alone_and_among_longer_ones(folder):
    scorer = load_scorer(folder)
    together = scorer.embed_texts(TEXTS)
    alone = torch.cat([scorer.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_cached_features_give_the_embeddings_of_the_images(folder, emoji, tower):
    scorer = load_scorer(folder)
    assert scorer.tower_digest == tower.digest
    # 1e-3: the features are kept as float16, 11 bits.
    projected = scorer.project_features(torch.from_numpy(emoji.features))
    torch.testing.assert_close(projected[:8], scorer.embed_images(emoji.images[:8]), atol=1e-3, rtol=0)


def test_training_leaves_the_frozen_towers_bit_identical(folder, tower):
    """The means and variances of BatchNorm too, which move in train mode without a gradient."""
    saved = load_file(folder / WEIGHTS_FILE)
    trunk = tower.model.state_dict()
    assert any("running_mean" in name for name in trunk)
    assert all(torch.equal(saved[f"visual.trunk.{name}"], tensor) for name, tensor in trunk.items())


def test_training_leaves_minilm_bit_identical(scorer_folder):
    saved = load_file(scorer_folder / WEIGHTS_FILE)
    minilm = AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False).state_dict()
    own = {name.removeprefix("text.transformer."): tensor for name, tensor in saved.items() if "transformer" in name}
    shared = minilm.keys() & own.keys()
    assert len(shared) > 90
    assert all(torch.equal(own[name], minilm[name]) for name in shared)


def test_a_training_of_ten_steps(tower, emoji, tmp_path):
    """OneCycleLR divides by the length of its first part, a tenth, less one."""
    every = CaptionedFeatures(torch.from_numpy(emoji.features).float(), emoji.captions)
    settings = JudgeSettings(batch_size=20, embed_dim=32, epochs=5)
    assert train_scorer(settings, tower, every.rows(range(40)), every.rows(range(40, 60)), tmp_path)["digest"]


@pytest.mark.parametrize("settings", [ScorerSettings, JudgeSettings])
def test_training_ends_when_the_recall_on_dev_no_longer_rises(settings, tower, emoji, tmp_path):
    every = CaptionedFeatures(torch.from_numpy(emoji.features).float(), emoji.captions)
    sizes = {"batch_size": 20, "embed_dim": 32, "epochs": 12, "evaluations": 12}

    def train(**changes):
        folder = tmp_path / str(changes.get("patience"))
        return train_scorer(
            settings(**sizes | changes), tower, every.rows(range(40)), every.rows(range(40, 60)), folder
        )

    whole, stopped = train(), train(patience=1)
    assert len(whole["evaluated"]) == 12
    assert whole["recall_at_1_of_all"] == pytest.approx(max(whole["evaluated"]))
    recalls = whole["evaluated"]
    place = next(at for at in range(1, 12) if max(recalls[:at]) >= recalls[at])
    assert stopped["evaluated"] == recalls[: place + 1]


def test_the_weights_with_the_best_recall_on_dev_stay(folder, emoji, tower):
    """Zeros find no image; the weights of before come back to the last bit."""
    scorer = load_scorer(folder)
    model = scorer.model.requires_grad_(True)
    frozen = folder.name.startswith("scorer")
    texts = _TextTable(model, scorer.tokenizer, emoji.captions[:2], random.Random(0), frozen)
    settings = ScorerSettings(epochs=2, evaluations=2)
    every = CaptionedFeatures(torch.from_numpy(emoji.features).float(), emoji.captions)
    images = ImageTable(model.visual, tower, settings, every)
    as_it_is = Standard(torch.zeros(tower.width), torch.ones(tower.width))  # it was folded into the head
    best = _Best(settings, model, scorer.tokenizer, texts, images, as_it_is, emoji.captions)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    assert not best.ends_with(0)
    with torch.no_grad():
        for parameter in model.visual.head.parameters():
            parameter.zero_()
    best.ends_with(1)
    assert best.recalls[0] > best.recalls[1]
    best.restore()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_scorers_that_differ_have_digests_that_differ(scorer_folder, judge_folder):
    assert load_scorer(scorer_folder).digest != load_scorer(judge_folder).digest


@pytest.mark.parametrize("changes", [{"force_quick_gelu": True}, {"image_mean": (0.5, 0.5, 0.5)}])
def test_the_same_weights_computed_otherwise_are_another_scorer(changes):
    name = "ViT-S-32-alt"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    other, _, _ = open_clip.create_model_and_transforms(name, **changes)
    other.load_state_dict(model.state_dict())
    tokenizer = open_clip.get_tokenizer(name)
    assert Scorer(model, preprocess, tokenizer, name).digest != Scorer(other, preprocess, tokenizer, name).digest


def test_the_padding_of_a_text_is_what_its_tokenizer_pads_with(tmp_path):
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "pear": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path), context_length=4)
    assert text_lengths(tokenizer(["a plum", "a pear a pear a"]), tokenizer).tolist() == [2, 4]


def test_a_caption_that_fills_the_context_is_reported(folder):
    scorer = load_scorer(folder)
    context = scorer.tokenizer.context_length
    assert scorer.truncated(["a pear", "pear " * context]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ViT-B-32", "no scorer 'ViT-B-32': give a folder"),
        ("no/such/folder", "no scorer 'no/such/folder': give a folder"),
        ("ViT-B-32/photos", "open_clip has no weights 'photos' of ViT-B-32; it has openai"),
    ],
)
def test_what_is_not_a_scorer_is_an_error_that_says_what_is(spec, message):
    with pytest.raises(DataError, match=message):
        load_scorer(spec)


def test_a_folder_without_weights_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"isn't a scorer: open_clip_config\.json is missing"):
        load_scorer(tmp_path)


@pytest.mark.parametrize(
    ("config", "weights"), [("{", b""), ("{}", b""), ('{"model_cfg": {"text_cfg": {}}}', b"no weights")]
)
def test_a_damaged_folder_is_one_message(tmp_path, config, weights):
    (tmp_path / "open_clip_config.json").write_text(config)
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match="isn't a scorer that can be read"):
        load_scorer(tmp_path)


def test_without_a_hub_the_error_says_that_weights_cannot_be_fetched(tmp_path):
    """In a process of its own: the hub's library reads its environment at import."""
    code = (
        "from finecap_ray.errors import UnsupportedError\n"
        "from finecap_ray.scorers.scorer import load_scorer\n"
        "try:\n    load_scorer('RN50/yfcc15m')\n"
        "except UnsupportedError as error:\n    print(error)\n"
    )
    # Nothing listens on port 9 (discard): the same as no network, at once.
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment = {**os.environ, **nowhere, **offline, "no_proxy": "", "NO_PROXY": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "the weights of RN50/yfcc15m can't be fetched here" in done.stdout


@pytest.mark.parametrize(("tag", "activation"), [("openai", QuickGELU), ("laion2b_s34b_b79k", nn.GELU)])
def test_weights_get_the_activation_that_they_learned_with(tag, activation, monkeypatch):
    """All of open_clip but the download."""
    create = open_clip.create_model_and_transforms
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name, pretrained, **own: create(name, **own))
    model = load_scorer(f"ViT-B-32/{tag}").model
    assert (
        type(model.transformer.resblocks[0].mlp.gelu)
        is type(model.visual.transformer.resblocks[0].mlp.gelu)
        is activation
    )


def test_a_model_of_the_first_clip_kind_embeds_texts():
    """Its text tower is not a module of its own, and its positions are fixed: no text may be cut to the longest."""
    name = "ViT-S-32-alt"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    texts = ["a dog", "a cat on a mat with a hat", "a dog"]
    embedded = Scorer(model, preprocess, tokenizer, name).embed_texts(texts)
    with torch.inference_mode():
        expected = model.encode_text(tokenizer(texts), normalize=True)
    assert torch.allclose(embedded, expected, atol=1e-6)
    assert torch.equal(embedded[0], embedded[2])
