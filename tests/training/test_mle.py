"""Maximum likelihood: rows and their order, dev CIDEr along the way, and what a killed run ends in."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerState

from finecap_ray.captioners import load_captioner
from finecap_ray.config import CaptionerSettings, MleSettings, ResourceSettings, Settings
from finecap_ray.errors import DataError, MismatchError
from finecap_ray.training.caption_rows import CaptionDataset, LikeLengths
from finecap_ray.training.logs import MetricsFile
from finecap_ray.training.metrics_file import read_metrics
from finecap_ray.training.mle import METRICS_FILE, CaptionedImages, EpochOrder, MleJob, mle_trainer, run_mle, train_mle

COLOURS, THINGS = ("red", "green", "blue", "black"), ("car", "dog", "hat", "tree", "boat")


def world(images: int, first: int) -> CaptionedImages:
    """Images whose features say which colour and thing they show, with noise; two captions each."""
    rng = np.random.default_rng(first)
    shown = [(int(rng.integers(len(COLOURS))), int(rng.integers(len(THINGS)))) for _ in range(images)]
    features = 0.3 * rng.standard_normal((images, len(COLOURS) + len(THINGS)))
    for row, (colour, thing) in enumerate(shown):
        features[row, [colour, len(COLOURS) + thing]] += 1
    captions = [[f"a {COLOURS[c]} {THINGS[t]}", f"the {THINGS[t]} is {COLOURS[c]} ."] for c, t in shown]
    return CaptionedImages(features.astype(np.float16), captions)


def job(folder, **changes) -> MleJob:
    mle = {"epochs": 4, "batch_size": 16, "learning_rate": 5e-3, "evaluations": 5, "dev_images": 40} | changes
    settings = Settings(
        run_dir=str(folder),
        captioner=CaptionerSettings(
            prefix_length=2, width=32, layers=1, heads=1, vocabulary=280, max_tokens=8, dropout=0.1
        ),
        mle=MleSettings(**mle),
        resources=ResourceSettings(threads=1),
    )
    dev = world(40, 1) if settings.mle.evaluations else None
    return MleJob(settings, world(100, 0), dev, "tower", str(folder / "mle"), str(folder / "logs"))


class Killed(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder) -> dict[str, torch.Tensor]:
    return load_captioner(folder)[0].state_dict()


def test_a_captioner_of_another_tower_s_features_is_refused(tmp_path, captioner_folder):
    own = job(tmp_path, evaluations=0)
    start = own.settings.captioner.model_copy(update={"spec": str(captioner_folder)})
    model = load_captioner(captioner_folder)[0]
    features = np.zeros((len(own.train.features), model.config.feature_dim), dtype=np.float16)
    settings = own.settings.model_copy(update={"captioner": start})
    of_another = replace(own, settings=settings, train=replace(own.train, features=features))
    with pytest.raises(MismatchError, match="the captioner was trained on features of tower"):
        mle_trainer(of_another)


def test_a_captioner_keeps_how_long_the_captions_are_that_it_learns(tmp_path):
    own = job(tmp_path, evaluations=0)
    trainer = mle_trainer(own)
    assert trainer.model.generation_config.max_new_tokens == 8
    for part in (trainer.model, trainer.processor):
        part.save_pretrained(tmp_path / "start")
    onwards = own.settings.captioner.model_copy(update={"spec": str(tmp_path / "start"), "max_tokens": 5})
    trainer = mle_trainer(replace(own, settings=own.settings.model_copy(update={"captioner": onwards})))
    assert trainer.model.generation_config.max_new_tokens == 5


def test_every_caption_of_an_image_is_a_row(captioner):
    _, processor = captioner
    own = CaptionedImages(np.zeros((2, 3), dtype=np.float16), [["a cat", "one black cat"], ["dogs"]])
    rows = CaptionDataset(own.features, own.captions, processor, max_tokens=8)
    assert [row["image"] for row in map(rows.__getitem__, range(3))] == [0, 0, 1]
    batch = rows.collate([rows[0], rows[1]])
    learnt = batch["input_ids"][batch["labels"] != -100]
    end = processor.tokenizer.eos_token_id
    assert learnt.tolist() == [
        *processor.tokenizer("a cat").input_ids,
        end,
        *processor.tokenizer("one black cat").input_ids,
        end,
    ]


def test_word_noise_changes_what_is_read_and_not_what_is_learnt(captioner):
    _, processor = captioner
    own = CaptionedImages(np.zeros((40, 3), dtype=np.float16), [["a cat on a mat", "two dogs"]] * 40)
    rows = (CaptionDataset(own.features, own.captions, processor, 12, share) for share in (0.0, 0.25))
    plain, noisy = (one.collate([one[row] for row in range(len(one))]) for one in rows)
    for name in ("labels", "attention_mask", "pixel_values"):
        assert torch.equal(noisy[name], plain[name])
    caption = plain["labels"] != -100
    assert torch.equal(noisy["input_ids"][~caption], plain["input_ids"][~caption])
    own_tokens = plain["input_ids"][caption]
    changed = noisy["input_ids"][caption] != own_tokens
    assert set(noisy["input_ids"][caption].tolist()) <= set(own_tokens.tolist())
    assert 0.1 < changed.float().mean() < 0.25  # some are replaced by themselves


def test_an_epoch_takes_every_row_once_and_batches_of_like_length():
    lengths = torch.randint(4, 30, (1003,), generator=torch.Generator().manual_seed(0))
    sampler = LikeLengths(lengths.tolist(), batch_size=8, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(1003))
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in torch.tensor(first).split(8))
    assert padded < 1.15 * int(lengths.sum())  # in random order: about 1.6
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(1003))


def test_the_weights_with_the_best_dev_cider_are_the_result(tmp_path):
    """A captioner that knows its world unlearns it: the result is that of the first evaluation."""
    first = job(tmp_path / "first", epochs=12)
    run_mle(mle_trainer(first), first)
    own = job(tmp_path / "then", epochs=2, evaluations=7)
    start = own.settings.captioner.model_copy(update={"spec": first.out})
    nothing = CaptionedImages(own.train.features, [["nothing to see ."]] * len(own.train.captions))
    own = replace(own, train=nothing, settings=own.settings.model_copy(update={"captioner": start}))
    run_mle(mle_trainer(own), own)
    seen = [row["eval_CIDEr"] for row in read_metrics(tmp_path / "then" / "mle" / METRICS_FILE) if "eval_CIDEr" in row]
    assert len(seen) == 7 and max(seen) > seen[-1]
    again = mle_trainer(own)
    again.model.load_state_dict(weights(own.out))
    assert again.evaluate()["eval_CIDEr"] == pytest.approx(max(seen))


def test_training_stops_when_patience_ends(tmp_path):
    own = job(tmp_path, learning_rate=1e-9, epochs=8, evaluations=20, patience=3)
    run_mle(mle_trainer(own), own)
    evaluated = [row for row in read_metrics(tmp_path / "mle" / METRICS_FILE) if "eval_CIDEr" in row]
    assert len(evaluated) == 4  # the first is the best there is, and three after it are no better


def test_the_mapper_has_a_learning_rate_of_its_own(tmp_path):
    own = job(tmp_path, epochs=1, evaluations=0, learning_rate=1e-12, mapper_learning_rate=5e-3)
    trainer = mle_trainer(own)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    run_mle(trainer, own)
    after = weights(own.out)
    moved = {name for name, tensor in after.items() if (tensor - before[name]).abs().max() > 1e-4}
    assert moved and all(name.startswith("model.mapper.") for name in moved)


@pytest.mark.parametrize(
    "changes", [{"evaluations": 0, "word_noise": 0.3, "mapper_learning_rate": 1e-2}, {"evaluations": 5}]
)
def test_a_killed_run_ends_in_the_weights_of_an_unbroken_one(tmp_path, changes):
    whole, killed = (job(tmp_path / name, **changes) for name in ("whole", "killed"))
    run_mle(mle_trainer(whole), whole)
    trainer = mle_trainer(killed)
    trainer.add_callback(Killed(step=33))  # of 52, within the third epoch
    with pytest.raises(KeyboardInterrupt):
        run_mle(trainer, killed)
    resumed = mle_trainer(killed)
    run_mle(resumed, killed)
    expected, found = weights(whole.out), weights(killed.out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_under_ray_train_the_captioner_learns_what_it_sees(ray_session, resources, tmp_path):
    own = job(tmp_path, epochs=12)
    own = replace(own, settings=own.settings.model_copy(update={"resources": resources}))
    train_mle(own)
    rows = read_metrics(tmp_path / "mle" / METRICS_FILE)
    seen = [row["eval_CIDEr"] for row in rows if "eval_CIDEr" in row]
    assert max(seen) > 3 * seen[0] and max(seen) > 1


def test_several_workers_learn_from_the_mean_over_the_tokens_of_all(ray_session, resources, tmp_path):
    alone, together = (
        job(tmp_path / str(workers), epochs=2, evaluations=0, batch_size=16 // workers, num_workers=workers)
        for workers in (1, 2)
    )
    run_mle(mle_trainer(alone), alone)
    train_mle(replace(together, settings=together.settings.model_copy(update={"resources": resources})))
    expected, found = (
        read_metrics(tmp_path / workers / "mle" / METRICS_FILE)[-1]["train_loss"] for workers in ("1", "2")
    )
    assert found == pytest.approx(expected, rel=0.1)


def test_evaluations_need_captions_of_dev_images(tmp_path):
    own = job(tmp_path)
    with pytest.raises(
        DataError, match=r"mle\.evaluations needs images with captions in a split whose name begins with dev"
    ):
        train_mle(replace(own, dev=None))


def test_an_order_learns_the_epoch_that_a_training_resumes():
    order = LikeLengths([3] * 20, batch_size=4, seed=0)
    order.set_epoch(2)
    third = list(order)
    order.set_epoch(0)
    EpochOrder(order).on_epoch_begin(None, TrainerState(epoch=2.4), None)
    assert list(order) == third


def test_what_a_killed_run_logged_after_its_checkpoint_is_taken_away(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    file, state = MetricsFile(path, updates_per_step=2), TrainerState(global_step=4, is_world_process_zero=True)
    file.on_train_begin(None, state, None)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    state.global_step = 6
    file.on_log(None, state, None, {"reward": 0.5})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "reward": 0.5}]
