"""Documents in local files: plain text and JSON lines, either of them gzipped, and Parquet."""

import gzip
import importlib
import os
import stat
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path

from examples.common.errors import DataError, first_line
from examples.common.text import check_string, decode, found_instead, parse_json, refuse_wide

# `.json.gz` holds JSON lines too: it is the name under which C4 is published.
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
_SKIP = "--skip-bad-lines leaves out such lines"


def text_files(path: Path) -> list[Path]:
    """A file, or all text files below a directory in sorted order, of whose other files a warning
    says how many there are.

    Raises:
      DataError: if there is none, or a directory cannot be read.
    """
    if path.is_dir():
        try:
            found = sorted(_files(path))
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error
        files = [p for p in found if p.name.endswith(SUFFIXES)]
        if not files:
            raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in this directory")
        _warn_of_others(path, [p for p in found if not p.name.endswith(SUFFIXES)])
        return files
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown extension (expected {', '.join(SUFFIXES)})")
    return [path]


def read_files(
    files: Sequence[Path], source: Path, *, text_column: str = "text", skip_bad_lines: bool = False
) -> Iterator[str]:
    r"""Yields the documents of files, all of which `text_files(source)` has found.

    A text file is one document; a line of JSON, or a row of Parquet, is one document, its field
    `text_column`. Line endings become "\n", a byte order mark is dropped, blank JSON lines and
    empty documents are skipped. With `skip_bad_lines` so are lines that are not UTF-8, hold a NUL
    or are not such JSON: a warning for each file says how many, and what is wrong with the first.
    Other warnings count rows of Parquet that are null, and the empty files of a directory.

    Raises:
      DataError: for the first line that cannot be used, or if all files are empty.
    """
    empty, skipped = [], 0
    for file in files:
        bad: list[DataError] | None = [] if skip_bad_lines else None
        read = _read_parquet if file.suffix == ".parquet" else _read_file
        is_empty = True
        for text in read(file, text_column, bad):
            if text.strip():
                is_empty = False
                yield text.replace("\r\n", "\n")
        if bad:
            skipped += len(bad)
            warnings.warn(f"{len(bad)} bad line(s) skipped, the first: {bad[0]}", stacklevel=2)
        if is_empty:
            empty.append(file)
    if empty and len(empty) == len(files):
        all_of = "the file is" if empty == [source] else f"all {len(empty)} text files are"
        without = f" without the {skipped} bad line(s)" if skipped else ""
        raise DataError(f"{source}: {all_of} empty{without}")
    if empty:
        warnings.warn(
            f"{source}: {len(empty)} of {len(files)} text files are empty, the first: {empty[0]}",
            stacklevel=2,
        )


def _files(directory: Path) -> Iterator[Path]:
    """Files below a directory, but for hidden ones and those in hidden directories.

    Links are followed, and a directory with several names is read once: links in a circle end.
    Links that lead nowhere and directories that cannot be read are not passed over: their text
    would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = {os.path.realpath(directory)}
    for where, directories, names in os.walk(directory, onerror=refuse, followlinks=True):
        known, directories[:] = sorted(directories), []
        for name in known:
            real = os.path.realpath(Path(where, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                directories.append(name)
        for name in names:
            path = Path(where, name)
            mode = path.lstat().st_mode
            if not name.startswith(".") and (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                yield path


def _warn_of_others(directory: Path, others: Sequence[Path]) -> None:
    kinds = Counter(p.suffix or "without extension" for p in others)
    named = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    if others:
        warnings.warn(
            f"{directory}: {len(others)} file(s) of other kinds not read ({named}), "
            f"the first: {others[0].name}",
            stacklevel=3,
        )


def _read_parquet(path: Path, text_column: str, bad: list[DataError] | None) -> Iterator[str]:
    try:
        arrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise DataError(f"{path}: needs pyarrow: python -m pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise DataError(
                    f'{path}: no column "{text_column}", there are {", ".join(names)}: '
                    "--text-column names it"
                )
            if names.count(text_column) > 1:
                raise DataError(f'{path}: the column "{text_column}" is there twice')
            kind = file.schema_arrow.field(text_column).type
            is_coded = arrow.types.is_dictionary(kind)  # Categories, as of pandas.
            text_kind = str(kind.value_type if is_coded else kind)
            if text_kind not in ("string", "large_string", "string_view"):
                raise DataError(f'{path}: column "{text_column}" has {kind}, expected string')
            number = nulls = 0
            for batch in file.iter_batches(columns=[text_column]):
                # By name: a field "b" of a column "a" is read with a column "a.b".
                column = batch.column(text_column)
                for scalar in column.dictionary_decode() if is_coded else column:
                    number += 1
                    where = f'{path}: row {number}: "{text_column}"'
                    raw = scalar.as_buffer()  # Parquet's strings need not be UTF-8.
                    if raw is None:
                        nulls += 1
                        continue
                    try:
                        yield decode(raw.to_pybytes(), where, remedy=_SKIP)
                    except DataError as error:
                        if bad is None:
                            raise
                        bad.append(error)
            if nulls:
                warnings.warn(
                    f'{path}: {nulls} of {number} rows skipped: "{text_column}" is null',
                    stacklevel=2,
                )
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({first_line(error)})") from error


def _read_file(path: Path, text_column: str, bad: list[DataError] | None) -> Iterator[str]:
    json_lines = path.name.removesuffix(".gz").endswith((".json", ".jsonl"))

    def read(where: str, line: str) -> str:
        return _parse(where, line, text_column) if json_lines else line

    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            lines = _lines(path, file, read, bad)
            yield from lines if json_lines else ["".join(lines)]
    # A truncated stream raises EOFError, a damaged one zlib.error.
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: corrupt gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _lines(
    path: Path, file: BufferedIOBase, read: Callable[[str, str], str], bad: list[DataError] | None
) -> Iterator[str]:
    """Each line as `read` returns it; errors of the others are added to `bad`, if given."""
    offset = 0
    for number, raw in enumerate(file, start=1):
        if number == 1:
            refuse_wide(raw, path)
        where = f"{path}: line {number}"
        try:
            yield read(where, _decode(where, path, raw, offset))
        except DataError as error:
            if bad is None:
                raise
            bad.append(error)
        offset += len(raw)


def _decode(where: str, path: Path, raw: bytes, offset: int) -> str:
    of = " of the decompressed text" if path.suffix == ".gz" else ""
    text = decode(raw, where, start=offset, of=of, remedy=_SKIP)
    return text.removeprefix("\ufeff") if offset == 0 else text


def _parse(where: str, line: str, text_column: str) -> str:
    if not line.strip():
        return ""
    record = parse_json(line, where)
    text = record.get(text_column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f'{where}: expected an object with a string "{text_column}", got '
            f"{found_instead(record, text_column)}; --text-column names it"
        )
    check_string(text, f'{where}: "{text_column}"', remedy=_SKIP)
    return text
