import itertools
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finecap_ray.config import load_settings
from finecap_ray.errors import DataError
from finecap_ray.evaluation.scorer_warrant import Rating, describe, measure_scorers, read_ratings
from finecap_ray.evaluation.warrant import binding_accuracy, kendall_tau, swap_attributes
from finecap_ray.records import EXAMPLE_SCHEMA


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        ("a red car by a blue door", "a blue car by a red door"),
        ("A small dog, a big dog.", "A big dog, a small dog."),
        ("two men and three women in red", "three men and two women in red"),
        ("a red car and a red door", None),
        ("a red car, a small door", None),  # attributes of two kinds
        ("a dog", None),
    ],
)
def test_swapped_attributes(caption, swapped):
    assert swap_attributes(caption) == swapped


def test_binding_counts_equal_ones_half():
    assert binding_accuracy(np.array([0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3])) == 0.5


def taus_by_pairs(scores, ratings) -> tuple[float, float]:
    """Both taus from their definition, over all pairs."""
    signs = [
        (np.sign(a - b), np.sign(x - y))
        for (a, x), (b, y) in itertools.combinations(zip(scores, ratings, strict=True), 2)
    ]
    surplus = sum(left * right for left, right in signs)
    tau_b = surplus / math.sqrt(sum(left != 0 for left, _ in signs) * sum(right != 0 for _, right in signs))
    smaller = min(len(set(scores)), len(set(ratings)))
    return tau_b, 2 * smaller * surplus / (len(scores) ** 2 * (smaller - 1))


def test_kendall_by_hand_and_by_all_pairs():
    # scores in the order of the ratings: all pairs of different ratings agree
    assert kendall_tau([0.1, 0.2, 0.3], [1, 2, 3]) == pytest.approx((1.0, 1.0))
    assert kendall_tau([0.3, 0.2, 0.1], [1, 2, 3]) == pytest.approx((-1.0, -1.0))
    rng = np.random.default_rng(0)
    ratings = rng.integers(1, 5, size=60).tolist()
    scores = np.round(rng.normal(size=60) + np.array(ratings) / 2, 1).tolist()  # with ties
    assert kendall_tau(scores, ratings) == pytest.approx(taus_by_pairs(scores, ratings))


def test_a_constant_has_no_rank_correlation():
    with pytest.raises(DataError, match="got 1 and 2"):
        kendall_tau([0.5, 0.5], [1, 2])


def test_ratings_that_are_none(tmp_path):
    rows = {"image_id": [1, 2], "caption": ["a", "b"]}
    pq.write_table(pa.table(rows | {"ratings": [[4, 3], [1]]}), tmp_path / "ratings.parquet")
    assert read_ratings(tmp_path / "ratings.parquet")[1] == Rating("2", "b", (1,))
    for ratings in ([[4], None], [[4], [None]], [[4.5], [1.0]], [4, 3]):
        pq.write_table(pa.table(rows | {"ratings": ratings}), tmp_path / "ratings.parquet")
        with pytest.raises(DataError, match=r"[12] of 2 rows lack an image, a caption, or a list of ratings"):
            read_ratings(tmp_path / "ratings.parquet")
    (tmp_path / "ratings.parquet").write_text("none")
    with pytest.raises(DataError, match="ratings are parquet with image_id, caption, ratings"):
        read_ratings(tmp_path / "ratings.parquet")


def test_an_image_that_is_none_is_left_out_and_counted(ray_session, judge_folder, emoji, tmp_path):
    columns = [emoji.image_ids[:10], [*emoji.images[:9], b"none"], emoji.captions[:10], ["dev"] * 10]
    rows = pa.table(columns, schema=EXAMPLE_SCHEMA)
    pq.write_table(rows, tmp_path / "examples.parquet")
    rated = {"image_id": emoji.image_ids[7:10], "caption": ["a dog", "a cat", "an owl"], "ratings": [[1], [2], [3]]}
    pq.write_table(pa.table(rated), tmp_path / "ratings.parquet")

    def measure(max_bad_fraction):
        settings = load_settings(
            "demo", [f"data.examples={tmp_path}/examples.parquet", f"data.max_bad_fraction={max_bad_fraction}"]
        )
        return measure_scorers(settings, {"judge": str(judge_folder)}, str(tmp_path / "ratings.parquet"))["judge"]

    with pytest.raises(DataError, match=rf"1 of 10 images can't be decoded.*\n  {emoji.image_ids[9]}: not a decodable"):
        measure(0.02)
    warrant = measure(0.5)
    assert warrant["left_out"] == {"undecodable": 1} and warrant["retrieval"]["pool_size"] == 9
    assert (warrant["rated_captions"], warrant["without_image"]) == (2, 1)
    assert "left out: 1 images that can't be decoded" in describe(warrant)
