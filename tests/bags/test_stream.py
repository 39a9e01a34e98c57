"""The stream of a run, through real Ray Data: every bag of an epoch once, in the planned order."""

import pytest

from finecap_ray.bags.build import read_manifest
from finecap_ray.bags.stream import plan_run, read_bags, stream_bags
from finecap_ray.config import RlSettings, Stage
from finecap_ray.errors import MismatchError

CURRICULUM = (Stage(bag_size=2, epochs=2), Stage(bag_size=3, epochs=1))


def settings(**changes):
    return RlSettings(**{"images_per_step": 8, "curriculum": CURRICULUM} | changes)


def test_each_bag_of_an_epoch_comes_once_in_the_order_of_the_plan(ray_session, bag_folder):
    manifest = read_manifest(bag_folder)
    steps = plan_run(manifest, settings(), seed=3)
    stream = list(stream_bags(bag_folder, steps, rank=0))
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
    shares = [list(stream_bags(bag_folder, steps, rank)) for rank in range(2)]
    alone = list(stream_bags(bag_folder, plan_run(read_manifest(bag_folder), settings(), seed=3)[:5], rank=0))
    for first, second, whole in zip(*shares, alone, strict=True):
        assert [bag.bag_id for bag in first + second] == [bag.bag_id for bag in whole]


def test_a_stream_that_begins_later_goes_on_with_the_same_bags(ray_session, bag_folder):
    steps = plan_run(read_manifest(bag_folder), settings(), seed=3)[:6]
    whole, rest = list(stream_bags(bag_folder, steps, rank=0)), list(stream_bags(bag_folder, steps[2:], rank=0))
    assert [[bag.bag_id for bag in bags] for bags in rest] == [[bag.bag_id for bag in bags] for bags in whole[2:]]


def test_the_plan_ends_each_epoch_with_a_shorter_step_and_drops_no_bag():
    manifest = {"sizes": {"2": {"bags": 13}, "3": {"bags": 5}}}
    steps = plan_run(manifest, settings(), seed=0)
    # 8 // 2 = 4 bags a step: 13 = 4 + 4 + 4 + 1, twice. 8 // 3 = 2: 5 = 2 + 2 + 1.
    assert [len(step.workers[0]) for step in steps] == [4, 4, 4, 1, 4, 4, 4, 1, 2, 2, 1]
    assert [step.epoch for step in steps] == [0] * 4 + [1] * 4 + [2] * 3
    assert [step.bag_size for step in steps] == [2] * 8 + [3] * 3
    assert [step.step for step in steps] == list(range(11))
    # Two workers can't share the last 1 of 13, so it joins the step before.
    two = plan_run(manifest, settings(num_workers=2), seed=0)
    assert [[len(share) for share in step.workers] for step in two[:3]] == [[2, 2], [2, 2], [3, 2]]


def test_max_steps_cuts_the_plan_and_changes_nothing_before_the_cut():
    manifest = {"sizes": {"2": {"bags": 13}, "3": {"bags": 5}}}
    assert plan_run(manifest, settings(max_steps=6), seed=0) == plan_run(manifest, settings(), seed=0)[:6]


def test_a_curriculum_of_sizes_that_were_not_built_is_refused(bag_folder):
    with pytest.raises(MismatchError, match="bags of 2, 3, not of 4"):
        plan_run(read_manifest(bag_folder), settings(curriculum=(Stage(bag_size=4, epochs=1),)), seed=0)


def test_the_training_stream_reads_no_image(ray_session, bag_folder, bag_source):
    steps = plan_run(read_manifest(bag_folder), settings(max_steps=2), seed=0)
    images = [image for bags in stream_bags(bag_folder, steps, 0) for bag in bags for image in bag.images]
    assert all(image.image is None for image in images)
    assert all(image.embedding.shape == bag_source.embeddings.shape[1:] for image in images)
    assert all(image.features.shape == bag_source.features.shape[1:] for image in images)
    assert {image.image for bag in read_bags(bag_folder, 2) for image in bag.images} == {b"not an image"}
