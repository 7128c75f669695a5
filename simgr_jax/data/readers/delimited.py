"""Reads columns of a delimited text file, CSV or TSV, also compressed. Every line is read, or named in an error.

Polars reads files without a quotation mark. It would take a mark inside a field (`19" tv`) for the start of a quoted
field, which swallows the lines up to the next mark. So Python's csv module reads files with marks, more slowly. The
number of rows is checked against a count of lines that does not depend on a parser.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa

from simgr_jax.data.readers.columns import Notes, Table, find, matches
from simgr_jax.errors import UserError, first_line

SEPARATORS = (",", ";", "\t", "|")
COMPRESSIONS = (".gz", ".zst")
COMPRESSED_MARKS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
csv.field_size_limit(2**31 - 1)  # the largest that every platform takes; the module's own is 128 KiB
_CHUNK_BYTES = 1 << 24
_CHUNK_ROWS = 100_000


@dataclasses.dataclass(frozen=True)
class _Header:
    path: Path
    line: int  # from 1
    separator: str
    names: list[str]

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


@dataclasses.dataclass(frozen=True)
class _Lines:
    """What can be said of a file without parsing it."""

    num_filled: int  # lines that are not blank
    has_quotes: bool
    has_blanks: bool  # before fields
    has_returns: bool  # carriage returns that are not at the end of a line
    most_separators: int  # in a line


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file, and decompresses it if its name ends in one of COMPRESSIONS."""
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"))


def read_columns(
    path: Path, columns: Mapping[str, str], remedy: str, separator: str, default: str, multiline: bool
) -> Table:
    """Reads columns as strings, with null for an empty field.

    Args:
      columns: from the names of the result's columns to their names in the file.
      remedy: what to do if a column is missing, for the error message.
      separator: what is between two fields; "" takes the first of SEPARATORS that yields the columns, or `default`.
        A table that is separated by tabs has no quoting.
      multiline: whether a quoted field may hold line ends. If not, a stray quotation mark can't take in rows.

    Raises:
      UserError: a column is missing, or the file can't be read as a whole.
    """
    with readable(path):
        header = _read_header(path, columns, separator, default)
        places = find(header.names, columns, header.where, remedy)
        lines = _survey(path, header.separator)
        quoted = lines.has_quotes and header.separator != "\t"
        read = _read_quoted(header, places, multiline) if quoted else (_read_plain(header, places, lines), ())

    def place(row: int) -> str:
        rows = _quoted_rows(header, multiline) if quoted else _plain_rows(header)
        return next(str(line) for i, (line, *_) in enumerate(rows) if i == row)

    frame, notes = read
    return Table(frame, {ours: header.names[i] for ours, i in places.items()}, path, place, notes)


def read_rows(path: Path, columns: Sequence[str], remedy: str) -> Iterator[tuple[int, list[str], bool]]:
    """Yields (line number, values of the columns, whether it takes several lines) of each row of a CSV file, "" for an
    empty or missing field. Quoted fields may hold line ends.

    Args: see `read_columns`.

    Raises:
      UserError: as `read_columns`.
    """
    with readable(path):
        header = _read_header(path, {}, ",", ",")
        places = find(header.names, {name: name for name in columns}, header.where, remedy)
        _survey(path, ",")
        for line, fields, takes_several in _quoted_rows(header, multiline=True):
            values = [fields[places[name]] if places[name] < len(fields) else "" for name in columns]
            yield line, values, takes_several


def column_names(path: Path, separator: str) -> list[str]:
    """The names in the header."""
    with readable(path):
        return _read_header(path, {}, separator, separator).names


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises UserError if what is read inside is not UTF-8, or can't be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except (OSError, pa.ArrowException, EOFError) as error:
        raise UserError(f"{path}: can't be read ({first_line(error)}); copy it again from its source") from error


def _read_header(path: Path, columns: Mapping[str, str], separator: str, default: str) -> _Header:
    """Reads the first line that is not blank."""
    with open_bytes(path) as file:
        if file.peek(4)[:4].startswith(COMPRESSED_MARKS):
            raise UserError(f"{path}: is compressed; end its name in {' or '.join(COMPRESSIONS)}")
        if file.peek(2)[:2] in UTF16_MARKS:
            raise UserError(f"{path}: is UTF-16 text; convert the file, e.g. with iconv -f UTF-16 -t UTF-8")
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if "\0" in text:
                raise UserError(f"{path}:{number}: has NUL characters; convert the file to UTF-8 text")
            if "\r" in text:
                raise UserError(f"{path}:{number}: ends lines in carriage returns alone; convert them to newlines")
            if text:
                break
        else:
            raise UserError(f"{path}: has only blank lines; copy the file again from its source")
    for choice in [separator] if separator else dict.fromkeys((default, *SEPARATORS)):
        try:
            names = _split_header(path, number, text, choice)
        except UserError:  # The next separator may suit the header's quotes.
            continue
        if all(matches(names, name) for name in columns.values()):
            return _Header(path, number, choice, names)
    return _Header(path, number, separator or default, _split_header(path, number, text, separator or default))


