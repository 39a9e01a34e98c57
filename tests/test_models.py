"""What is wrong with the models that settings name is said before Ray starts."""

import os
import subprocess
import sys

import pytest
from transformers import BloomConfig, CohereConfig, Gemma2Config, GPTNeoConfig, PhiConfig

from finecap_ray.config import load_settings
from finecap_ray.errors import ConfigError, DataError, MismatchError, UnsupportedError
from finecap_ray.models import check_models


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("tower.model=tf_efficientnet_lte0", ConfigError, "timm knows no model 'tf_efficientnet_lte0'; near are"),
        ("tower.weights=nope", ConfigError, "timm has no 'nope' of tf_efficientnet_lite0; it has in1k"),
        ("tower.weights=nope.safetensors", ConfigError, r"no file nope\.safetensors"),
        ("scorer.spec=ViT-B-33/openai", DataError, "no scorer 'ViT-B-33/openai'"),
        ("judge.spec=ViT-B-32/opneai", DataError, "open_clip has no weights 'opneai' of ViT-B-32"),
    ],
)
def test_an_unknown_name_is_told_with_those_near_it(override, error, message):
    tower = [] if override.startswith("tower.model") else ["tower.model=tf_efficientnet_lite0"]
    with pytest.raises(error, match=message):
        check_models(load_settings("demo", [*tower, override]))


def test_a_decoder_that_generates_nothing_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UnsupportedError, match="is a resnet, no causal language model"):
        check_models(load_settings("demo", [f"captioner.decoder={tmp_path}"]))


def test_a_captioner_of_other_features_is_refused(captioner_folder):
    check_models(load_settings("demo", [f"captioner.spec={captioner_folder}"]))
    with pytest.raises(
        MismatchError, match=r"maps features of 2310 numbers, tower\.model=tf_efficientnet_lite0 makes 1280"
    ):
        check_models(load_settings("demo", [f"captioner.spec={captioner_folder}", "tower.model=tf_efficientnet_lite0"]))


def test_without_a_hub_a_name_is_refused_before_ray_starts(tmp_path):
    """In a process of its own: the hub's library reads its environment at import."""
    code = (
        "import ray\nfrom finecap_ray.cli import main\n"
        f"try: main(['train', 'mle', 'captioner.decoder=gpt2', 'run_dir={tmp_path}/run'])\n"
        "except SystemExit as stop: print(stop.code, ray.is_initialized())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert done.stdout.endswith("2 False\n")
    assert "captioner.decoder: there is no folder 'gpt2'" in done.stderr and "reaches no model hub" in done.stderr


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            PhiConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50),
            "a bias of its output layer",
        ),
        (CohereConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50), "logit_scale"),
        (
            Gemma2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50),
            "final_logit_softcapping",
        ),
    ],
    ids=["phi", "cohere", "gemma2"],
)
def test_a_decoder_whose_head_is_more_than_a_matrix_is_refused(config, what, tmp_path):
    """It would be trained without the rest, and sampled with it."""
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=f"with {what}: a ClipCap's output layer is one matrix"):
        check_models(load_settings("demo", [f"captioner.decoder={tmp_path}"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(hidden_size=32, n_layer=1, n_head=1), "is a bloom, which doesn't say how many tokens it reads"),
        (
            GPTNeoConfig(hidden_size=32, num_layers=1, num_heads=1, attention_types=[[["global"], 1]]),
            "is a GPTNeoForCausalLM, which the installed vllm doesn't run",
        ),
    ],
    ids=["bloom", "gpt_neo"],
)
def test_a_decoder_that_the_sampler_cannot_run_is_refused(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        check_models(load_settings("demo", [f"captioner.decoder={tmp_path}"]))
