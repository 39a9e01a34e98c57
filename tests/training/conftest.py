"""BagTrainer without engines: the captions are drawn by the model itself, so that a step takes a fraction of a second."""

import numpy as np
import pytest
import torch

from finecap_ray.captioners import load_captioner
from finecap_ray.captioners.build import build_clipcap
from finecap_ray.config import CaptionerSettings, RewardSettings, RlSettings
from finecap_ray.records import Bag, BagImage, Rollout
from finecap_ray.rewards.combine import NAMES
from finecap_ray.training.trainer import BagTrainer, ScoredRollouts, grpo_arguments

FEATURES, MAX_TOKENS = 16, 6
CAPTIONS = ("a red apple on a plate", "two dogs run on the beach", "a man rides a bike")


@pytest.fixture(scope="session")
def tiny_captioner(tmp_path_factory):
    """Folder of a captioner of two layers whose distributions are far from uniform."""
    settings = CaptionerSettings(
        prefix_length=2, width=16, layers=2, heads=2, vocabulary=300, max_tokens=MAX_TOKENS, dropout=0
    )
    model, processor = build_clipcap(settings, CAPTIONS, FEATURES, "", feature_dropout=0.0, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_bags():
    """Two bags of two images."""
    rows = np.random.default_rng(0).standard_normal((4, FEATURES)).astype(np.float16)
    images = [BagImage(f"image {row}", None, ("a caption",), rows[row], rows[row]) for row in range(4)]
    return [Bag("a", 0.9, tuple(images[:2])), Bag("b", 0.8, tuple(images[2:]))]


@torch.no_grad()
def caption(model, end_token, features, temperature, generator):
    """Token ids and their log-probs, sampled token by token up to the end token or MAX_TOKENS."""
    prompt = [model.config.image_token_id] * model.config.prefix_length
    tokens, logprobs = [], []
    while len(tokens) < MAX_TOKENS and (not tokens or tokens[-1] != end_token):
        ids = torch.tensor([prompt + tokens])
        pixels = torch.from_numpy(features[None].astype(np.float32))
        own = (model(input_ids=ids, pixel_values=pixels).logits[0, -1] / temperature).log_softmax(-1)
        tokens.append(int(torch.multinomial(own.exp(), 1, generator=generator)))
        logprobs.append(own[tokens[-1]].item())
    return tokens, logprobs


def own_rollouts(model, bags, temperature, processor, captions_per_image, step):
    """Rollouts by the model itself; what a sampler gives."""
    generator = torch.Generator().manual_seed(step)
    end = processor.tokenizer.eos_token_id
    prompt = tuple(processor.prompt_token_ids())
    rollouts = []
    for image in (image for bag in bags for image in bag.images):
        for _ in range(captions_per_image):
            tokens, logprobs = caption(model, end, image.features, temperature, generator)
            finish = "stop" if tokens[-1] == end else "length"
            text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
            rollouts.append(
                Rollout(image.image_id, prompt, tuple(tokens), tuple(logprobs), text, finish, weights_version=step)
            )
    return rollouts


@pytest.fixture
def train_alone(tiny_captioner, two_bags, tmp_path):
    """A function that trains for some steps and returns (trainer, rollouts and rewards by step).

    `prepare(model)` may change the captioner before training; `wrong(step, what a sampler is given)` what captions are drawn
    with, and `wrap(step, scored)` what the trainer is told. `bags(step)` are those of the steps from there on, else the two bags.
    """

    def go(
        steps=1,
        prepare=None,
        wrong=None,
        wrap=None,
        callbacks=(),
        estimator=None,
        arguments=None,
        resume_from=None,
        bags=None,
        out=None,
        **changes,
    ):
        rl = RlSettings(
            **{
                "images_per_step": 4,
                "captions_per_image": 3,
                "learning_rate": 0.1,
                "max_grad_norm": 1e9,
                "drift_bound": 1e-5,
                "save_every": 1,
                "keep_checkpoints": 10,
                "reward": RewardSettings(**dict.fromkeys(NAMES, 0) | {"self_retrieval": 1}),
                "average_decay": 0,
            }
            | changes
        )
        model, processor = load_captioner(tiny_captioner)
        model.train()
        if prepare is not None:
            prepare(model)
        scored = {}

        def rollout(step, bags, policy):
            given = {"model": policy, "bags": bags, "temperature": rl.temperature}
            given |= {} if wrong is None else wrong(step, given)
            rollouts = own_rollouts(**given, processor=processor, captions_per_image=rl.captions_per_image, step=step)
            # Any function of a caption will do.
            rewards = np.array([sum(one.token_ids) % 7 / 7 for one in rollouts], dtype=np.float32)
            scored[step] = ScoredRollouts(rollouts, {"self_retrieval": rewards}, {})
            return scored[step] if wrap is None else wrap(step, scored[step])

        options = grpo_arguments(rl, str(out or tmp_path / "run"), steps, MAX_TOKENS, use_gpu=False, seed=0)
        for name, value in (arguments or {}).items():
            setattr(options, name, value)
        trainer = BagTrainer(
            model,
            processor,
            options,
            rl,
            bags=bags or (lambda step: iter([two_bags] * (steps - step))),
            rollout=rollout,
            estimator=estimator or (lambda rewards: rewards - rewards.mean()),
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer, scored

    return go
