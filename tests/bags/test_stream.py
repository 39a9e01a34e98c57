"""The stream of a run, through real Ray Data: every bag of an epoch once, in the planned order."""

import os

import numpy as np
import pytest
import ray

from finecap_ray.bags.bag_set import read_manifest
from finecap_ray.bags.build import build_bags
from finecap_ray.bags.stream import plan_run, read_bags, read_bank, stream_bags
from finecap_ray.config import BagSettings, RlSettings, Stage
from finecap_ray.errors import DeadlineError

CURRICULUM = (Stage(bag_size=2, epochs=2), Stage(bag_size=3, epochs=1))


@ray.remote
class Holder:
    def ready(self):
        return True


def settings(**changes):
    return RlSettings(**{"images_per_step": 9, "curriculum": CURRICULUM} | changes)


def test_each_bag_of_an_epoch_comes_once_in_the_order_of_the_plan(ray_session, bag_folder):
    manifest = read_manifest(bag_folder)
    steps = plan_run(manifest, settings(), seed=3)
    stream = list(stream_bags(bag_folder, steps, rank=0, timeout_s=60))
    assert len(stream) == len(steps)
    names = {size: [bag.bag_id for bag in read_bags(bag_folder, size)] for size in (2, 3)}
    for step, bags in zip(steps, stream, strict=True):
        assert [bag.bag_id for bag in bags] == [names[step.bag_size][row] for row in step.workers[0]]
        assert {len(bag.images) for bag in bags} == {step.bag_size}
    orders = []
    for epoch, size in enumerate((2, 2, 3)):
        own = [bag.bag_id for step, bags in zip(steps, stream, strict=True) if step.epoch == epoch for bag in bags]
        assert sorted(own) == sorted(names[size])
        orders.append(own)
    assert orders[0] != orders[1]  # a new order each epoch


def test_the_workers_of_a_step_share_its_bags(ray_session, bag_folder):
    steps = plan_run(read_manifest(bag_folder), settings(num_workers=2), seed=3)[:5]
    shares = [list(stream_bags(bag_folder, steps, rank, 60)) for rank in range(2)]
    alone = list(
        stream_bags(bag_folder, plan_run(read_manifest(bag_folder), settings(), seed=3)[:5], rank=0, timeout_s=60)
    )
    for first, second, whole in zip(*shares, alone, strict=True):
        assert [bag.bag_id for bag in first + second] == [bag.bag_id for bag in whole]


def test_a_stream_that_begins_later_goes_on_with_the_same_bags(ray_session, bag_folder):
    steps = plan_run(read_manifest(bag_folder), settings(), seed=3)[:6]
    whole, rest = (
        list(stream_bags(bag_folder, steps, rank=0, timeout_s=60)),
        list(stream_bags(bag_folder, steps[2:], rank=0, timeout_s=60)),
    )
    assert [[bag.bag_id for bag in bags] for bags in rest] == [[bag.bag_id for bag in bags] for bags in whole[2:]]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_killed_stream_goes_on_with_other_workers(ray_session, bag_folder, workers):
    manifest = read_manifest(bag_folder)
    before = [
        stream_bags(bag_folder, plan_run(manifest, settings(num_workers=2), seed=3), rank, 60) for rank in range(2)
    ]
    seen = [(bag.bag_id, len(bag.images)) for stream in before for _ in range(5) for bag in next(stream)]
    state = before[0].state_dict()
    assert state == before[1].state_dict() and state["step"] == 5
    plan = plan_run(manifest, settings(num_workers=workers), 3, state)
    for rank in range(workers):
        seen += [(bag.bag_id, len(bag.images)) for bags in stream_bags(bag_folder, plan, rank, 60) for bag in bags]
    names = {size: [(bag.bag_id, size) for bag in read_bags(bag_folder, size)] for size in (2, 3)}
    assert sorted(seen) == sorted(names[2] * 2 + names[3])


