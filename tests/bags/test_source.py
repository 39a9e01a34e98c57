"""What bags are mined from: one split of the examples, its pictures and features on disk and in step with its vectors."""

import os
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from finecap_ray.bags.conditional import without_words
from finecap_ray.bags.embeddings import EmbeddingActor, EmbeddingSet, compared_captions, embed_by_scorer
from finecap_ray.bags.source import bag_source
from finecap_ray.config import BagSettings, DataSettings, TowerSettings
from finecap_ray.errors import DataError
from finecap_ray.records import EXAMPLE_SCHEMA
from finecap_ray.scorers.embed import FeatureSet, embed_examples
from finecap_ray.sources import ExampleSet

IMAGE_SIZE = 64  # as in conftest.py


@pytest.fixture(scope="module")
def examples(emoji, tmp_path_factory):
    """40 images, each second one in train; image 6 is damaged, image 8 has no captions."""
    rows = [
        {
            "image_id": emoji.image_ids[row],
            "image": b"no image" if row == 6 else emoji.images[row],
            "captions": [] if row == 8 else emoji.captions[row],
            "split": "dev" if row % 2 else "train",
        }
        for row in range(40)
    ]
    path = tmp_path_factory.mktemp("examples") / "examples.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA), path, row_group_size=15)
    return ExampleSet(str(path))


@pytest.fixture(scope="module")
def features(ray_session, examples, resources, tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    tower = TowerSettings(image_size=IMAGE_SIZE, rows_per_file=9)
    embed_examples(examples, out, tower, DataSettings(max_bad_fraction=0.1), resources)
    return FeatureSet(out)


@pytest.fixture
def embedded(examples, features, scorer_folder, tmp_path):
    """A function: the embeddings of all pages, made here. The pool of actors is what the first test is about."""

    def go(features=features, captions=None) -> EmbeddingSet:
        actor = EmbeddingActor(str(scorer_folder), examples, features, captions, 1, tmp_path / "made")
        (tmp_path / "made" / "embeddings").mkdir(parents=True)
        assert all([actor.compute(page) for page in range(len(features))])
        return EmbeddingSet(tmp_path / "made")

    return go


@pytest.fixture
def nfs(monkeypatch):
    """Removing a file that is still mapped renames it, and its folder isn't empty then."""
    unlink = os.unlink

    def rename(path, *, dir_fd=None):
        if os.fspath(path).endswith(".npy"):
            os.rename(path, f".nfs{uuid4()}", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", rename)


TRAIN = [row for row in range(0, 40, 2) if row != 6]


def test_vectors_pictures_and_features_are_in_step(
    ray_session, examples, features, scorer, scorer_folder, emoji, resources, tmp_path
):
    assert embed_by_scorer(examples, features, str(scorer_folder), "whole", resources, tmp_path / "made") == 5
    embeddings = EmbeddingSet(tmp_path / "made")
    (tmp_path / ".pictures-of-a-killed-process").mkdir()
    with bag_source(examples, features, embeddings, "train", tmp_path) as source:
        assert source.image_ids == [emoji.image_ids[row] for row in TRAIN]
        assert list(source.images) == [emoji.images[row] for row in TRAIN]
        assert source.captions == [[] if row == 8 else emoji.captions[row] for row in TRAIN]
        assert source.left_out == {"without features": 1}
        assert np.array_equal(source.features, features.matrix(source.image_ids))
        expected = scorer.project_features(torch.from_numpy(source.features.astype(np.float32))).numpy()
        np.testing.assert_allclose(source.embeddings, expected, atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(source.embeddings, axis=1), 1, atol=1e-6)
        for row, own in zip(TRAIN, source.caption_embeddings, strict=True):
            mean = np.zeros_like(own) if row == 8 else scorer.embed_texts(emoji.captions[row]).numpy().mean(axis=0)
            np.testing.assert_allclose(own, mean, atol=1e-3)
        assert source.scorer == {"name": scorer.name, "digest": scorer.digest}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]

    # Killed: one page is there half, another not at all.
    (tmp_path / "made" / "embeddings" / "part-00002.parquet").unlink()
    last = tmp_path / "made" / "embeddings" / "part-00004.parquet"
    last.rename(last.with_name(".part-00004.parquet.new"))
    assert embed_by_scorer(examples, features, str(scorer_folder), "whole", resources, tmp_path / "made") == 2
    again, _ = EmbeddingSet(tmp_path / "made").read(source.image_ids, range(5))
    assert np.array_equal(again, source.embeddings)


def test_a_scorer_with_a_tower_of_its_own_sees_the_pictures(embedded, examples, features, scorer, tmp_path):
    # Features of a tower that isn't the scorer's: what they hold must not matter.
    other = FeatureSet(features.folder)
    other.tower_digest = "another"
    with bag_source(examples, other, embedded(other), "dev", tmp_path) as source:
        expected = scorer.embed_images(list(source.images)).numpy()
        np.testing.assert_allclose(source.embeddings, expected, atol=1e-3)
        assert source.caption_embeddings is None


def test_captions_are_compared_without_the_words_of_a_class(embedded, scorer, emoji):
    _, [captions] = embedded(captions="colour").read([emoji.image_ids[0]], [0])
    kept = [without_words(caption, "colour") for caption in emoji.captions[0]]
    np.testing.assert_allclose(captions, scorer.embed_texts(kept).numpy().mean(axis=0), atol=1e-3)


@pytest.mark.parametrize(
    ("bags", "compared"),
    [
        ({}, None),
        ({"compare": "image_and_captions"}, "whole"),
        ({"kind": "conditional", "word_class": "number"}, "number"),
    ],
)
def test_what_bags_compare_of_captions(bags, compared):
    assert compared_captions(BagSettings(**bags)) == compared


def test_a_split_without_images(examples):
    with pytest.raises(DataError, match="no example is in split 'test'; the splits are dev, train"):
        examples.split("test")


def test_on_nfs_what_is_still_mapped_stays_until_the_next_time(embedded, examples, features, tmp_path, nfs):
    embeddings = embedded()
    for _ in range(2):
        with bag_source(examples, features, embeddings, "train", tmp_path) as source:
            assert len(source.image_ids) == len(TRAIN)
        assert len(list(tmp_path.glob(".pictures*"))) == 1
