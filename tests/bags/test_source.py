"""What bags are mined from: one split of the examples, its pictures and features on disk and in step with its vectors."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

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


TRAIN = [row for row in range(0, 40, 2) if row != 6]


def test_vectors_pictures_and_features_are_in_step(
    ray_session, examples, features, scorer, scorer_folder, emoji, resources, tmp_path
):
    with bag_source(
        examples, features, str(scorer_folder), "train", BagSettings(compare="image_and_captions"), resources, tmp_path
    ) as source:
        assert source.image_ids == [emoji.image_ids[row] for row in TRAIN]
        assert list(source.images) == [emoji.images[row] for row in TRAIN]
        assert source.captions == [[] if row == 8 else emoji.captions[row] for row in TRAIN]
        assert source.left_out == {"without features": 1}
        assert np.array_equal(source.features, features.matrix(source.image_ids))
        expected = scorer.project_features(torch.from_numpy(source.features.astype(np.float32))).numpy()
        np.testing.assert_allclose(source.embeddings, expected, atol=1e-5)
        for row, own in zip(TRAIN, source.caption_embeddings, strict=True):
            mean = np.zeros_like(own) if row == 8 else scorer.embed_texts(emoji.captions[row]).numpy().mean(axis=0)
            np.testing.assert_allclose(own, mean, atol=1e-5)
        assert source.scorer == {"name": scorer.name, "digest": scorer.digest}
    assert not list(tmp_path.iterdir())


def test_a_scorer_with_a_tower_of_its_own_sees_the_pictures(
    ray_session, examples, features, scorer, scorer_folder, resources, tmp_path
):
    # Features of a tower that isn't the scorer's: what they hold must not matter.
    other = FeatureSet(features.folder)
    other.tower_digest = "another"
    arguments = (str(scorer_folder), "dev", BagSettings(), resources, tmp_path)
    with bag_source(examples, other, *arguments) as source:
        expected = scorer.embed_images(list(source.images)).numpy()
        np.testing.assert_allclose(source.embeddings, expected, atol=1e-4)
        assert source.caption_embeddings is None


def test_a_split_without_images(ray_session, examples, features, scorer_folder, resources, tmp_path):
    arguments = (str(scorer_folder), "test", BagSettings(), resources, tmp_path)
    with (
        pytest.raises(DataError, match="no example is in split 'test'; the splits are dev, train"),
        bag_source(examples, features, *arguments),
    ):
        pass