def test_bags_of_several_files_are_found(ray_session, bag_source, tmp_path):
    manifest = build_bags(bag_source, tmp_path, (2,), BagSettings(rows_per_group=4), seed=0, images_per_part=17)
    assert len(list((tmp_path / "size=2").iterdir())) == -(-manifest["sizes"]["2"]["bags"] // 8) > 2
    curriculum = (Stage(bag_size=2, epochs=1),)
    plan = plan_run(manifest, settings(curriculum=curriculum, groups_per_window=3), seed=0)
    streamed = [bag for bags in stream_bags(tmp_path, plan, 0, 60) for bag in bags]
    whole = read_bags(tmp_path, 2)
    rows = [row for step in plan for row in step.workers[0]]
    assert [bag.bag_id for bag in streamed] == [whole[row].bag_id for row in rows]
    assert all(
        (a.images[0].embedding == whole[r].images[0].embedding).all() for a, r in zip(streamed, rows, strict=True)
    )


def test_bags_come_where_every_cpu_is_held(ray_session, bag_folder):
    """As by the trainer, samplers and scorers, which wait for the bags."""
    steps = plan_run(read_manifest(bag_folder), settings(max_steps=2), seed=0)
    free = ray.available_resources().get("CPU", 0)  # the engines of other tests hold the rest
    holder = Holder.options(num_cpus=free).remote()
    try:
        ray.get(holder.ready.remote(), timeout=60)
        assert len(list(stream_bags(bag_folder, steps, rank=0, timeout_s=60))) == 2
    finally:
        ray.kill(holder)


def test_bags_wait_for_a_slow_step(ray_session, bag_folder, monkeypatch):
    """Ray Data gives up after half an hour (here a millisecond) in which nobody took what it has read."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 1e-3)
    steps = plan_run(read_manifest(bag_folder), settings(max_steps=2), seed=0)
    assert len(list(stream_bags(bag_folder, steps, rank=0, timeout_s=60))) == 2


def test_bags_that_do_not_come_are_told_of_in_time(ray_session, bag_source, tmp_path):
    manifest = build_bags(bag_source, tmp_path, (2,), BagSettings(rows_per_group=4), seed=0, images_per_part=17)
    plan = plan_run(manifest, settings(curriculum=(Stage(bag_size=2, epochs=1),)), seed=0)
    stuck = tmp_path / "size=2" / "part-00001.parquet"
    stuck.unlink()
    os.mkfifo(stuck)  # who opens it waits for someone who writes
    with pytest.raises(DeadlineError, match=r"no bag of .* came within 2 s"):
        list(stream_bags(tmp_path, plan, rank=0, timeout_s=2))
    os.close(os.open(stuck, os.O_WRONLY))


def test_the_training_stream_reads_no_image(ray_session, bag_folder, bag_source):
    steps = plan_run(read_manifest(bag_folder), settings(max_steps=2), seed=0)
    images = [image for bags in stream_bags(bag_folder, steps, 0, 60) for bag in bags for image in bag.images]
    assert all(image.image is None for image in images)
    assert all(image.embedding.shape == bag_source.embeddings.shape[1:] for image in images)
    assert all(image.features.shape == bag_source.features.shape[1:] for image in images)
    assert {image.image for bag in read_bags(bag_folder, 2) for image in bag.images} == {b"not an image"}


def test_the_bank_of_a_bag_set_holds_each_of_its_images_once(bag_folder, bag_source):
    bank = read_bank(bag_folder)
    held = {image.image_id: image for size in (2, 3) for bag in read_bags(bag_folder, size) for image in bag.images}
    assert bank.image_ids == sorted(held)
    for image_id, embedding in zip(bank.image_ids, bank.embeddings, strict=True):
        assert (embedding == held[image_id].embedding).all()
        assert (embedding == bag_source.embeddings[bag_source.image_ids.index(image_id)].astype(np.float16)).all()
