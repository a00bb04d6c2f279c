"""Pictures in the columns of parquet and arrow files, as Hugging Face's datasets are stored; pyarrow reads them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .captions import NAMES, caption_of
from .files import DataError, reason
from .found import CACHED, DAMAGED, ODD, PLAIN, Found, check_size, open_file, shown
from .walk import below

PICTURES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes")  # columns, by preference
ROWS = 32  # that are read at once: of pictures, each may take a megabyte
TEXTS = 1024  # rows of captions that are read at once
BUFFER = 2**20  # bytes of a file that are read at once


def has_pyarrow() -> bool:
    """Whether such files can be read."""
    return find_spec("pyarrow") is not None


@contextmanager
def _arrow(path: Path) -> Iterator[Any]:
    """pyarrow; within, whatever it says of a file's content is a DataError that names it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        yield pyarrow
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)!s:.200}): get it again") from None


def parquet_rows(path: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet table, of the columns of these names; raises DataError."""
    with _arrow(path) as arrow, arrow.parquet.ParquetFile(path, buffer_size=BUFFER) as file:
        known = [name for name in file.schema_arrow.names if name in names]
        for batch in file.iter_batches(TEXTS, columns=known):
            yield from batch.to_pylist()


def read_columns(path: Path, name: str, found: Found, reader: Reader) -> None:
    """Take in the pictures of a parquet or arrow file's rows."""
    if path.name.startswith(("cache-", "tmp")):  # of `datasets`, what its `map` has made
        found.leave(CACHED, name)
        return
    try:
        with _arrow(path) as arrow:
            fields = {field.name: field.type for field in reader.schema(path)}
            pictures, text = _picture_column(arrow, fields), _text_column(arrow, fields)
            if pictures is None and (outside := _paths_alone(arrow, fields)):
                raise DataError(f"{path} has the paths of pictures alone ({outside}): save it with the pictures in it")
            if pictures is None:
                found.leave(PLAIN, name)
            elif text is None:
                columns = ", ".join(fields)
                raise DataError(f"{path} has no column of captions ({columns:.200}): name it {NAMES[0]}")
            else:
                found.choose(f"pictures of column {pictures!r} and captions of column {text!r}")
                size = os.path.getsize(path)
                for row, value in enumerate(reader.column(path, text)):
                    found.see()
                    whole, stamp = f"{name}, row {row + 1}", f"{path.name}/{row} {size}"
                    try:
                        caption = caption_of(value)
                    except ValueError as error:
                        found.leave(ODD, whole, f"{whole} holds no caption ({error!s:.100})")
                        continue
                    found.add(whole, stamp, caption, partial(reader.open, path, pictures, row))
    except DataError as error:
        found.leave(DAMAGED, name, str(error))


def _picture_column(arrow: Any, fields: dict[str, Any]) -> str | None:
    """The column of encoded pictures: bytes by themselves, or with their file's name as `datasets` has them."""

    def is_bytes(kind: Any) -> bool:
        return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)

    def is_struct(kind: Any) -> bool:
        return arrow.types.is_struct(kind) and any(field.name == "bytes" and is_bytes(field.type) for field in kind)

    named = [name for name in sorted(fields, key=_rank(PICTURES)) if name.lower() in PICTURES]
    named = [name for name in named if is_bytes(fields[name]) or is_struct(fields[name])]
    return next(iter([*named, *(name for name, kind in fields.items() if is_struct(kind))]), None)


def _paths_alone(arrow: Any, fields: dict[str, Any]) -> str | None:
    """A column of pictures as `datasets` has them, of which only the file's name is there."""
    structs = [name for name, kind in fields.items() if arrow.types.is_struct(kind)]
    return next((name for name in structs if {"bytes", "path"} <= {field.name for field in fields[name]}), None)


def _text_column(arrow: Any, fields: dict[str, Any]) -> str | None:
    """The column of captions: of a known name, or else one with such a word in it, as `blip_caption`."""

    def is_text(kind: Any) -> bool:
        if arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_dictionary(kind):
            kind = kind.value_type
        return arrow.types.is_string(kind) or arrow.types.is_large_string(kind)

    texts = [name for name, kind in fields.items() if is_text(kind)]
    known = [name for name in sorted(texts, key=_rank(NAMES)) if name.lower() in NAMES]
    return next(iter([*known, *(name for word in NAMES for name in texts if word in name.lower())]), None)


def _rank(names: tuple[str, ...]) -> Any:
    return lambda name: names.index(name.lower()) if name.lower() in names else len(names)


class Reader:
    """Reads columns and single pictures; the last file stays open, as pictures are taken one behind another."""

    def __init__(self) -> None:
        self._of: tuple[Path, str] | None = None
        self._next = 0  # row of the first that `_batches` has not given yet
        self._batch: list[Any] = []
        self._batches: Iterator[list[Any]] = iter(())

    def schema(self, path: Path) -> Any:
        """The columns' names and types."""
        with _arrow(path) as arrow:
            if path.suffix.lower() == ".parquet":
                return arrow.parquet.read_schema(path)
            return _table(arrow, path).schema

    def column(self, path: Path, name: str) -> Iterator[Any]:
        """All values of one column."""
        for batch in _values(path, name, TEXTS):
            yield from batch

    def open(self, path: Path, name: str, row: int) -> io.BytesIO:
        """The picture of a row; raises DataError."""
        if self._of != (path, name) or row < self._next - len(self._batch):
            self._of, self._next, self._batch, self._batches = (path, name), 0, [], _values(path, name, ROWS)
        while row >= self._next:
            batch = next(self._batches, None)
            if batch is None:
                raise DataError(f"{path} ends before row {row + 1}: it was changed while this ran")
            self._batch, self._next = batch, self._next + len(batch)
        value = self._batch[row - self._next + len(self._batch)]
        if isinstance(value, dict):
            content, file = value.get("bytes"), value.get("path")
            if content is None and isinstance(file, str):
                with open_file(_beside(path, file)) as opened:
                    content = opened.read()
            value = content
        if not isinstance(value, bytes):
            raise DataError("there is no picture in its row")
        check_size(len(value))
        return io.BytesIO(value)


def _beside(path: Path, file: str) -> str:
    """Where the picture lies that a row has by its path alone; raises DataError if that is elsewhere."""
    try:
        return below(str(path.parent), file, "")
    except DataError:
        raise DataError(
            f"its row names {shown(file)}, which is not in its folder: store pictures themselves, as save_to_disk does"
        ) from None


def _values(path: Path, name: str, count: int) -> Iterator[list[Any]]:
    """A column's values, so many at a time; raises DataError."""
    with _arrow(path) as arrow:
        if path.suffix.lower() == ".parquet":
            with arrow.parquet.ParquetFile(path, buffer_size=BUFFER) as file:
                for batch in file.iter_batches(count, columns=[name]):
                    yield batch.column(0).to_pylist()
        else:
            column = _table(arrow, path).column(name)
            for first in range(0, len(column), count):
                yield column.slice(first, count).to_pylist()


def _table(arrow: Any, path: Path) -> Any:
    """An arrow file mapped into memory, whose offsets lead nowhere else."""
    source = arrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        table = arrow.ipc.open_file(source).read_all()
    else:  # as `datasets` writes them
        source.seek(0)
        table = arrow.ipc.open_stream(source).read_all()
    table.validate(full=True)
    return table
