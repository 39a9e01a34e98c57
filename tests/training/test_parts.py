"""What trains and what doesn't: to the last bit, through the trainer that RL uses; and what the captioner is then."""

import itertools

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config

from finecap_ray.captioners import load_captioner
from finecap_ray.captioners.clipcap import ClipCapConfig, ClipCapForConditionalGeneration
from finecap_ray.config import Settings, TrainableSettings, load_settings
from finecap_ray.errors import ConfigError, MismatchError
from finecap_ray.preflight import check, check_captioner
from finecap_ray.training.parts import load_trained, merged_weights, save_trained, set_trainable, share_frozen

LORA = TrainableSettings(decoder="lora", lora_rank=2, lora_alpha=6)  # scale 3
TARGETS = ("attn.c_attn.weight", "attn.c_proj.weight")


@pytest.fixture
def model(tiny_captioner):
    return load_captioner(tiny_captioner)[0]


def randomise_adapters(model):
    """B is 0 at first: the adapters then add nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def is_mapper(name):
    return name.startswith("model.mapper.")


@pytest.mark.parametrize(
    ("mapper", "decoder"),
    [
        pair
        for pair in itertools.product(("full", "frozen"), ("full", "lora", "frozen"))
        if pair != ("frozen", "frozen")
    ],
)
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_exactly_the_parts_meant_to_train_change(train_alone, model, mapper, decoder, kl_weight):
    trainable = TrainableSettings(mapper=mapper, decoder=decoder, lora_rank=2)
    trainer, _ = train_alone(steps=3, trainable=trainable, kl_weight=kl_weight, learning_rate=1e-2)
    before, after = model.state_dict(), merged_weights(trainer.model)
    assert after.keys() == before.keys()
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in before.items():
        part = mapper if is_mapper(name) else decoder
        meant_to_train = part == "full" or (part == "lora" and name.endswith(TARGETS) and ".attn." in name)
        assert torch.equal(after[name], tensor) != (meant_to_train and name not in buffers), name
    # What the adapters lie on is as it was, too.
    for layer_name, layer in trainer.model.named_modules():
        if isinstance(layer, LoraLayer):
            assert torch.equal(layer.get_base_layer().weight, before[f"{layer_name}.weight"])


def test_merged_weights_are_w_plus_b_a_times_alpha_over_rank(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_trainable(model, LORA, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged_weights(model).items())  # B is 0
    randomise_adapters(model)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merged_weights(model)
    assert merged.keys() == before.keys()
    name = "model.language_model.h.1.attn.c_attn"
    a, b = own[f"{name}.lora_A.default.weight"], own[f"{name}.lora_B.default.weight"]
    # GPT-2's Conv1D holds its matrix as [in, out].
    torch.testing.assert_close(merged[f"{name}.weight"], before[f"{name}.weight"] + (b @ a).T * 6 / 2)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())  # not altered


def test_the_merged_captioner_says_what_the_adapted_one_says(model, tiny_captioner, tmp_path):
    set_trainable(model, LORA, seed=0)
    randomise_adapters(model)
    ids = torch.tensor([[model.config.image_token_id] * 2 + [5, 7, 11]])
    pixels = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path, state_dict=merged_weights(model))
    load_captioner(tiny_captioner)[1].save_pretrained(tmp_path)
    saved, _ = load_captioner(tmp_path)
    assert not any(isinstance(module, LoraLayer) for module in saved.modules())
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(saved(input_ids=ids, pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-5)
        start, _ = load_captioner(tiny_captioner)
        assert (start(input_ids=ids, pixel_values=pixels).logits - expected).abs().max() > 0.1


def test_a_checkpoint_is_a_merged_captioner_and_goes_on_bit_equal(train_alone, tmp_path):
    settings = {"trainable": LORA, "learning_rate": 1e-2, "kl_weight": 0.1}
    whole, _ = train_alone(steps=4, **settings)
    expected = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed, scored = train_alone(steps=4, resume_from=str(checkpoint), **settings)
    assert sorted(scored) == [2, 3]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
    last, _ = load_captioner(tmp_path / "run" / "checkpoint-4")
    merged = merged_weights(resumed.model)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in last.state_dict().items())


def test_a_checkpoint_that_trained_something_else_is_refused(model, tiny_captioner, tmp_path):
    set_trainable(model, LORA, seed=0)
    save_trained(model, tmp_path)
    other, _ = load_captioner(tiny_captioner)
    set_trainable(other, TrainableSettings(), seed=0)
    with pytest.raises(MismatchError, match=r"with 4 LoRA adapters, this run trains .* with 0 LoRA adapters"):
        load_trained(other, tmp_path)
    with pytest.raises(MismatchError, match="trained 0 numbers"):
        load_trained(model, tmp_path / "elsewhere")


def test_the_reference_of_a_kl_term_shares_what_is_frozen_and_keeps_the_start(model, tiny_captioner):
    reference, _ = load_captioner(tiny_captioner)
    set_trainable(model, LORA, seed=0)
    share_frozen(reference, model)
    layer = model.model.language_model.h[0].attn.c_attn
    shared = reference.model.language_model.h[0].attn.c_attn
    assert shared.weight.data_ptr() == layer.get_base_layer().weight.data_ptr()
    assert reference.model.mapper.out.weight.data_ptr() != model.model.mapper.out.weight.data_ptr()
    randomise_adapters(model)
    start = load_captioner(tiny_captioner)[0].state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in reference.state_dict().items())


def test_the_kl_term_is_zero_at_the_start_and_grows_with_the_adapters(train_alone):
    trainer, _ = train_alone(steps=3, trainable=LORA, kl_weight=0.1, learning_rate=1e-2)
    first, *_, last = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert first == pytest.approx(0, abs=1e-6)
    assert last > 1e-4


def test_ndlb_s_language_side_has_as_many_numbers_as_the_paper_s_release():
    """37,367,040 in all; of these LoRA on CLIP's vision tower is 12 x 32 x (768 + 2304 + 2 (768 + 3072)) = 4,128,768."""
    decoder = GPT2Config(vocab_size=50_257)
    config = ClipCapConfig(text_config=decoder, feature_dim=512, prefix_length=10, mapper="mlp", mapper_width=3840)
    with torch.device("meta"):
        model = ClipCapForConditionalGeneration(config)
        set_trainable(model, TrainableSettings(decoder="lora"), seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 37_367_040 - 12 * 32 * (768 + 2304 + 2 * (768 + 3072))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.trainable={vision: frozen, mapper: frozen, decoder: frozen}", "nothing trains"),
        ("rl.trainable.mapper=lora", "rl.trainable.mapper: Input should be 'full' or 'frozen', got 'lora'"),
        ("rl.trainable.lora_targets=[]", "rl.trainable.lora_targets"),
        ("rl.trainable.lora_rank=0", "rl.trainable.lora_rank"),
        ("rl.trainable.vision=full", "the captioner is a ClipCap, whose features come with the bags"),
        ("mle.epochs=0", "starts RL from captioner.spec, and none is given"),
    ],
)
def test_what_can_not_be_trained_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_settings("demo", [override])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj",), "'q_proj' isn't there in a decoder of type gpt2, which has attn.c_attn, attn.c_proj, mlp.c_fc"),
        (("c_attn", "attn"), "'attn' isn't a matrix"),
        (("wte",), "'wte' isn't a matrix"),
        (("lm_head",), "'lm_head' isn't there"),
    ],
)
def test_adapters_that_fit_nowhere_are_refused_before_ray_starts(tiny_captioner, targets, message):
    trainable = TrainableSettings(decoder="lora", lora_targets=targets)
    for spec in (None, str(tiny_captioner)):
        settings = Settings.model_validate({"captioner": {"spec": spec}, "rl": {"trainable": trainable.model_dump()}})
        with pytest.raises(ConfigError, match=message):
            check_captioner(settings)
    with pytest.raises(ConfigError, match=message):  # as --dry-run and every run do, of the decoder that MLE would make
        check(Settings.model_validate({"rl": {"trainable": trainable.model_dump()}}))
