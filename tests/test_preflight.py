"""Captioners that can't be trained or sampled from are refused before Ray starts, with what to do."""

import json
import shutil
from importlib.util import find_spec

import pytest
from transformers import GPT2Config, LlamaConfig, LlavaConfig

from finecap_ray import preflight
from finecap_ray.captioners.tiny import save_tiny
from finecap_ray.config import load_settings
from finecap_ray.errors import ConfigError, DataError, MismatchError, UnsupportedError
from finecap_ray.preflight import check_captioner, check_workers

FITTING = ["mle.epochs=0", "rl.trainable.lora_targets=[self_attn.q_proj]"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """kind -> folder"""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("qwen2_5_vl", "idefics3")}
    for kind, folder in folders.items():
        save_tiny(kind, folder)
    return folders


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy of the tiny Qwen2.5-VL, to be broken."""
    return shutil.copytree(tiny["qwen2_5_vl"], tmp_path / "captioner")


def check(spec, *overrides):
    check_captioner(load_settings("demo", [f"captioner.spec={spec}", *FITTING, *overrides]))


def rewrite(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("trained", ["frozen", "lora", "full"])
def test_what_fits_is_let_through(tiny, trained):
    check(tiny["qwen2_5_vl"], f"rl.trainable.vision={trained}", "rl.trainable.decoder=lora")
    targets = "rl.trainable.vision_lora_targets=[self_attn.v_proj]"
    check(tiny["idefics3"], f"rl.trainable.vision={trained}", targets)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LlavaConfig(),
            r"type llava are not supported \(.* names that vllm 0\.29 doesn't map.*\); supported: clipcap, qwen",
        ),
        (GPT2Config(), "type gpt2 are not supported .*nobody has shown"),
    ],
)
def test_an_architecture_that_the_engines_do_not_share(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        check(tmp_path)


def test_an_architecture_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(DataError, match=r"no captioner at .*no_such_model"):
        check(tmp_path)


@pytest.mark.skipif(find_spec("num2words") is not None, reason="num2words is installed: SmolVLM runs")
def test_smolvlm_says_which_package_it_lacks(tiny, tmp_path):
    folder = shutil.copytree(tiny["idefics3"], tmp_path / "captioner")
    rewrite(folder / "config.json", lambda tree: tree.update(model_type="smolvlm"))
    with pytest.raises(UnsupportedError, match="pip install num2words"):
        check(folder)


def test_a_tokenizer_of_another_captioner(broken):
    image_token = json.loads((broken / "config.json").read_text())["image_token_id"]
    rewrite(broken / "config.json", lambda tree: tree.update(image_token_id=image_token + 1))
    with pytest.raises(MismatchError, match=rf"image token .* is {image_token}, the model's is {image_token + 1}"):
        check(broken)


def test_a_tokenizer_of_more_tokens_than_the_model_has(broken):
    rewrite(broken / "config.json", lambda tree: tree["text_config"].update(vocab_size=100))
    with pytest.raises(MismatchError, match=r"the tokenizer knows \d+ tokens and the model has embeddings of 100"):
        check(broken)


def test_no_chat_template(broken):
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedError, match=r"no chat template.*put a chat_template\.jinja beside it"):
        check(broken)


def test_no_image_processor(broken):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (broken / name).unlink(missing_ok=True)
    with pytest.raises((UnsupportedError, DataError), match=r"preprocessor_config\.json|no captioner at"):
        check(broken)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (
            "qwen2_5_vl",
            ["rl.trainable.decoder=lora", "rl.trainable.lora_targets=[attn.c_attn]"],
            r"lora_targets: 'attn\.c_attn' isn't there in a decoder of type qwen2_5_vl_text, which has .*self_attn\.q_proj",
        ),
        (
            "idefics3",
            ["rl.trainable.vision=lora"],
            r"vision_lora_targets: 'attn\.qkv' isn't there in a vision of type idefics3_vision, which has .*self_attn\.q_proj",
        ),
        # The merger lies in Qwen's image tower, and is the mapper.
        (
            "qwen2_5_vl",
            ["rl.trainable.vision=lora", "rl.trainable.vision_lora_targets=[mlp.0]"],
            r"vision_lora_targets: 'mlp\.0' isn't there in a vision of type",
        ),
    ],
)
def test_adapters_of_another_family(tiny, kind, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(tiny[kind], *overrides)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_the_image_tower_of_a_clipcap(captioner_folder, trained):
    with pytest.raises(ConfigError, match=f"rl.trainable.vision={trained}: a clipcap captioner has no image tower"):
        check(captioner_folder, f"rl.trainable.vision={trained}")


def test_adapters_on_the_decoder_that_a_new_clipcap_gets(tmp_path):
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    lora = [f"captioner.decoder={tmp_path}", "rl.trainable.decoder=lora"]
    with pytest.raises(ConfigError, match=r"'attn\.c_attn' isn't there in a decoder of type llama, which has .*q_proj"):
        check_captioner(load_settings("demo", lora))
    check_captioner(load_settings("demo", [*lora, "rl.trainable.lora_targets=[self_attn.q_proj]"]))


def test_adapters_on_smollm2():
    lora = ["captioner.decoder=smollm2", "rl.trainable.decoder=lora"]
    with pytest.raises(ConfigError, match=r"in a decoder of type llama, which has .*self_attn\.q_proj"):
        check_captioner(load_settings("demo", lora))
    check_captioner(load_settings("demo", [*lora, "rl.trainable.lora_targets=[self_attn.q_proj]"]))


def test_captions_longer_than_there_is_room_for(tiny):
    with pytest.raises(ConfigError, match=r"max_tokens=257: behind its longest prompt .* has room for 256 tokens"):
        check(tiny["qwen2_5_vl"], "captioner.max_tokens=257")


def test_images_that_leave_no_room(tiny):
    with pytest.raises(ConfigError, match=r"has room for 0 tokens: lower max_tokens, or captioner\.image_size"):
        check(tiny["qwen2_5_vl"], "captioner.image_size=1120")  # 40 x 40 tokens, and the model reads 1,024


def test_maximum_likelihood_of_an_image_text_model(tiny):
    with pytest.raises(ConfigError, match=r"mle\.epochs=3: maximum likelihood trains a ClipCap.*set mle\.epochs=0"):
        check(tiny["qwen2_5_vl"], "mle.epochs=3")


def test_bags_that_can_not_be_read():
    with pytest.raises(DataError, match=r"bagz\.json can't be read"):
        preflight.check(load_settings("demo", ["bags.truematch=bagz.json"]))


def test_workers_that_would_share_a_gpu():
    two = ["rl.num_workers=2", "resources.use_gpu=true"]
    check_workers(load_settings("demo", two))
    check_workers(load_settings("demo", [*two, "resources.gpu_share=0.6"]))  # no two of these on one
    with pytest.raises(ConfigError, match=r"gpu_share=0.5 would put several of 2 workers on one GPU"):
        check_workers(load_settings("demo", [*two, "resources.gpu_share=0.5"]))
