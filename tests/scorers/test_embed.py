"""Features of the frozen tower on disk: what is left out, and what a killed job does again."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finecap_ray.config import DataSettings, TowerSettings
from finecap_ray.errors import DataError
from finecap_ray.records import EXAMPLE_SCHEMA
from finecap_ray.scorers.embed import embed_examples, read_features

TOWER = TowerSettings(image_size=64, batch_size=8, rows_per_file=8)


@pytest.fixture
def examples(emoji):
    rows = [
        {"image_id": image_id, "image": image, "captions": [], "split": "train"}
        for image_id, image in zip(emoji.image_ids[:30], emoji.images[:30], strict=True)
    ]
    rows[9] |= {"image": b"no image"}
    return pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)


def test_a_killed_job_redoes_the_files_that_are_not_there(ray_session, examples, emoji, tower, resources, tmp_path):
    data = DataSettings(max_bad_fraction=0.1)

    def embed(table=examples, tower=TOWER, **changes):
        settings = tower.model_copy(update=changes)
        return embed_examples(table, tmp_path, settings, data, resources)

    assert embed() == 4  # 30 examples, 8 to a file
    features = read_features(tmp_path)
    assert list(features.rows) == [image_id for n, image_id in enumerate(emoji.image_ids[:30]) if n != 9]
    assert features.tower_digest == tower.digest
    for image_id, own in zip(emoji.image_ids[:9], emoji.features[:9], strict=True):
        assert features.rows[image_id].dtype == np.float16
        np.testing.assert_allclose(features.rows[image_id], own, atol=2e-2, rtol=1e-2)

    # Killed: two files are there, one is half written, and there is no manifest.
    (tmp_path / "manifest.json").unlink()
    files = sorted((tmp_path / "features").iterdir())
    kept = {path.name: path.stat().st_mtime_ns for path in files[:2]}
    files[2].rename(files[2].with_name(f".{files[2].name}.new"))
    files[3].unlink()
    with pytest.raises(DataError, match="no features at"):
        read_features(tmp_path)
    assert embed() == 2
    assert {path.name: path.stat().st_mtime_ns for path in files[:2]} == kept
    again = read_features(tmp_path)
    assert list(again.rows) == list(features.rows)
    assert len(list((tmp_path / "features").iterdir())) == 4

    # Other pictures, fewer of them, or another tower, make other files; a smaller batch doesn't.
    assert embed(batch_size=4) == 0
    rows = examples.to_pylist()
    rows[20] |= {"image": emoji.images[40]}
    assert embed(pa.Table.from_pylist(rows[:24], schema=EXAMPLE_SCHEMA)) == 1
    assert len(read_features(tmp_path).rows) == 23
    assert embed(image_size=32) == 4
    facts = pq.read_schema(tmp_path / "features" / "part-00001.parquet").metadata
    assert b"not a decodable image" in facts[b"left_out"]


def test_too_many_bad_images_are_listed(ray_session, examples, resources, tmp_path):
    with pytest.raises(DataError, match=r"1 of 30 images can't be decoded.*\n  .*not a decodable image \(8 bytes\)"):
        embed_examples(examples, tmp_path, TOWER, DataSettings(max_bad_fraction=0.02), resources)
