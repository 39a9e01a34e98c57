"""ClipCap as a Hugging Face model: saving and loading, features in place of placeholders, left and right padding."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from finecap_ray.captioners import load_captioner
from finecap_ray.captioners.loader import check_features
from finecap_ray.errors import DataError, MismatchError


def equal_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def features(captioner, n):
    return torch.randn(n, captioner[0].config.feature_dim, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, processor, pixels, text="<image>"):
    return model(**processor(images=list(pixels), text=[text] * len(pixels), return_tensors="pt")).logits


def test_a_captioner_comes_back_bit_equal_whoever_saves_and_whoever_loads(captioner, tmp_path):
    model, processor = captioner
    pixels = features(captioner, 3)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    auto_model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    auto_processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert equal_weights(model, auto_model)
    auto_model.save_pretrained(tmp_path / "auto")
    auto_processor.save_pretrained(tmp_path / "auto")
    again, again_processor = load_captioner(tmp_path / "auto")
    assert equal_weights(model, again)
    assert again.config.feature_tower == model.config.feature_tower
    assert again_processor.prompt_token_ids() == processor.prompt_token_ids()
    expected = logits(model, processor, pixels)
    assert torch.equal(logits(auto_model, auto_processor, pixels), expected)
    assert torch.equal(logits(again, again_processor, pixels), expected)
    assert (tmp_path / "auto" / "model.safetensors").is_file()


def test_weights_stay_tied_after_loading(captioner):
    model, _ = captioner
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_placeholders_and_images_must_match(captioner):
    model, processor = captioner
    ids = torch.tensor([processor.prompt_token_ids()])
    with pytest.raises(ValueError, match="2 image placeholders for 0 images of 2"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="2 image placeholders for 2 images of 2"):
        model(input_ids=ids, pixel_values=features(captioner, 2))


def test_the_chat_template_and_the_processor_give_the_prompt_of_the_sampler(captioner):
    _, processor = captioner
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}
    text = processor.apply_chat_template([message], tokenize=False)
    inputs = processor(images=list(features(captioner, 1)), text=[text])
    assert inputs["input_ids"] == [processor.prompt_token_ids()]


def test_padding_on_either_side_changes_no_logit(captioner):
    model, processor = captioner
    pixels = features(captioner, 1)
    prompt = processor.prompt_token_ids()
    end = processor.tokenizer.eos_token_id
    caption = [5, 17, 40]
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([prompt + caption]), pixel_values=pixels).logits[0]
        for left, right in ((2, 0), (0, 2), (1, 1)):
            ids = torch.tensor([[end] * left + prompt + caption + [end] * right])
            mask = torch.tensor([[0] * left + [1] * len(alone) + [0] * right])
            padded = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[0]
            torch.testing.assert_close(padded[left : left + len(alone)], alone, atol=1e-5, rtol=0)


def test_features_of_another_tower_are_refused(captioner):
    model, _ = captioner
    tower, width = model.config.feature_tower, model.config.feature_dim
    check_features(model, tower, width)
    with pytest.raises(MismatchError, match=f"tower {tower}, these are of tower feed"):
        check_features(model, "feed", width)
    with pytest.raises(MismatchError, match=f"features of {width} numbers, the tower makes 768"):
        check_features(model, tower, 768)


def test_a_folder_without_a_captioner_is_an_error_that_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"expected a folder with config\.json and model\.safetensors"):
        load_captioner(tmp_path)


def test_captions_of_an_image_share_its_prefix_and_get_the_same_loss_and_gradients(captioner):
    """Captions of 5, 3 and 4 tokens, of images 1, 0 and 1: with the whole prompt in every row, and with one token for it."""
    model, processor = captioner
    model = model.train()
    pixels, image_of_row = features(captioner, 2), torch.tensor([1, 0, 1])
    texts = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(1))
    inside = (torch.arange(5) < torch.tensor([5, 3, 4])[:, None]).long()
    prompt = torch.tensor(processor.prompt_token_ids()).expand(3, -1)

    def run(placeholders, **images):
        ids = torch.cat([prompt[:, :placeholders], texts], dim=1)
        mask = torch.cat([torch.ones(3, placeholders).long(), inside], dim=1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :placeholders] = -100
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, **images).loss
        loss.backward()
        return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}

    loss, gradients = run(prompt.shape[1], pixel_values=pixels[image_of_row])
    shared_loss, shared_gradients = run(1, pixel_values=pixels, image_of_row=image_of_row)
    model.eval()
    assert run(prompt.shape[1], pixel_values=pixels[image_of_row])[0] == pytest.approx(loss, rel=1e-6)  # by all logits
    model.zero_grad(set_to_none=True)
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    for name, expected in gradients.items():
        assert torch.allclose(shared_gradients[name], expected, rtol=1e-4, atol=1e-6), name
