"""Text files of captions: how they are written, and their lines, unpacked and decoded."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from audit.base.errors import AuditError

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Extensions of compressed text files."""
QUOTINGS = ("csv", "none")
LONGEST = 64 << 20  # characters of a line, a field or a record: more is no text of captions, or does not end
TOO_LONG = f"{{}} of more than {LONGEST >> 20} MiB: no text of captions"
_ENCODING_FLAG = "pass --encoding NAME (latin-1, cp1252, utf-16, ...)"


@dataclass(frozen=True)
class TextFormat:
    """How text files are written, where the user says so.

    Attributes:
        delimiter: of CSV; None takes a tab for .tsv, else a comma.
        header: whether the first row of CSV names the columns; without, see `column_names`.
        encoding: of CSV and JSON; None is UTF-8, or UTF-16 where a byte order mark says so.
        quoting: `csv`, or `none` where quotes are letters; None is `none` for tab-separated files without a header,
            dumps that know no quotes (CC3M, CC12M), and `csv` for all others.
    """

    delimiter: str | None = None
    header: bool = True
    encoding: str | None = None
    quoting: str | None = None

    @classmethod
    def of(cls, delimiter: str | None, no_header: bool, encoding: str | None, quoting: str | None = None) -> TextFormat:
        """From the flags --delimiter, --no-header, --encoding and --quoting. Raises AuditError naming the flag."""
        names = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
        delimiter = names.get(delimiter, delimiter) if delimiter else delimiter
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '\r\n"'):
            raise AuditError(f"--delimiter {delimiter!r}: give one character, or tab, semicolon, pipe")
        if encoding is not None:
            try:
                if not codecs.lookup(encoding)._is_text_encoding:
                    raise LookupError
            except LookupError as error:
                raise AuditError(f"--encoding {encoding}: no such encoding; for example latin-1, utf-16") from error
        return cls(delimiter, not no_header, encoding, quoting)

    def describe(self) -> str:
        """The flags that say so, "" where nothing is said."""
        return " ".join(
            flag
            for flag, given in (
                (f"--delimiter {self.delimiter!r}", self.delimiter is not None),
                ("--no-header", not self.header),
                (f"--encoding {self.encoding}", self.encoding is not None),
                (f"--quoting {self.quoting}", self.quoting is not None),
            )
            if given
        )


PLAIN = TextFormat()


def first_line(error: BaseException) -> str:
    """An error's message cut to one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]


def packing(path: str) -> str:
    """The extension that says a file is compressed; "" where none does."""
    name = path.lower().split("?")[0] if "://" in path else path.lower()
    return next((extension for extension in PACKED if name.endswith(extension)), "")


def unpacked_name(path: str) -> str:
    """A name in lower case, without a URL's query and without what says that it is compressed."""
    name = path.lower().split("?")[0] if "://" in path else path.lower()
    return name.removesuffix(packing(path))


def whole_lines(path: str, raw: IO[bytes], text: TextFormat) -> Iterator[str]:
    """The lines of a text file, with their ends. Raises AuditError: one is too long, or not of the encoding."""
    for number, line in enumerate(lines_of(path, raw, text), 1):
        check_length(path, number, line)
        yield line


def check_length(path: str, number: int, line: str) -> None:
    if len(line) >= LONGEST:
        raise AuditError(f"{path}: line {number}: {TOO_LONG.format('a line')}")


def lines_of(path: str, raw: IO[bytes], text: TextFormat) -> Iterator[str]:
    """The lines of a text file, unpacked and decoded, with their ends; one longer than LONGEST comes in pieces.

    Raises AuditError: not of the encoding.
    """
    plain = _unpacked(path, raw)
    encoding = text.encoding
    if encoding is None:
        head = plain.peek(4)[:4]
        encoding = "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    number = 1
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        while piece := plain.readline(LONGEST):
            try:
                yield decoder.decode(piece)
            except UnicodeDecodeError as error:
                raise AuditError(f"{path}: line {number}: not UTF-8: {error.reason}: {_ENCODING_FLAG}") from error
            number += piece.endswith(b"\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise AuditError(f"{path}: line {number}: not UTF-8: {error.reason}: {_ENCODING_FLAG}") from error
        return
    reader = io.TextIOWrapper(plain, encoding, newline="\n")
    try:
        while decoded := reader.readline(LONGEST):
            yield decoded.removeprefix("\ufeff") if number == 1 else decoded
            number += 1
    except UnicodeError as error:
        raise AuditError(f"{path}: after line {number}: not {encoding}: {error}: pass another --encoding") from error


def _unpacked(path: str, raw: IO[bytes]) -> io.BufferedReader:
    """The bytes of a text file, unpacked where its name says so; closing it leaves `raw` open."""
    raw.seek(0)
    kind, borrowed = packing(path), _Borrowed(raw)
    if kind == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if kind == ".bz2":
        return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor))
    if kind == ".xz":
        return io.BufferedReader(_Streams(raw, lzma.LZMADecompressor))
    if kind == ".zst":
        return io.BufferedReader(_Borrowed(pa.CompressedInputStream(pa.PythonFile(borrowed, mode="r"), "zstd")))
    return io.BufferedReader(borrowed, 1 << 20)


class _Streams(io.RawIOBase):
    """Packed streams one behind the other, as pbzip2 writes them.

    The readers of bz2 and lzma take what is no stream for the end: behind one damaged head all rows would be gone.
    """

    def __init__(self, raw: IO[bytes], new: Callable[[], Any]) -> None:
        self._raw, self._new, self._one = raw, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._one.eof:
                data = self._one.unused_data.lstrip(b"\0")
                while not data:
                    data = self._raw.read(1 << 16)
                    if not data:
                        return 0
                    data = data.lstrip(b"\0")  # padding
                self._one = self._new()
            elif self._one.needs_input:
                data = self._raw.read(1 << 16)
                if not data:
                    raise EOFError("the packed file ends in the middle")
            found = self._one.decompress(data, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)


class _Borrowed(io.RawIOBase):
    """A reader that does not close the file it reads from, as TextIOWrapper would."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
