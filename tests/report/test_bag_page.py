"""The page of sample bags."""

import re
from dataclasses import replace

import numpy as np
import pytest

from finecap_ray.bags.bag_set import read_manifest, shelves
from finecap_ray.bags.build import build_bags
from finecap_ray.bags.stream import read_bags
from finecap_ray.config import BagSettings
from finecap_ray.errors import DataError
from finecap_ray.report.bag_page import sample, write_bag_page


@pytest.fixture
def folder(bag_source, emoji, tmp_path):
    """Bags with real pictures in them."""
    captions = [["<b>not bold</b>"], *bag_source.captions[1:]]
    build_bags(replace(bag_source, images=emoji.images, captions=captions), tmp_path, (2, 3), BagSettings(), seed=0)
    return tmp_path


def test_samples_go_from_the_most_alike_to_the_least(folder):
    bags, shelf = read_bags(folder, 3), shelves(read_manifest(folder))[3]
    shown = sample(folder, 3, shelf, 4)
    assert [bag.rank for bag in shown] == [1, *(bag.rank for bag in shown[1:-1]), len(bags)]
    for bag in shown:
        own = bags[bag.rank - 1]
        assert bag.bag_id == own.bag_id
        assert bag.least <= bag.similarity <= bag.most
        first = own.images[0].embedding.astype(np.float32)
        others = [first @ image.embedding.astype(np.float32) for image in own.images[1:]]
        assert bag.images[0].similarity == pytest.approx(np.mean(others), abs=1e-3)
    assert len(sample(folder, 3, shelf, 10_000)) == len(bags)


def test_the_page_stands_alone(folder, tmp_path):
    path = write_bag_page(folder, None, 3)
    html = path.read_text(encoding="utf-8")
    assert path == folder / "bags.html"
    assert html.count("<section") == 6 and html.count("data:image/webp;base64,") == 3 * 2 + 3 * 3
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "<b>not bold" not in html
    for size, facts in read_manifest(folder)["sizes"].items():
        assert f'id="size-{size}"' in html and f"{facts['mean_similarity']:.3f}" in html
    assert write_bag_page(folder, tmp_path / "other.html", 1).is_file()


def test_bags_without_pictures_and_folders_without_bags(bag_folder, tmp_path):
    with pytest.raises(DataError, match=r"image .*: not a decodable image"):
        write_bag_page(bag_folder, tmp_path / "page.html", 1)
    with pytest.raises(DataError, match="isn't a bag set"):
        write_bag_page(tmp_path, None, 1)
