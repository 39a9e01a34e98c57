"""What `finecap export` leaves for others: a folder that from_pretrained loads, and a card that says what the run holds."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from finecap_ray.captioners import load_captioner
from finecap_ray.captioners.tiny import save_tiny
from finecap_ray.cli import main
from finecap_ray.config import TrainableSettings, dump_settings, load_settings
from finecap_ray.errors import ConfigError, DataError
from finecap_ray.export import export_captioner
from finecap_ray.training.parts import merged_weights, save_trained, set_trainable


def summary(**recall):
    group = {"bags": 7, "recall_at_1": recall, "interval": {name: [0.1, 0.9] for name in (*recall, "gain")}}
    metrics = {"CIDEr": 1.25, "Bleu_4": 0.25, "ROUGE_L": 0.5, "mean_length": 6.0, "vocabulary": 90.0}
    return {
        "bag_size": 5,
        "groups": {"test": group},
        "caption_metrics": {"mle": metrics, "rl": metrics | {"CIDEr": 1.5}},
        "made_with": {"versions": {"torch": "9.9"}},
    }


@pytest.fixture
def run(captioner_folder, tmp_path):
    """A run folder with the captioners of both stages, a checkpoint, and an evaluation of both."""
    folder = tmp_path / "run"
    settings = load_settings("demo", ["scorer.spec=ViT-B-32/openai", "rl.reward.cider=0.25", "rl.start_share=0.4"])
    for name in ("mle", "rl/captioner", "rl/checkpoints/checkpoint-20"):
        shutil.copytree(captioner_folder, folder / name)
    (folder / "config.yaml").write_text(dump_settings(settings))
    (folder / "rl" / "checkpoints" / "checkpoint-20" / "optimizer.pt").write_bytes(b"moments")
    files = {
        "mle/stage.json": {"digest": "m", "finished": True},
        "rl/stage.json": {"digest": "r", "finished": True},
        "evaluation/stage.json": {"inputs": {"captioners": {"mle": "m", "rl": "r"}}, "finished": True},
        "evaluation/summary.json": summary(mle=0.375, rl=0.5, human=0.4),
        "judge/scorer.json": {"digest": "0123judge", "recall_at_1_of_100": 0.44},
        "features/manifest.json": {"images": 3371, "left_out": {"undecodable": 2}},
        "bags/train/manifest.json": {
            "sizes": {"5": {"bags": 454, "mean_similarity": 0.6481, "mean_similarity_of_random_bags": 0.0102}}
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def equal_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_ends_in_its_last_captioner_with_a_card_of_what_it_was_made_with(run, captioner, tmp_path, capsys):
    out = tmp_path / "out" / "my-captioner"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), str(out)])
    assert stop.value.code == 0 and str(out) in capsys.readouterr().out
    assert equal_weights(load_captioner(out)[0], captioner[0])
    assert load_settings(out / "config.yaml").rl.reward.cider == 0.25

    card = ModelCard.load(out / "README.md")
    found = {(one.dataset_split, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found == {("test", "recall_at_1"): 0.5, ("whole", "cider"): 1.5}
    assert card.data.library_name == "finecap-ray" and card.data.pipeline_tag == "image-to-text"
    for said in (
        "ClipCapForConditionalGeneration",
        "| images | 3371, 2 left out (undecodable) |",
        "454 of 5 (mean similarity 0.648; random 0.010)",
        "The scorer that rewarded: `ViT-B-32/openai`.",
        "digest `0123judge`, R@1 44.0 % among 100",
        "`self_retrieval=1.0`, `cider=0.25`",
        "among the images of the own bag",
        "The weights are the last ones, mixed with a share of 0.4 of those",
        "| test | 7 | 37.5 (10.0 to 90.0) | 50.0 (10.0 to 90.0) | 40.0 (10.0 to 90.0) | +12.5 (+10.0 to +90.0) |",
        "| CIDEr | 1.250 | 1.500 |",
        "torch 9.9",
    ):
        assert said in card.text, said


def test_what_was_not_evaluated_has_no_results(run, tmp_path):
    checkpoint = export_captioner(run / "rl" / "checkpoints" / "checkpoint-20", tmp_path / "checkpoint")
    assert not (checkpoint / "optimizer.pt").exists()
    stage = run / "rl" / "stage.json"
    stage.write_text(json.dumps({"digest": "another", "finished": True}))  # trained again since
    for folder in (checkpoint, export_captioner(run, tmp_path / "again")):
        card = ModelCard.load(folder / "README.md")
        assert card.data.eval_results is None and "were not evaluated" in card.text and "37.5" not in card.text
    by_mle = ModelCard.load(export_captioner(run / "mle", tmp_path / "mle") / "README.md")
    assert by_mle.data.eval_results[0].metric_value == 0.375


def test_a_card_claims_no_training_that_it_does_not_know_of(run, tmp_path):
    checkpoint = run / "mle" / "checkpoints" / "checkpoint-3"
    shutil.copytree(run / "mle", checkpoint)
    card = ModelCard.load(export_captioner(checkpoint, tmp_path / "of-mle") / "README.md")
    assert "a checkpoint of a training on captions that went on" in card.text and "then RL" not in card.text
    again = export_captioner(export_captioner(run, tmp_path / "once"), tmp_path / "twice")
    card = ModelCard.load(again / "README.md")
    assert "exported before" in card.text and "then RL" not in card.text and "No results came with it." in card.text


def test_adapters_are_merged_and_left_behind(captioner, tmp_path):
    model, processor = captioner
    set_trainable(model, TrainableSettings(decoder="lora", lora_rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.3)
    checkpoint = tmp_path / "checkpoint-3"
    model.save_pretrained(checkpoint, state_dict=merged_weights(model))
    processor.save_pretrained(checkpoint)
    save_trained(model, checkpoint)
    out = export_captioner(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]
    inputs = processor(images=[torch.ones(model.config.feature_dim)], text=["<image>a red"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(load_captioner(out)[0](**inputs).logits, model(**inputs).logits)
    assert "lies in no run" in (out / "README.md").read_text()


_WITHOUT_US = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.new("RGB", (80, 60))], return_tensors="pt")
model.generate(**inputs, max_new_tokens=2)
print(model.dtype, "finecap_ray.captioners" in sys.modules)
"""


def test_an_image_text_model_needs_nothing_of_ours(tmp_path):
    save_tiny("qwen2_5_vl", tmp_path / "tiny")
    out = export_captioner(tmp_path / "tiny", tmp_path / "out", dtype="bfloat16")
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and "Describe the image in one sentence." in card.text
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_US, str(out)], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.stdout.strip() == "torch.bfloat16 False", done.stderr


def test_nothing_is_overwritten(captioner_folder, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("ten years")
    with pytest.raises(ConfigError, match="taken exists: give a new folder"):
        export_captioner(captioner_folder, taken)
    with pytest.raises(DataError, match="is not a captioner"):
        export_captioner(taken, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
