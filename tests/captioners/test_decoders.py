"""A ClipCap on a pretrained causal language model with its own tokenizer: a tiny Llama of random weights stands for any."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finecap_ray.captioners import load_captioner
from finecap_ray.captioners.build import build_clipcap
from finecap_ray.captioners.clipcap_family import FeatureImages
from finecap_ray.config import CaptionerSettings, MleSettings, ResourceSettings, Settings
from finecap_ray.errors import ConfigError, MismatchError
from finecap_ray.training.guards import caption_logits, token_drift
from finecap_ray.training.mle import CaptionedImages, MleJob, mle_trainer, run_mle

FEATURES, PREFIX, MAX_TOKENS = 16, 3, 8
KINDS = ("mlp", "transformer")


def settings(decoder, mapper, **changes):
    return CaptionerSettings(
        **{
            "decoder": str(decoder),
            "mapper": mapper,
            "mapper_width": 32,
            "mapper_layers": 1,
            "prefix_length": PREFIX,
            "max_tokens": MAX_TOKENS,
        }
        | changes
    )


def build(decoder, mapper, **changes):
    model, processor = build_clipcap(settings(decoder, mapper, **changes), (), FEATURES, "tower", 0.0, seed=0)
    return model.eval(), processor


def pixels(n):
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, processor, n=3):
    return model(**processor(images=list(pixels(n)), text=["<image>a red"] * n, return_tensors="pt")).logits


def changed(folder, tmp_path, **changes):
    """A copy of the decoder whose config.json says something else."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_behind_the_prefix_the_decoder_is_the_one_that_was_named(llama_folder):
    """Logits behind a prefix of the decoder's own word embeddings are those that it gives behind the words."""
    model, processor = build(llama_folder, "mlp")
    own = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    words = processor.tokenizer("a red apple on", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = own(input_ids=words).logits[..., : model.config.text_config.vocab_size]
        found = model(inputs_embeds=model.get_input_embeddings()(words)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_new_prefix_is_as_large_as_the_decoder_s_words(llama_folder):
    model, _ = build(llama_folder, "linear")
    with torch.no_grad():
        prefix = model.model.mapper(torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(0)))
        words = model.get_input_embeddings().weight
    assert prefix.square().mean().sqrt() == pytest.approx(float(words.square().mean().sqrt()), rel=0.1)


def test_the_tokenizer_is_the_decoder_s_with_one_token_more(llama_folder):
    model, processor = build(llama_folder, "mlp")
    text = model.config.text_config
    assert processor.prompt_token_ids() == [text.vocab_size] * PREFIX == [len(processor.tokenizer) - 1] * PREFIX
    # The decoder's weights have rows beyond its words, which could be sampled: they are gone.
    assert model.lm_head.out_features == text.vocab_size < own_vocabulary(llama_folder)
    assert processor.tokenizer.eos_token == "</s>" and text.eos_token_id == processor.tokenizer.eos_token_id
    assert "<tool>" in processor.tokenizer.all_special_tokens


def own_vocabulary(folder):
    return json.loads((folder / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("mapper", KINDS)
def test_it_comes_back_bit_equal(llama_folder, mapper, tmp_path):
    model, processor = build(llama_folder, mapper)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, again_processor = load_captioner(tmp_path)
    assert torch.equal(logits(again, again_processor), logits(model, processor))
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    assert again_processor.prompt_token_ids() == processor.prompt_token_ids()


@pytest.mark.parametrize("mapper", KINDS)
def test_maximum_likelihood_trains_all_of_it(llama_folder, mapper, tmp_path):
    """Two images and their captions, until it knows them."""
    own = CaptionedImages(pixels(2).numpy().astype(np.float16), [["a red apple"], ["two dogs run"]])
    run = Settings(
        run_dir=str(tmp_path),
        captioner=settings(llama_folder, mapper),
        mle=MleSettings(epochs=40, batch_size=2, learning_rate=3e-3, evaluations=1, feature_dropout=0.0),
        resources=ResourceSettings(threads=1),
    )
    job = MleJob(run, own, own, "tower", str(tmp_path / "mle"), str(tmp_path / "logs"))
    trainer = mle_trainer(job)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    run_mle(trainer, job)
    model, processor = load_captioner(job.out)
    still = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert still == ["model.mapper.mean", "model.mapper.deviation"]
    prompt = torch.tensor([processor.prompt_token_ids()] * 2)
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pixel_values=torch.from_numpy(own.features).float(),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
    )
    texts = processor.tokenizer.batch_decode(tokens[:, PREFIX:], skip_special_tokens=True)
    assert texts == ["a red apple", "two dogs run"]


def test_the_sampler_gives_the_trainer_s_log_probs(llama_folder, ray_session, resources, tmp_path):
    from finecap_ray.sampling.sampler import SamplerPool
    from finecap_ray.sampling.spec import SamplingSpec
    from finecap_ray.sampling.weights import publish

    model, processor = build(llama_folder, "transformer")
    model.save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    with torch.no_grad():  # what is sampled with is what was published, not what lies in the folder
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    features, spec = pixels(4).numpy().astype(np.float16), SamplingSpec(3, MAX_TOKENS)
    pool = SamplerPool(
        str(tmp_path / "captioner"), resources.model_copy(update={"samplers": 1}), str(tmp_path / "logs")
    )
    try:
        pool.wait_until_ready()
        publish(pool.board, 5, model.state_dict(), timeout_s=60)
        rollouts = pool.sample(5, [f"image {row}" for row in range(4)], features, spec, seeds=list(range(4)))
    finally:
        pool.close()
    read = FeatureImages(torch.from_numpy(features).float(), tuple(processor.prompt_token_ids()))
    drifts = [
        token_drift(caption_logits(model, read, row // 3, rollout), rollout, 1.0).max().item()
        for row, rollout in enumerate(rollouts)
    ]
    assert max(drifts) < 1e-5
    assert -6 < np.mean([logprob for rollout in rollouts for logprob in rollout.logprobs]) < -0.05
    assert len({rollout.token_ids for rollout in rollouts}) > 8


def test_what_does_not_fit_is_refused(llama_folder, tmp_path):
    with pytest.raises(MismatchError, match=r"reads 64 tokens, captioner\.prefix_length \+ max_tokens are 65: lower"):
        build(llama_folder, "mlp", prefix_length=57)
    with pytest.raises(MismatchError, match=r"the tokenizer has .* tokens, the decoder embeds 40"):
        small = changed(llama_folder, tmp_path, vocab_size=40)
        (small / "model.safetensors").unlink()
        config = AutoModelForCausalLM.from_pretrained(llama_folder).config
        config.vocab_size = 40
        AutoModelForCausalLM.from_config(config).save_pretrained(small)
        build(small, "mlp")
    with pytest.raises(MismatchError, match=r"<image> is token .* of its tokenizer, and .* has to be the first id"):
        taken = shutil.copytree(llama_folder, tmp_path / "taken")
        own = AutoTokenizer.from_pretrained(taken)
        own.add_special_tokens({"extra_special_tokens": ["<image>"]})
        own.save_pretrained(taken)
        build(taken, "mlp")
    with pytest.raises(ConfigError, match="give scratch, smollm2, or a folder or hub name"):
        build(tmp_path, "mlp")
