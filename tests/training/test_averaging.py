"""The moving average of the weights that a run ends with."""

import pytest
import torch
from transformers import TrainerCallback

from finecap_ray.errors import MismatchError

DECAY = 0.7


class Recorder(TrainerCallback):
    """The weights at the start and after every step."""

    def __init__(self):
        self.seen = []

    def record(self, model):
        self.seen.append({name: tensor.clone() for name, tensor in model.named_parameters()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.record(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.record(model)


def test_a_run_ends_with_the_average_and_trains_as_without_it(train_alone, tmp_path):
    plain, averaged = Recorder(), Recorder()
    train_alone(steps=3, callbacks=[plain], out=tmp_path / "plain")
    trainer, _ = train_alone(steps=3, callbacks=[averaged], average_decay=DECAY)
    assert all(torch.equal(tensor, plain.seen[3][name]) for name, tensor in averaged.seen[3].items())
    expected = averaged.seen[0]
    for weights in averaged.seen[1:]:
        expected = {name: DECAY * tensor + (1 - DECAY) * weights[name] for name, tensor in expected.items()}
    moved = 0
    for name, tensor in trainer.model.named_parameters():
        torch.testing.assert_close(tensor, expected[name])
        moved += not torch.equal(tensor, averaged.seen[3][name])
    assert moved


def test_a_checkpoint_without_the_average_is_refused(train_alone, tmp_path):
    train_alone(steps=1)
    with pytest.raises(MismatchError, match=r"no average of the weights that train.*rl\.average_decay"):
        train_alone(steps=2, average_decay=DECAY, resume_from=str(tmp_path / "run" / "checkpoint-1"))
