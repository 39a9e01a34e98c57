"""What the loader keeps of a captioner that is trained further."""

from finecap_ray.captioners import load_captioner
from finecap_ray.captioners.loader import load_processor
from finecap_ray.captioners.tiny import save_tiny
from finecap_ray.captioners.vlm import PROMPT_FIELD
from finecap_ray.config import CaptionerSettings


def test_an_image_text_model_keeps_the_prompt_it_was_trained_with(tmp_path):
    save_tiny("idefics3", tmp_path / "hub", tied=True)

    def prompt(folder, settings=None):
        return getattr(load_processor(folder, settings)[0], PROMPT_FIELD)

    assert prompt(tmp_path / "hub") == "Describe the image in one sentence."
    model, processor = load_captioner(tmp_path / "hub", CaptionerSettings(prompt="Caption:"))
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    assert prompt(tmp_path / "trained") == prompt(tmp_path / "trained", CaptionerSettings()) == "Caption:"
    assert prompt(tmp_path / "trained", CaptionerSettings(prompt="Say:")) == "Say:"
