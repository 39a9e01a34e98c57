"""Bag sets as they are written: rows, manifest, and what refuses them."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from finecap_ray.bags.bag_set import check_bags_scorer, read_manifest, shelves
from finecap_ray.bags.build import build_bags
from finecap_ray.bags.stream import read_bags
from finecap_ray.config import BagSettings
from finecap_ray.errors import DataError, MismatchError
from finecap_ray.records import BAG_SCHEMA


def test_a_bag_row_is_self_contained(bag_folder, bag_source):
    bags = read_bags(bag_folder, 3)
    row = {image_id: index for index, image_id in enumerate(bag_source.image_ids)}
    for bag in bags:
        rows = [row[image.image_id] for image in bag.images]
        assert len(set(rows)) == 3
        cosines = bag_source.embeddings[rows] @ bag_source.embeddings[rows].T
        # mean over the 3 pairs = (sum of all 9 - 3 of each with itself) / 6
        assert bag.similarity == pytest.approx((cosines.sum() - 3) / 6, abs=1e-5)
        for image, index in zip(bag.images, rows, strict=True):
            assert image.image == bag_source.images[index]
            assert image.captions == tuple(bag_source.captions[index])
            assert np.array_equal(image.embedding, bag_source.embeddings[index].astype(np.float16))
            assert np.array_equal(image.features, bag_source.features[index])


def test_the_files_have_the_schema_of_the_records(bag_folder):
    file = pq.ParquetFile(bag_folder / "size=2" / "part-00000.parquet")
    assert file.schema_arrow.equals(BAG_SCHEMA)
    assert file.num_row_groups == -(-file.metadata.num_rows // 4)  # 4 bags per row group


def test_the_manifest_accounts_for_every_image(bag_folder, bag_source):
    manifest = read_manifest(bag_folder)
    assert manifest["images"] == 60 and manifest["left_out"] == {"undecodable": 0}
    assert manifest["scorer"] == bag_source.scorer and manifest["tower"] == bag_source.tower
    for size in (2, 3):
        facts = manifest["sizes"][str(size)]
        assert facts["bags"] == shelves(manifest)[size].bags == len(read_bags(bag_folder, size))
        assert facts["images"] == size * facts["bags"]  # disjoint bags
        assert facts["images"] + facts["leftover"] == 60
        assert facts["mean_similarity"] > facts["mean_similarity_of_random_bags"]


def test_a_size_that_was_not_built_is_an_error(bag_folder):
    with pytest.raises(DataError, match="no bags of 5"):
        read_bags(bag_folder, 5)


def test_the_bags_most_alike_come_first(bag_folder):
    similarity = [bag.similarity for bag in read_bags(bag_folder, 2)]
    assert similarity == sorted(similarity, reverse=True)


def test_bags_that_are_not_alike_enough_are_left_over(bag_folder, bag_source, tmp_path):
    similarity = [bag.similarity for bag in read_bags(bag_folder, 2)]
    middle = similarity[len(similarity) // 2]
    facts = build_bags(bag_source, tmp_path / "alike", (2,), BagSettings(least_similarity=middle), seed=0)["sizes"]["2"]
    kept = [bag.similarity for bag in read_bags(tmp_path / "alike", 2)]
    assert kept == [one for one in similarity if one >= middle] and len(kept) < len(similarity)
    assert facts["leftover"] == 60 - 2 * len(kept)
    with pytest.raises(
        DataError, match=r"no bag of 2 images of .* reaches bags.least_similarity=1.0: the most alike has 0"
    ):
        build_bags(bag_source, tmp_path / "none", (2,), BagSettings(least_similarity=1.0), seed=0)


def test_random_bags_are_the_control(bag_source, tmp_path):
    manifest = build_bags(bag_source, tmp_path, (3,), BagSettings(kind="random"), seed=0)
    facts = manifest["sizes"]["3"]
    assert facts["bags"] == 20 and facts["mean_similarity"] == pytest.approx(facts["mean_similarity_of_random_bags"])
    assert manifest["mining"]["kind"] == "random" and manifest["search"] is None


def test_conditional_bags_differ_in_the_words_of_their_class(bag_source, tmp_path):
    captions = [[f"a {word} thing"] for word in ("red", "blue", "green", "odd")] * 15
    with_texts = replace(bag_source, captions=captions, caption_embeddings=np.zeros_like(bag_source.embeddings))
    build_bags(with_texts, tmp_path, (2, 3), BagSettings(kind="conditional"), seed=0)
    for size in (2, 3):
        for bag in read_bags(tmp_path, size):
            assert len({image.captions for image in bag.images} - {("a odd thing",)}) == size


def test_comparing_captions_needs_their_embeddings(bag_source, tmp_path):
    with pytest.raises(DataError, match="compare captions"):
        build_bags(bag_source, tmp_path, (2,), BagSettings(compare="image_and_captions"), seed=0)
    # Two images of one look are parted by captions that are the opposite of each other.
    embeddings = np.array([[1, 0], [1, 0], [1, 0], [1, 0]], dtype=np.float32)
    texts = np.array([[0, 1], [0, -1], [0, 1], [0, -1]], dtype=np.float32)
    four = replace(
        bag_source,
        **{name: getattr(bag_source, name)[:4] for name in ("image_ids", "images", "captions", "features")},
        embeddings=embeddings,
        caption_embeddings=texts,
    )
    build_bags(four, tmp_path, (2,), BagSettings(compare="image_and_captions"), seed=0)
    pairs = {
        frozenset(bag_source.image_ids.index(image.image_id) for image in bag.images) for bag in read_bags(tmp_path, 2)
    }
    assert pairs == {frozenset({0, 2}), frozenset({1, 3})}


def test_bags_of_another_scorer_are_refused_with_both_digests(bag_folder, bag_source):
    manifest = read_manifest(bag_folder)
    own = bag_source.scorer["digest"]
    check_bags_scorer(manifest, own)
    with pytest.raises(MismatchError, match=rf"\({own}\), the reward's scorer is feedbeef"):
        check_bags_scorer(manifest, "feedbeef")


def test_a_folder_without_a_manifest_is_not_a_bag_set(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


def test_too_few_images_for_a_bag_is_an_error_with_both_numbers(bag_source, tmp_path):
    few = replace(
        bag_source,
        image_ids=bag_source.image_ids[:4],
        images=bag_source.images[:4],
        captions=bag_source.captions[:4],
        embeddings=bag_source.embeddings[:4],
        features=bag_source.features[:4],
    )
    with pytest.raises(DataError, match=r"\b4\b.*\b5\b|\b5\b.*\b4\b"):
        build_bags(few, tmp_path, (5,), BagSettings(), seed=0)


def test_without_a_frozen_tower_the_features_are_null(bag_source, tmp_path):
    build_bags(replace(bag_source, features=None), tmp_path, (2,), BagSettings(), seed=0)
    assert all(image.features is None for bag in read_bags(tmp_path, 2) for image in bag.images)


def test_large_images_make_small_files(bag_source, tmp_path, monkeypatch):
    """An Arrow array of bytes ends at 2 GiB."""
    monkeypatch.setattr("finecap_ray.bags.build.BYTES_PER_PART", 16 * len(bag_source.images[0]))
    manifest = build_bags(bag_source, tmp_path, (2,), BagSettings(rows_per_group=4), seed=0)
    assert manifest["sizes"]["2"]["rows_per_part"] == 8
    assert len(list((tmp_path / "size=2").iterdir())) == -(-manifest["sizes"]["2"]["bags"] // 8) > 2
