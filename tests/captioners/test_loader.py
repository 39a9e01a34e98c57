"""What the loader keeps of a captioner that is trained further."""

from finecap_ray.captioners import family_of, load_captioner
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


def test_a_caption_ends_where_the_checkpoint_s_turn_and_generation_do(tmp_path):
    """As Idefics3-8B: its tokenizer's end is that of a text, its turns end with another token."""
    save_tiny("idefics3", tmp_path / "hub", tied=True)
    model, processor = load_captioner(tmp_path / "hub")
    tokenizer = processor.tokenizer
    turn, text, start = tokenizer.convert_tokens_to_ids(["<end_of_utterance>", "<|endoftext|>", "<|im_start|>"])
    tokenizer.eos_token = "<|endoftext|>"
    model.config.get_text_config().eos_token_id = text
    model.generation_config.eos_token_id = [text, start]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "other")
    model, processor = load_captioner(tmp_path / "other")
    assert processor.tokenizer.eos_token_id == turn
    assert family_of(model.config, processor).end_token_ids == (turn, text, start)
    assert model.generation_config.eos_token_id == [turn, text, start]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "trained")
    assert family_of(*load_processor(tmp_path / "trained")).end_token_ids == (turn, text, start)
