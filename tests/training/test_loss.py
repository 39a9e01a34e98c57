"""The loss that BagTrainer computes through TRL, against the formula written out: gradients and one step of SGD.

The formula is worked out in float64, one caption at a time: no padding, no batch, no ratio, no clipping.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from finecap_ray.captioners import load_captioner
from finecap_ray.training.advantages import leave_one_out

MAX_TOKENS = 6  # as in conftest.py
TOLERANCE = 1e-5  # relative, in float32


class Gradients(TrainerCallback):
    """Keeps the parameters and gradients as they are when the optimizer is about to step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}


def perturb(model):
    """So that the policy isn't where it started: the divergence from the start is then above 0."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def repeat(step, scored):
    """The first image gets the same caption twice: read once, it counts twice."""
    scored.rollouts[1] = scored.rollouts[0]
    scored.components["self_retrieval"][1] = scored.components["self_retrieval"][0]
    return scored


def log_probs(model, features, rollout, temperature):
    """log p(y_t | image, y_<t) at a temperature, of each token: [T]."""
    ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
    pixels = torch.from_numpy(features[None].astype(np.float64))
    logits = model(input_ids=ids, pixel_values=pixels).logits[0, len(rollout.prompt_token_ids) - 1 : -1]
    chosen = torch.tensor(rollout.token_ids)[:, None]
    return (logits / temperature).log_softmax(-1).gather(-1, chosen)[:, 0]


def formula(policy, start, bags, scored, loss_type, kl_weight, temperature):
    """REINFORCE: the mean over the C captions of -(A_c sum_t log p_t) / l_c, where l_c is what the loss type divides by.

    With a KL term, each token adds kl_weight * (p / p_old) * (q/p - log(q/p) - 1), q of the start (k3, Schulman 2020). The
    ratio is 1, its gradient isn't: with it the mean gradient is that of KL(p || q), without it that of KL(q || p)
    (DeepSeek-V3.2, arXiv:2512.02556).
    """
    features = [image.features for bag in bags for image in bag.images]
    captions = len(scored.rollouts) // len(features)
    rewards = torch.from_numpy(scored.components["self_retrieval"]).view(-1, captions)
    advantages = leave_one_out(rewards).flatten().double()
    lengths = [len(rollout.token_ids) for rollout in scored.rollouts]
    divisor = {
        "dr_grpo": [MAX_TOKENS] * len(lengths),  # a constant
        "grpo": lengths,  # each caption's own length
        "dapo": [sum(lengths) / len(lengths)] * len(lengths),  # all tokens weigh the same
    }[loss_type]
    loss = 0.0
    for row, rollout in enumerate(scored.rollouts):
        own = log_probs(policy, features[row // captions], rollout, temperature)
        tokens = -advantages[row] * own
        if kl_weight:
            with torch.no_grad():
                reference = log_probs(start, features[row // captions], rollout, temperature)
            ratio = (own - own.detach()).exp()
            tokens = tokens + kl_weight * ratio * ((reference - own).exp() - (reference - own) - 1)
        loss = loss + tokens.sum() / divisor[row]
    return loss / len(scored.rollouts)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "dapo"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_and_one_step_are_those_of_the_formula(
    train_alone, tiny_captioner, two_bags, loss_type, kl_weight, temperature
):
    seen, rate = Gradients(), 0.5
    trainer, scored = train_alone(
        prepare=perturb,
        wrap=repeat,
        callbacks=[seen],
        estimator=leave_one_out,
        arguments={"optim": "sgd"},
        learning_rate=rate,
        loss_type=loss_type,
        kl_weight=kl_weight,
        temperature=temperature,
    )
    assert len({len(rollout.token_ids) for rollout in scored[0].rollouts}) > 1  # there is padding in the batch
    policy, _ = load_captioner(tiny_captioner)
    start = copy.deepcopy(policy).double()
    policy.load_state_dict(seen.weights, strict=False)
    formula(policy.double(), start, two_bags, scored[0], loss_type, kl_weight, temperature).backward()

    expected = {name: weight.grad for name, weight in policy.named_parameters()}
    assert seen.gradients.keys() == expected.keys()
    error = sum((seen.gradients[name] - expected[name]).square().sum() for name in expected).sqrt()
    length = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    assert error <= TOLERANCE * length
    for name, weight in trainer.model.named_parameters():
        after = seen.weights[name] - rate * expected[name].float()
        torch.testing.assert_close(weight.detach(), after, rtol=TOLERANCE, atol=1e-6 * rate * length.item())


@pytest.mark.parametrize(("ratio", "clips"), [("token", (0.1, 0.3)), ("sequence", (0.02, 0.04))])
def test_a_second_update_follows_the_clipped_ratio(train_alone, tiny_captioner, two_bags, ratio, clips):
    """The mean over captions and their tokens of -min(r A, clip(r) A), r = p / p_old, for a sequence the geometric mean over
    its tokens (Schulman 2017, arXiv:1707.06347; DAPO, arXiv:2503.14476; GSPO, arXiv:2507.18071). p_old is the sampler's."""
    seen, (low, high) = Gradients(), clips
    trainer, scored = train_alone(
        callbacks=[seen],
        estimator=leave_one_out,
        arguments={"optim": "sgd"},
        learning_rate=0.3,
        loss_type="grpo",
        updates_per_step=2,
        ratio=ratio,
        clip_low=low,
        clip_high=high,
    )
    assert trainer.state.global_step == 2 and len(scored) == 1  # two optimizer steps on one rollout
    policy = load_captioner(tiny_captioner)[0].double()
    assert not torch.equal(seen.weights["model.mapper.out.weight"].double(), policy.model.mapper.out.weight)
    policy.load_state_dict(seen.weights, strict=False)  # as after the first update
    features = [image.features for bag in two_bags for image in bag.images]
    advantages = leave_one_out(
        torch.from_numpy(scored[0].components["self_retrieval"]).view(len(features), -1)
    ).flatten()
    loss, clipped = 0.0, 0
    for rollout, advantage, image in zip(
        scored[0].rollouts, advantages, np.arange(len(features)).repeat(3), strict=True
    ):
        own = log_probs(policy, features[image], rollout, temperature=1.0)
        log_ratio = own - torch.tensor(rollout.logprobs)
        r = (log_ratio.mean() if ratio == "sequence" else log_ratio).exp()
        loss = loss - torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage).mean()
        clipped += int((((r > 1 + high) & (advantage > 0)) | ((r < 1 - low) & (advantage < 0))).sum())
    assert clipped > 0
    (loss / len(advantages)).backward()
    expected = {name: weight.grad for name, weight in policy.named_parameters()}
    error = sum((seen.gradients[name] - expected[name]).square().sum() for name in expected).sqrt()
    length = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    assert error <= TOLERANCE * length
    (row,) = [row for row in trainer.state.log_history if "reward" in row]  # one of the step, over both updates
    assert row["clip_ratio/region_mean"] > 0 and row["entropy"] > 0