def _split_header(path: Path, number: int, text: str, separator: str) -> list[str]:
    if separator == "\t" or '"' not in text:
        return text.split(separator)
    try:
        return next(csv.reader([text], delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{number}: can't be read ({error}); correct the header") from error


def _survey(path: Path, separator: str) -> _Lines:
    """
    Raises:
      UserError: the file has NUL characters.
    """
    num_filled, has_quotes, has_blanks, has_returns, most_separators = 0, False, False, False, 0
    separators_before = 0  # of the line that the chunk continues
    before = b"\n\n"  # the two bytes before the chunk: the file's first byte begins a line
    with open_bytes(path) as file:
        if file.peek(3)[:3] == codecs.BOM_UTF8:
            file.read(3)
        while chunk := file.read(_CHUNK_BYTES):
            data = before + chunk
            values = np.frombuffer(data, np.uint8)
            ends, returns = values == ord("\n"), values == ord("\r")
            # A line that is not blank begins with another byte, after the end of a line.
            begins = ends[1:-1] | (returns[1:-1] & ends[:-2])
            num_filled += np.count_nonzero(begins & ~ends[2:] & ~returns[2:])
            has_quotes = has_quotes or b'"' in chunk
            has_blanks = has_blanks or separator.encode() + b" " in data or b"\n " in data
            has_returns = has_returns or bool((returns[1:-1] & ~ends[2:]).any())
            if b"\0" in chunk:
                raise _has_nulls(path)
            separators = np.cumsum(values[2:] == ord(separator), dtype=np.int32)
            per_line = np.diff(separators[np.append(np.flatnonzero(ends[2:]), -1)], prepend=-separators_before)
            most_separators = max(most_separators, per_line.max())
            separators_before = per_line[-1]
            before = data[-2:]
    has_returns = has_returns or before.endswith(b"\r")
    return _Lines(num_filled, has_quotes, has_blanks, has_returns, most_separators)


def _read_plain(header: _Header, places: Mapping[str, int], lines: _Lines) -> pl.DataFrame:
    """Reads a file that has no quoting."""
    names = [str(i) for i in range(len(header.names))]
    if lines.most_separators >= len(names):
        raise _located(header, pl.exceptions.ComputeError("a line has too many fields"))
    if lines.has_returns:
        raise _return(header, _first_line(header.path, lambda line: b"\r" in line.removesuffix(b"\r\n")))
    try:
        scanned = pl.scan_csv(
            header.path,
            glob=False,
            separator=header.separator,
            quote_char=None,
            infer_schema=False,
            skip_lines=header.line - 1,
            new_columns=names,
        )
        frame = scanned.select(pl.col(names[i]).alias(ours) for ours, i in places.items()).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise _located(header, error) from error
    frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))  # polars reads a blank line as a row
    if len(frame) != lines.num_filled - 1:
        raise _lost(header, places, len(frame), lines.num_filled - 1)
    if lines.has_blanks and header.separator != "\t":
        frame = frame.with_columns(pl.col(ours).str.strip_chars_start(" ") for ours in places)
        frame = frame.with_columns(_without_empty(places))
    return frame


def _read_quoted(header: _Header, places: Mapping[str, int], multiline: bool) -> tuple[pl.DataFrame, Notes]:
    """Reads a file that has quotation marks. Returns also a note if rows take several lines."""
    pick = itemgetter(*places.values(), 0)  # one more, because itemgetter returns a tuple only of two or more
    schema = {**dict.fromkeys(places, pl.String), "": pl.String}
    width = len(header.names)
    frames, rows, several = [pl.DataFrame(schema=schema)], [], []

    def flush():
        frames.append(pl.DataFrame(rows, schema=schema, orient="row"))
        rows.clear()

    for line, fields, takes_several in _quoted_rows(header, multiline):
        if takes_several:
            several.append(line)
        rows.append(pick(fields if len(fields) == width else fields + [""] * (width - len(fields))))
        if len(rows) == _CHUNK_ROWS:
            flush()
    flush()
    frame = pl.concat(frames).select(_without_empty(places))
    return frame, several_lines_note(header.path, several, len(frame))


def several_lines_note(path: Path, several: Sequence[int], num_rows: int) -> Notes:
    """A note on the rows that take several lines, if there are any.

    Args:
      several: the first line of each.
    """
    if not several:
        return ()
    begins = ", ".join(map(str, several[:5])) + (", ..." if len(several) > 5 else "")
    found = f"{len(several):,} of {num_rows:,} rows take several lines (they begin on line {begins})"
    return (f"{path}: {found}; if one should not, close its quote, or double it",)


