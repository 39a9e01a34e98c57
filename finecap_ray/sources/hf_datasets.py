"""A Hugging Face dataset on disk (`save_to_disk`), with its splits where it has them.

image        an Image feature, or binary
captions     a list of texts, or one: the first of the columns captions, caption, sentences, text that is there
image_id     the first of image_id, id, cocoid, filename that is there, else split/number of the row; split/id where one id
             stands for different images in two splits, as where each counts from 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pyarrow import fs

from finecap_ray.errors import DataError
from finecap_ray.sources.files import locate
from finecap_ray.sources.found import IMAGES_PER_TASK, NO_IMAGE, Found, Source

CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")
ID_COLUMNS = ("image_id", "id", "cocoid", "filename")
ONE_SPLIT, SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` writes


def is_hf_dataset(path: str) -> bool:
    filesystem, root = locate(path)
    names = [f"{root.rstrip('/')}/{name}" for name in (ONE_SPLIT, SPLITS)]
    return any(info.type == fs.FileType.File for info in filesystem.get_file_info(names))


def hf_datasets_source(path: str, split: str) -> Source:
    """Plan of reading a dataset, some rows a task; `split` goes to a dataset without splits.

    Raises DataError for a folder that isn't one, or has no column image.
    """
    tasks, splits = [], _splits(path)
    for dataset in splits.values():
        if "image" not in dataset.column_names:
            raise DataError(f"{path} has no column image: found {', '.join(dataset.column_names)}")
    by_split = _ids_clash(list(splits.values()))
    for name, dataset in splits.items():
        own = {"root": path, "part": name, "split": split if name is None else name, "by_split": by_split}
        for start in range(0, len(dataset), IMAGES_PER_TASK):
            tasks.append(own | {"rows": [start, min(start + IMAGES_PER_TASK, len(dataset))]})
    return Source(tasks, read_rows)


def read_rows(task: dict[str, Any]) -> Iterator[Found]:
    dataset = _splits(task["root"])[task["part"]]
    caption_column, id_column = _first_there(CAPTION_COLUMNS, dataset), _first_there(ID_COLUMNS, dataset)
    for number in range(*task["rows"]):
        row = _row(dataset, number)
        captions = row[caption_column] if caption_column else []
        image, problem = _image(row["image"])
        image_id = row[id_column] if id_column else None
        inside = number if image_id is None else image_id
        yield Found(
            image_id=f"{task['split']}/{inside}" if image_id is None or task["by_split"] else str(inside),
            split=task["split"],
            captions=tuple(captions) if isinstance(captions, list) else () if captions is None else (captions,),
            image=image,
            problem=problem,
        )


def _ids_clash(splits: list[Any]) -> bool:
    """Whether an id is that of one image in one split, and of another image in another one."""
    first: dict[str, tuple[Any, int]] = {}
    for dataset in splits:
        column = _first_there(ID_COLUMNS, dataset)
        values = dataset.data.column(column).to_pylist() if column else []
        own = {str(value): number for number, value in reversed(list(enumerate(values))) if value is not None}
        for image_id in own.keys() & first.keys():
            there, number = first[image_id]
            if _image(_row(there, number)["image"]) != _image(_row(dataset, own[image_id])["image"]):
                return True
        first = {image_id: (dataset, number) for image_id, number in own.items()} | first
    return False


def _first_there(names: Sequence[str], dataset: Any) -> str | None:
    return next((name for name in names if name in dataset.column_names), None)


def _row(dataset: Any, number: int) -> dict[str, Any]:
    """The Arrow row: as the dataset gives it, an image would be decoded."""
    return dataset.data.fast_slice(number, 1).to_pylist()[0]


def _image(value: Any) -> tuple[bytes, str | None]:
    data = value.get("bytes") if isinstance(value, dict) else value
    return (data, None) if isinstance(data, bytes) else (b"", NO_IMAGE)


def _splits(path: str) -> dict[str | None, Any]:
    import datasets  # here: a second, for this format alone

    try:
        loaded = datasets.load_from_disk(path, keep_in_memory=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} can't be read as a Hugging Face dataset on disk: {error}") from None
    splits = loaded if isinstance(loaded, dict) else {None: loaded}
    return {
        name: dataset if dataset._indices is None else dataset.flatten_indices() for name, dataset in splits.items()
    }
