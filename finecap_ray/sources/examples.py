"""Examples that are ready for use: what every later step starts from.

What is said of them (ids, captions, splits) is held in memory, their pictures are read a page at a time: a pile of images may be
larger than the memory of any node.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from finecap_ray.errors import DataError
from finecap_ray.paths import absolute
from finecap_ray.records import EXAMPLE_SCHEMA
from finecap_ray.sources.files import locate
from finecap_ray.sources.fluent import fluent_file

MANIFEST_FILE = "manifest.json"  # of an import; written last
_LABELS = [name for name in EXAMPLE_SCHEMA.names if name != "image"]
_ROWS_AT_A_TIME = 256


def is_for_choices(split: str) -> bool:
    """Whether recipes may be chosen on a split, as its name says: dev, val, validation, and what else begins so."""
    return split.startswith(("dev", "val"))


class ExampleSet:
    """Examples in EXAMPLE_SCHEMA, each with an id of its own: `fluent` (embedded), a parquet file, a folder of them, or what
    `finecap import` wrote."""

    def __init__(self, spec: str) -> None:
        """Reads the footers of the files. Raises DataError where there is nothing to read, or a column is absent or of another type."""
        self.spec = spec
        if spec == "fluent":
            self._filesystem, self._paths = fs.LocalFileSystem(), [fluent_file()]
        else:
            self._filesystem, path = locate(spec)
            self._paths = _parquet_files(spec, self._filesystem, path)
        with self._reading():
            self._footers = [self._open(path).metadata for path in self._paths]
        for footer in self._footers:
            _check_columns(spec, footer.schema.to_arrow_schema())
        if not len(self):
            raise DataError(f"{spec} has no examples: its {len(self._paths)} parquet files are empty")

    def __reduce__(self):
        """Another process opens the files itself."""
        return ExampleSet, (self.spec if self.spec == "fluent" else absolute(self.spec),)

    def __len__(self) -> int:
        return sum(footer.num_rows for footer in self._footers)

    @cached_property
    def labels(self) -> pa.Table:
        """Of every example all but its picture. Raises DataError where two have one id, or captions say nothing."""
        labels = self._table(0, len(self), _LABELS)
        counts = pc.value_counts(labels["image_id"])
        twice = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise DataError(
                f"{self.spec}: {len(twice)} ids belong to several examples, such as {twice[0].as_py()!r}; "
                "`finecap import` keeps the first of each"
            )
        _check_captions(self.spec, labels)
        return labels

    def split(self, name: str) -> pa.Table:
        """The labels of a split, and the `row` of each example. Raises DataError, naming the splits there are, where it is empty."""
        inside = self.rows.filter(pc.equal(self.rows["split"], name))
        if not len(inside):
            raise DataError(f"no example is in split {name!r}; the splits are {', '.join(self.splits())}")
        return inside

    @cached_property
    def rows(self) -> pa.Table:
        """The labels, and the number of each example as `row`."""
        return self.labels.append_column("row", pa.array(range(len(self)), pa.int64()))

    def splits(self) -> list[str]:
        return sorted(pc.unique(self.labels["split"]).to_pylist())

    def page(self, start: int, rows: int, pictures: bool = True) -> pa.Table:
        """The examples `start` to `start + rows` (or the end). Raises DataError where one has gaps."""
        return self._table(start, rows, EXAMPLE_SCHEMA.names if pictures else _LABELS)

    def pictures(self, rows: Sequence[int]) -> list[bytes]:
        """Encoded images of these examples, in this order. They are all held in memory."""
        wanted, found = sorted(set(rows)), {}
        for path, footer, group, first in self._groups():
            own = _inside(wanted, first, first + footer.row_group(group).num_rows)
            if own:  # once through the row group, however many pages it has
                found |= self._pictures_of(path, footer, group, first, own)
        return [found[row] for row in rows]

    def _pictures_of(
        self, path: str, footer: pq.FileMetaData, group: int, first: int, rows: Sequence[int]
    ) -> dict[int, bytes]:
        """By row, of these sorted rows of one row group, whose first row is `first`."""
        start, found = rows[0], {}
        with self._reading():
            for table in self._part(path, footer, group, start - first, rows[-1] + 1 - first, ["image"]):
                images = self._as_examples(table, ["image"])["image"]
                found |= {row: images[row - start].as_py() for row in _inside(rows, start, start + len(table))}
                start += len(table)
        return found

    @cached_property
    def digest(self) -> str:
        """Of all their content, however it is divided into files. Reads everything once. Raises DataError as `labels` does."""
        _ = self.labels
        digest = hashlib.sha256()
        with self._reading():
            for table in self._batches(0, len(self), EXAMPLE_SCHEMA.names):
                update_digest(digest, self._as_examples(table, EXAMPLE_SCHEMA.names))
        return digest.hexdigest()[:16]

    def _table(self, start: int, rows: int, columns: list[str]) -> pa.Table:
        with self._reading():
            return self._as_examples(pa.concat_tables(self._batches(start, start + rows, columns)), columns)

    def _as_examples(self, table: pa.Table, columns: list[str]) -> pa.Table:
        """In the types of EXAMPLE_SCHEMA. Raises DataError where one has gaps."""
        fields = [EXAMPLE_SCHEMA.field(name) for name in columns]
        return pa.table([_as_type(self.spec, table[field.name], field) for field in fields], schema=pa.schema(fields))

    def _batches(self, start: int, end: int, columns: list[str]) -> Iterator[pa.Table]:
        for path, footer, group, first in self._groups():
            if first < end and first + footer.row_group(group).num_rows > start:
                yield from self._part(path, footer, group, start - first, end - first, columns)

    def _groups(self) -> Iterator[tuple[str, pq.FileMetaData, int, int]]:
        """Of every row group the file, its footer, the number in the file and the first row."""
        first = 0
        for path, footer in zip(self._paths, self._footers, strict=True):
            for group in range(footer.num_row_groups):
                yield path, footer, group, first
                first += footer.row_group(group).num_rows

    def _part(
        self, path: str, footer: pq.FileMetaData, group: int, start: int, end: int, columns: list[str]
    ) -> Iterator[pa.Table]:
        """Rows of one row group, which may be larger than memory."""
        with self._open(path, footer) as file:
            for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=columns):
                own = batch.slice(max(start, 0), max(end - max(start, 0), 0))
                if own.num_rows:
                    yield pa.Table.from_batches([own])
                start, end = start - batch.num_rows, end - batch.num_rows
                if end <= 0:
                    return

    def _open(self, path: str, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
        return pq.ParquetFile(path, metadata=footer, filesystem=self._filesystem)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.spec} can't be read as parquet: {error}") from None


def _inside(rows: Sequence[int], start: int, end: int) -> Sequence[int]:
    """Those of sorted rows that are `start` or later, and before `end`."""
    return rows[bisect_left(rows, start) : bisect_left(rows, end)]


def read_examples(spec: str) -> pa.Table:
    """All examples of a set, pictures and all. Raises DataError as ExampleSet does."""
    examples = ExampleSet(spec)
    return examples.page(0, len(examples))


def update_digest(digest, examples: pa.Table) -> None:
    """With the content of examples, whatever their chunks."""
    for image_id, image, captions, split in zip(*(column.to_pylist() for column in examples.columns), strict=True):
        digest.update(repr((image_id, captions, split, len(image))).encode())
        digest.update(image)


def _parquet_files(spec: str, filesystem: fs.FileSystem, path: str) -> list[str]:
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        return [path]
    if kind == fs.FileType.NotFound:
        raise DataError(f"no examples at {spec}: give `fluent`, a parquet file, or a folder of them")
    imported, finished = (
        filesystem.get_file_info(f"{path.rstrip('/')}/{name}").type for name in ("examples", MANIFEST_FILE)
    )
    if imported == fs.FileType.Directory and finished == fs.FileType.NotFound:
        raise DataError(
            f"the import into {spec} didn't end, it has no {MANIFEST_FILE}: remove the folder and import again"
        )
    # Not recursive: a folder next to the examples may hold bags or features, which are parquet too.
    for folder in (f"{path.rstrip('/')}/examples", path):
        entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        files = sorted(entry.path for entry in entries if entry.is_file and entry.extension == "parquet")
        if files:
            return files
    raise DataError(f"the folder {spec} has no .parquet file, nor has a folder examples/ in it")


def _check_columns(spec: str, found: pa.Schema) -> None:
    absent = [name for name in EXAMPLE_SCHEMA.names if name not in found.names]
    if absent:
        raise DataError(
            f"{spec} has no column {', '.join(absent)}: found {', '.join(found.names)}; "
            f"examples have {', '.join(EXAMPLE_SCHEMA.names)}. `finecap import` makes them from other forms"
        )
    for field in EXAMPLE_SCHEMA:
        _as_type(spec, pa.chunked_array([], found.field(field.name).type), field)


def _check_captions(spec: str, labels: pa.Table) -> None:
    silent = []
    for batch in labels.to_batches():
        texts = batch["captions"].flatten()
        none = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)
        silent += batch["image_id"].take(pc.list_parent_indices(batch["captions"]).filter(none)).to_pylist()
    if silent:
        raise DataError(
            f"{spec}: {len(silent)} captions are empty, such as one of {silent[0]!r}; `finecap import` drops them"
        )


def _as_type(spec: str, column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        column = column.cast(field.type)
    except pa.ArrowException:
        raise DataError(f"{spec}: the column {field.name} is {column.type}, an example needs {field.type}") from None
    if column.null_count:
        raise DataError(
            f"{spec}: {column.null_count} of {len(column)} rows have no {field.name}; `finecap import` fills or drops them"
        )
    return column