def _without_empty(columns: Iterable[str]) -> list[pl.Expr]:
    """The columns with null in place of empty strings."""
    return [pl.when(pl.col(name) != "").then(pl.col(name)).alias(name) for name in columns]


def _open_text(header: _Header) -> io.TextIOWrapper:
    """Opens the file behind its header. A carriage return alone ends no line."""
    file = io.TextIOWrapper(open_bytes(header.path), encoding="utf-8-sig", newline="\n")
    for _ in range(header.line):
        file.readline()
    return file


def _plain_rows(header: _Header) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, fields) of each row. For error messages."""
    with _open_text(header) as file:
        for line, text in enumerate(file, start=header.line + 1):
            if text := text.removesuffix("\n").removesuffix("\r"):
                yield line, text.split(header.separator)


def _quoted_rows(header: _Header, multiline: bool) -> Iterator[tuple[int, list[str], bool]]:
    """Yields (first line's number, fields, whether it takes several lines) of each row. A quotation mark inside an
    unquoted field is a character.

    Raises:
      UserError: a quote is not closed, or text follows its end; a quoted field holds a line end, and not `multiline`;
        or a row has too many fields, or a carriage return outside quotes.
    """
    path, line, width, text = header.path, header.line + 1, len(header.names), ""

    def lines(file: io.TextIOWrapper) -> Iterator[str]:
        nonlocal text
        for text in file:  # noqa: UP028
            yield text

    with _open_text(header) as file:
        reader = csv.reader(lines(file), delimiter=header.separator, skipinitialspace=True, strict=True)
        try:
            for fields in reader:
                last = header.line + reader.line_num
                if text.endswith("\r\r\n"):  # the module would drop such a return
                    raise _return(header, last)
                takes_several = last > line or "\r" in text.removesuffix("\r\n")
                if takes_several and not multiline:
                    until = f"goes on to line {last}" if last > line else "holds a carriage return"
                    raise UserError(
                        f"{path}:{line}: a quoted field of this row {until}; close the quote, double it, or set "
                        "config.data.log.multiline=True if fields of this file hold line ends"
                    )
                if len(fields) > width:
                    raise _too_many(header, line, len(fields))
                if fields:
                    yield line, fields, takes_several
                line = last + 1
        except csv.Error as error:
            last = header.line + reader.line_num
            if "new-line" in str(error):
                raise _return(header, last) from error
            until = f" on line {last}" if last > line else ""
            raise UserError(
                f"{path}:{line}: can't be read ({error}{until}); close the quote, double it if it is a character, or "
                "remove what follows it"
            ) from error


def _too_many(header: _Header, line: int, width: int) -> UserError:
    return UserError(
        f"{header.path}:{line}: {width} fields where line {header.line} has {len(header.names)}; "
        "quote or correct the row"
    )


def _lost(header: _Header, places: Mapping[str, int], found: int, expected: int) -> UserError:
    """Why fewer rows were read than the file has: a row whose wanted fields are all empty looks like a blank line."""
    for line, fields in _plain_rows(header):
        if not any(fields[i : i + 1] not in ([], [""]) for i in places.values()):
            name = header.names[next(iter(places.values()))]
            return UserError(f"{header.path}:{line}: no {name}; complete or remove the row")
    return UserError(f"{header.path}: {found} rows can be read of {expected}; write the file as Parquet")


def _return(header: _Header, line: int | str) -> UserError:
    """It might end a row, which the parsers do not see, or they might drop it, and two ids become one."""
    return UserError(f"{header.path}:{line}: has a carriage return that is not before a newline; remove or convert it")


def _has_nulls(path: Path) -> UserError:
    number = _first_line(path, lambda line: b"\0" in line)
    return UserError(f"{path}:{number}: has NUL characters; remove them, or convert the file to UTF-8 text")


def _located(header: _Header, error: Exception) -> UserError:
    """Turns an error of polars into one that names the line."""
    try:
        for line, fields in _plain_rows(header):
            if len(fields) > len(header.names):
                return _too_many(header, line, len(fields))
    except UnicodeDecodeError:
        return _not_utf8(header.path)
    return UserError(f"{header.path}: can't be read ({first_line(error)}); check that it is the right file")


def _not_utf8(path: Path) -> UserError:
    number = _first_line(path, lambda line: not _is_utf8(line))
    return UserError(f"{path}:{number}: not UTF-8 text; convert the file, e.g. with iconv -t UTF-8")


def _first_line(path: Path, is_bad: Callable[[bytes], bool]) -> int | str:
    """The number of the first bad line; "?" if every line alone is good."""
    with open_bytes(path) as file:
        return next((number for number, line in enumerate(file, start=1) if is_bad(line)), "?")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
