"""RL of a ClipCap on a pretrained decoder: a tiny Llama of random weights, through the trainer that RL uses."""

import pytest
import torch

from finecap_ray.captioners import load_captioner
from finecap_ray.captioners.build import build_clipcap
from finecap_ray.config import CaptionerSettings, TrainableSettings, load_settings
from finecap_ray.errors import ConfigError
from finecap_ray.preflight import check_captioner
from finecap_ray.training.parts import merged_weights

TARGETS = ("self_attn.q_proj", "self_attn.v_proj")


@pytest.fixture(scope="module")
def tiny_captioner(llama_folder, tmp_path_factory):
    """Instead of the one from scratch, for `train_alone`."""
    settings = CaptionerSettings(
        decoder=str(llama_folder), mapper="transformer", mapper_layers=1, prefix_length=2, max_tokens=6
    )
    folder = tmp_path_factory.mktemp("llama_captioner")
    for part in build_clipcap(settings, (), 16, "", feature_dropout=0.0, seed=0):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("decoder", ["full", "lora", "frozen"])
def test_exactly_the_parts_meant_to_train_change(train_alone, tiny_captioner, decoder):
    """The sampler's log-probs are checked against the trainer's in every step (drift_bound)."""
    trainable = TrainableSettings(decoder=decoder, lora_rank=2, lora_targets=TARGETS)
    trainer, _ = train_alone(steps=2, trainable=trainable, kl_weight=0.1, learning_rate=1e-3)
    before, after = load_captioner(tiny_captioner)[0].state_dict(), merged_weights(trainer.model)
    assert after.keys() == before.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    mapper = {name for name in before if name.startswith("model.mapper.")}
    standardisation = {"model.mapper.mean", "model.mapper.deviation"}
    adapted = {name for name in before if name.removesuffix(".weight").endswith(TARGETS)}
    assert (
        changed
        == {
            "full": before.keys() - standardisation,
            "lora": mapper - standardisation | adapted,
            "frozen": mapper - standardisation,
        }[decoder]
    )


def test_the_matrices_of_a_decoder_are_looked_at_before_ray_starts(llama_folder):
    def settings(targets):
        return load_settings(
            "demo",
            [f"captioner.decoder={llama_folder}", "rl.trainable.decoder=lora", f"rl.trainable.lora_targets={targets}"],
        )

    check_captioner(settings(["self_attn.q_proj"]))
    with pytest.raises(
        ConfigError, match=r"'attn\.c_attn' isn't there in a decoder of type llama, which has mlp\.down"
    ):
        check_captioner(settings(["attn.c_attn"]))
