"""Features of the frozen tower on disk: what is left out, and what a killed job does again."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finecap_ray.config import DataSettings, TowerSettings
from finecap_ray.errors import DataError
from finecap_ray.records import EXAMPLE_SCHEMA
from finecap_ray.scorers.embed import FeatureSet, TowerActor, embed_examples
from finecap_ray.sources import ExampleSet

TOWER = TowerSettings(image_size=64, batch_size=8, rows_per_file=8)


def on_disk(rows, folder):
    pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA), folder / "examples.parquet", row_group_size=5)
    return ExampleSet(str(folder / "examples.parquet"))


@pytest.fixture
def rows(emoji):
    rows = [
        {"image_id": image_id, "image": image, "captions": [], "split": "train"}
        for image_id, image in zip(emoji.image_ids[:30], emoji.images[:30], strict=True)
    ]
    rows[9] |= {"image": b"no image"}
    return rows


def test_a_killed_job_redoes_the_files_that_are_not_there(ray_session, rows, emoji, tower, resources, tmp_path):
    out = tmp_path / "out"

    def embed(rows=rows, max_bad_fraction=0.1, **changes):
        data, settings = DataSettings(max_bad_fraction=max_bad_fraction), TOWER.model_copy(update=changes)
        return embed_examples(on_disk(rows, tmp_path), out, settings, data, resources)

    with pytest.raises(DataError, match=r"1 of 30 images can't be decoded.*\n  .*not a decodable image \(8 bytes\)"):
        embed(max_bad_fraction=0.02)
    assert len(list((out / "features").iterdir())) == 4  # 30 examples, 8 to a file
    assert embed() == 0  # more may be bad now, and all files are there
    features = FeatureSet(out)
    assert features.image_ids == {image_id for n, image_id in enumerate(emoji.image_ids[:30]) if n != 9}
    assert features.tower_digest == tower.digest
    some = [20, 3, 8, 11]
    matrix = features.matrix([emoji.image_ids[row] for row in some])
    assert matrix.dtype == np.float16
    np.testing.assert_allclose(matrix, emoji.features[some], atol=2e-2, rtol=1e-2)
    with pytest.raises(DataError, match=f"1 images have no features, such as {re.escape(emoji.image_ids[9])}"):
        features.matrix(emoji.image_ids[:10])
    assert features.matrix([]).shape == (0, 0)

    # Killed: two files are there, one is half written, and there is no manifest.
    (out / "manifest.json").unlink()
    files = sorted((out / "features").iterdir())
    kept = {path.name: path.stat().st_mtime_ns for path in files[:2]}
    files[2].rename(files[2].with_name(f".{files[2].name}.new"))
    files[3].unlink()
    with pytest.raises(DataError, match="no features at"):
        FeatureSet(out)
    assert embed() == 2
    assert {path.name: path.stat().st_mtime_ns for path in files[:2]} == kept
    again = FeatureSet(out)
    assert again.image_ids == features.image_ids
    assert len(list((out / "features").iterdir())) == 4

    # Other pictures, fewer of them, or another tower, make other files; a smaller batch doesn't.
    rows[20] |= {"image": emoji.images[40]}
    assert embed(rows[:24], batch_size=4) == 1
    assert len(FeatureSet(out).image_ids) == 23
    for tower, computed in ((TOWER, False), (TOWER.model_copy(update={"image_size": 32}), True)):
        assert TowerActor(on_disk(rows[:24], tmp_path), tower, 1, str(out / "features")).compute(0) == computed
    facts = pq.read_schema(out / "features" / "part-00001.parquet").metadata
    assert b"not a decodable image" in facts[b"left_out"]
