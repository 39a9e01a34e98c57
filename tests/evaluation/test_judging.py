"""A judge on real scorers, in this process: ties, features against pixels, several captions of an image."""

import numpy as np
import pytest

from finecap_ray.errors import DataError
from finecap_ray.evaluation.judging import PoolJudge
from finecap_ray.evaluation.pools import Pool, PoolSet


@pytest.fixture(params=["scorer_folder", "judge_folder"], ids=["minilm", "scratch"])
def judge(request):
    return PoolJudge(str(request.getfixturevalue(request.param)), threads=2)


def bag_of(ids: list[str]) -> PoolSet:
    return PoolSet(f"bags of {len(ids)}", len(ids), (Pool(tuple(ids), tuple(range(len(ids)))),), dependent=True)


def test_a_bag_of_identical_images_and_captions_gives_one_in_n(judge, emoji):
    """Among other images, whose number decides how a matrix product rounds; from pixels and from features."""
    for n in (2, 3, 5, 7):
        images = [emoji.images[0]] * n + emoji.images[1 : 12 - n]
        features = np.stack([emoji.features[0]] * n + list(emoji.features[1 : 12 - n]))
        ids = [f"i{row}" for row in range(len(images))]
        captions = {image_id: ["the same words"] for image_id in ids}
        for shown in ((images, None), (None, features)):
            judge.show(ids, *shown)
            reply = judge.answer(captions, {}, [bag_of(ids[:n])], samples=100, seed=0)
            (numbers,) = reply.retrieval
            assert numbers["recall_at_1"] == pytest.approx({"value": 1 / n, "low": 1 / n, "high": 1 / n})
            assert numbers["mean_rank"]["value"] == (n + 1) / 2
            assert reply.human == []
            bags = judge.judge_bags({"rl": captions}, [ids[:n]])
            assert bags.hits["rl"][0].tolist() == pytest.approx([1 / n] * n)


def test_features_and_pixels_give_the_same_ranks(judge, emoji):
    ids, n = emoji.image_ids[:8], 8
    captions = dict(zip(ids, emoji.captions, strict=False))
    found = []
    for shown in ((emoji.images[:n], None), (None, emoji.features[:n])):
        judge.show(ids, *shown)
        found.append(judge.answer(captions, captions, [bag_of(ids)], samples=100, seed=0))
    assert found[0].retrieval == found[1].retrieval == found[0].human
    assert found[0].similarity["CLIPScore"] == pytest.approx(
        found[1].similarity["CLIPScore"], abs=2e-3
    )  # float16 features


def test_an_image_counts_with_the_mean_of_its_captions(judge, emoji):
    ids = emoji.image_ids[:3]
    judge.show(ids, None, emoji.features[:3])
    texts = {image_id: own[0] for image_id, own in zip(ids, emoji.captions, strict=False)}
    single = [judge.judge_bags({"a": {key: [text] for key in ids}}, [ids]) for text in texts.values()]
    every = judge.judge_bags({"a": {key: list(texts.values()) for key in ids}}, [ids])
    expected = np.mean([own.hits["a"][0] for own in single], axis=0)
    assert every.hits["a"][0] == pytest.approx(expected)
    assert every.ranks["a"][0].tolist() == single[0].ranks["a"][0].tolist()  # of the first caption


def test_the_human_captions_are_the_references(judge, emoji):
    ids = emoji.image_ids[:4]
    judge.show(ids, None, emoji.features[:4])
    human = {ids[0]: ["a red apple"], ids[1]: []}
    reply = judge.answer({key: ["a red apple"] for key in ids}, human, [bag_of(ids)], samples=100, seed=0)
    score, both = reply.similarity["CLIPScore"], reply.similarity["RefCLIPScore"]
    assert reply.human[0]["n"] == 1 and 0 <= score <= 2.5 and 0 <= both <= 2
    assert reply.similarity["prefix"] == ""  # it never saw CLIP's


def test_an_image_without_captions_competes_and_is_not_asked_about(judge, emoji):
    ids = emoji.image_ids[:3]
    judge.show(ids, None, emoji.features[:3])
    human = {ids[0]: emoji.captions[0], ids[2]: emoji.captions[2]}
    every = judge.judge_bags({"a": human | {ids[1]: ["x"]}}, [ids])
    without = judge.judge_bags({"a": human}, [ids, ids[1:2]])
    for part in ("hits", "ranks", "best"):
        own, other = getattr(without, part)["a"][0], getattr(every, part)["a"][0]
        assert own[[0, 2]].tolist() == other[[0, 2]].tolist()
    assert np.isnan(without.hits["a"][0][1]) and np.isnan(without.ranks["a"][0][1]) and without.best["a"][0][1] == -1
    assert np.isnan(without.hits["a"][1]).all()


def test_an_image_that_is_none_is_named(judge, emoji):
    with pytest.raises(DataError, match="image 'b': not a decodable image"):
        judge.show(["a", "again", "b"], [emoji.images[0]] * 2 + [emoji.images[1][:50]], None)
