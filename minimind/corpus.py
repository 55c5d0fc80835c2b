"""Sources larger than memory: text as a file of tokens, other rows by an index into their file.

- `prepare` writes the documents of `X.jsonl` as `X.tokens`: a header of 4,096 bytes, then the ids.
  Training maps the file into memory and touches only the blocks it needs.
- `read_rows` notes where each row of a JSON-lines file begins and how long it is. Training reads
  and encodes a row when its turn comes. For a large file these notes are kept beside it.

Both know by hashes what they were made from, and are made again when that has changed. What is
small enough to read again within seconds leaves no file.

Left out: several sources in one token file, and shuffling (the batches do that).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from minimind.checkpoint import digest_of, fingerprint, write_atomically
from minimind.data import Check, Example, check_text, open_source, parse_row, scan_jsonl
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

FORMAT = "minimind tokens 1"
HEADER = 4096  # bytes
PART = 2**22  # bytes of the source between two points from which a killed run goes on
SMALL = 2**25  # bytes; a smaller source is read again each time (seconds) and leaves no file
BLOCK = 1024  # rows that are looked at together
SAMPLE = 2**22  # bytes of text that a tokenizer is trained on: memory grows with it


@dataclass
class Header:
    """What stands at the head of a token file, as JSON.

    An unfinished file has one too: it says how far the work has come, so that it can go on there.

    Attributes:
        tokenizer: sha256 of its `tokenizer.json`.
        dtype: of the ids: "uint16" if all fit, else "uint32".
        tokens, documents: what has been written; every document ends in `<|endoftext|>`.
        lines, source_bytes, source_sha256: what has been read of the source.
        skipped: kind of bad row to how many were left out.
    """

    tokenizer: str
    dtype: str
    tokens: int = 0
    documents: int = 0
    lines: int = 0
    source_bytes: int = 0
    source_sha256: str = hashlib.sha256().hexdigest()
    skipped: dict[str, int] = field(default_factory=dict)
    format: str = FORMAT

    def write(self, file: BinaryIO) -> None:
        """Write the header, padded to its fixed size, at the head of an open file."""
        file.seek(0)
        file.write(json.dumps(asdict(self)).encode().ljust(HEADER - 1) + b"\n")

    @property
    def end(self) -> int:
        """Where the last token ends, in bytes of the file."""
        return HEADER + self.tokens * np.dtype(self.dtype).itemsize


def read_header(path: Path) -> Header | None:
    """Return the header of a token file; None if there is no file, or it is none of ours."""
    try:
        with open(path, "rb") as file:
            header = Header(**json.loads(file.read(HEADER)))
        whole = header.format == FORMAT and path.stat().st_size >= header.end
    except (OSError, ValueError, TypeError):
        return None
    return header if whole else None


def hash_of(tokenizer: Tokenizer) -> str:
    """Return the sha256 of a tokenizer."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`; the others wait, and then find it made.

    UserError if its folder cannot be written.
    """
    try:
        held = FileLock(f"{path}.lock").acquire()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}). Write it elsewhere with minimind prepare --to and a "
            "--tokenizer_path, and give that file as data_path."
        ) from error
    with held:
        yield


# Text to tokens


def prepare(
    source: str | Path, tokenizer: Tokenizer, to: str | Path = "", skip_bad_rows: bool = False
) -> Path:
    """Write the texts of a JSON-lines file as a token file, unless that is there and fresh.

    A run that was killed goes on where it stopped, and ends with the same bytes.

    Args:
        to: where to; default `source` with the ending `.tokens`.
        skip_bad_rows: leave bad rows out and count them, instead of stopping at the first.

    Raises:
        UserError: no source, `to` is the source, a bad row, no good row, or the disk is full.
    """
    to = Path(to or Path(source).with_suffix(".tokens"))
    open_source(source).close()
    if to.exists() and to.samefile(source):
        raise UserError(f"{to} is the source itself. Give another file with minimind prepare --to.")
    digest = fingerprint(source)  # by all processes at once; what follows is one after the other
    with alone(to):
        why = staleness(to, digest, tokenizer, skip_bad_rows)
        if why:
            print(f"{to} {why}: it is made from {source}.")
            write_tokens(source, tokenizer, to, skip_bad_rows)
    return to


def staleness(to: Path, sha256: str, tokenizer: Tokenizer, skip: bool) -> str | None:
    """Return why a token file does not serve, or None."""
    header = read_header(to)
    if header is None:
        return "is no token file" if to.exists() else "is not there yet"
    if header.tokenizer != hash_of(tokenizer):
        return "was made with another tokenizer"
    if header.skipped and not skip:
        return f"leaves out {sum(header.skipped.values())} bad rows, and skip_bad_rows is 0"
    return None if header.source_sha256 == sha256 else "was made before its source changed"


def source_sha256(path: str | Path) -> str:
    """Return the sha256 of a data file; a token file, or one beside it, knows its text's."""
    header = read_header(Path(path).with_suffix(".tokens"))
    return header.source_sha256 if header else fingerprint(path)


def write_tokens(source: str | Path, tokenizer: Tokenizer, to: Path, skip: bool) -> None:
    """Encode the source part by part, beginning where an unfinished file ends."""
    partial, size = to.with_name(to.name + ".partial"), Path(source).stat().st_size
    header, digest = resume_point(partial, source, tokenizer, skip)
    encode = Encoder(tokenizer, header.dtype)
    progress = tqdm(total=size, initial=header.source_bytes, desc=to.name, unit="B", unit_scale=True,
                    delay=2)  # fmt: skip
    try:
        with (
            progress,
            open_source(source) as file,
            open(partial, "r+b" if header.lines else "wb") as out,
        ):
            file.seek(header.source_bytes)
            out.truncate(header.end)
            while lines := file.readlines(PART):
                texts = good_texts(lines, source, header, skip)
                append_ids(out, header, encode(texts))
                for line in lines:
                    digest.update(line)
                header.source_bytes += (read := sum(map(len, lines)))
                header.source_sha256 = digest.hexdigest()
                header.write(out)
                progress.update(read)
            to_disk(out)
        if not header.documents:
            partial.unlink()
            raise UserError(f"{source} is empty: no good row. It needs one JSON object per line.")
        os.replace(partial, to)
    except OSError as error:
        raise UserError(
            f"Could not write {to}: {error}. Make room; the same command then goes on where it stopped."
        ) from error


def resume_point(
    partial: Path, source: str | Path, tokenizer: Tokenizer, skip: bool
) -> tuple[Header, hashlib._Hash]:
    """Return the header of an unfinished file that serves, else a new one; and the hash so far."""
    new = Header(hash_of(tokenizer), "uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    found = read_header(partial)
    if found and found.tokenizer == new.tokenizer and (skip or not found.skipped):
        digest = digest_of(source, found.source_bytes)
        if digest.hexdigest() == found.source_sha256:
            return found, digest
    return new, hashlib.sha256()


def good_texts(lines: list[bytes], source: str | Path, header: Header, skip: bool) -> list[str]:
    """Return the texts of some lines, and count lines, documents and what was skipped."""
    skipped = Counter(header.skipped) if skip else None
    texts = []
    for number, line in enumerate(lines, start=header.lines + 1):
        row = parse_row(line, f"{source}, line {number}", check_text, skipped)
        if row is not None:
            texts.append(row["text"])
    header.lines += len(lines)
    header.documents += len(texts)
    header.skipped = dict(skipped or {})
    return texts


def append_ids(out: BinaryIO, header: Header, ids: bytes) -> None:
    """Write ids behind the last ones. They reach the disk before a header that speaks of them."""
    out.seek(header.end)
    out.write(ids)
    to_disk(out)
    header.tokens += len(ids) // np.dtype(header.dtype).itemsize


def to_disk(file: BinaryIO) -> None:
    """Wait until all that was written would outlive a power cut."""
    file.flush()
    os.fsync(file.fileno())


class Encoder:
    """Texts to the bytes of their ids, each text followed by `<|endoftext|>`.

    The ids are those of `Tokenizer.encode_batch`. Most words of a language are few, and byte-level
    BPE never joins a word with the space behind it: so texts are cut there, and what has been
    encoded once is looked up. Text without spaces (Chinese) goes to the library whole.
    """

    # Before a space or line end that follows something else; not between two of them.
    PIECES = re.compile(r"[ \n]?[^ \n]*(?:(?<!\S)[ \n][^ \n]*)*")
    KEPT, LONGEST = 200_000, 24  # pieces, and characters of one

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        self.tokenizer, self.code = tokenizer, "H" if dtype == "uint16" else "I"
        self.cuts = tokenizer.ends_words_at_spaces
        self.end = array(self.code, [tokenizer.pad_id]).tobytes()
        self.known: dict[str, bytes] = {}

    def __call__(self, texts: Sequence[str]) -> bytes:
        """Return the ids of all texts, one after the other."""
        documents = [self.PIECES.findall(text) if self.cuts else [text] for text in texts]
        new = list(set().union(*documents) - self.known.keys())
        for piece, ids in zip(new, self.tokenizer.encode_batch(new), strict=True):
            self.known[piece] = array(self.code, ids).tobytes()
        found = b"".join(
            b"".join(map(self.known.__getitem__, pieces)) + self.end for pieces in documents
        )
        for piece in new:
            if len(piece) > self.LONGEST or len(self.known) > self.KEPT:
                del self.known[piece]
        return found


def open_tokens(path: str | Path, tokenizer: Tokenizer) -> tuple[np.ndarray, dict[str, int]]:
    """Return the ids of a token file, mapped from disk, and the bad rows that it leaves out, by kind.

    Raises:
        UserError: it is none, is cut off, or was made with another tokenizer.
    """
    header = read_header(Path(path))
    if header is None:
        raise UserError(f"{path} is no token file, or is cut off. Make it with minimind prepare.")
    if header.tokenizer != hash_of(tokenizer):
        raise UserError(
            f"{path} was made with another tokenizer than this run's. Give the tokenizer_path that it "
            "was made with, or the .jsonl as data_path."
        )
    return np.memmap(path, header.dtype, "r", HEADER, (header.tokens,)), header.skipped


def read_tokens(
    path: str | Path, tokenizer: Tokenizer, skip_bad_rows: bool = False
) -> tuple[np.ndarray, dict[str, int]]:
    """Return what `open_tokens` does, of a token file or of JSON lines, which are prepared first.

    Raises:
        UserError: as in `prepare` and `open_tokens`.
    """
    path = Path(path)
    if path.suffix == ".tokens":
        return open_tokens(path, tokenizer)
    open_source(path).close()
    if path.stat().st_size >= SMALL or path.with_suffix(".tokens").exists():
        return open_tokens(prepare(path, tokenizer, "", skip_bad_rows), tokenizer)
    with TemporaryDirectory() as folder:
        to = Path(folder) / "text.tokens"
        write_tokens(path, tokenizer, to, skip_bad_rows)
        tokens, skipped = open_tokens(to, tokenizer)
        return np.array(tokens), skipped


def own_tokenizer(source: str | Path) -> Tokenizer:
    """Return the tokenizer of 6,400 tokens that belongs to `X.jsonl` (or its `X.tokens`): `X.tokenizer.json`.

    It is trained if there is none. `X.tokenizer.sha256` tells on which source: if that has changed,
    it is trained anew. Without such a file it is somebody's own, and stays as it is.

    Raises:
        UserError: no source, or its folder cannot be written.
    """
    source = Path(source)
    path, stamp = (source.with_suffix(f".tokenizer.{end}") for end in ("json", "sha256"))
    if source.suffix != ".tokens":
        open_source(source).close()
        made_from = f"{fingerprint(source)}  {source.name}\n"  # as sha256sum writes it
        with alone(source.with_suffix(".tokens")):
            changed = stamp.exists() and stamp.read_text() != made_from
            if changed or not path.exists():
                why = "was made before its source changed" if changed else "is not there yet"
                print(f"{path} {why}: it is trained on {source}.")
                content = train_tokenizer(source).to_json() + "\n"
                write_atomically(path, lambda file: file.write(content.encode()))
                write_atomically(stamp, lambda file: file.write(made_from.encode()))
    return Tokenizer.load(path)


def train_tokenizer(source: str | Path, vocab_size: int = 6400) -> Tokenizer:
    """Train a tokenizer on every n-th row of a JSON-lines file, `SAMPLE` bytes in all.

    Bad rows are passed over: whoever reads the file afterwards names them.
    """

    def texts() -> Iterator[str]:
        step = max(1, Path(source).stat().st_size // SAMPLE)
        with open_source(source) as file:
            for line in islice(file, 0, None, step):
                with suppress(UserError):
                    row = parse_row(line, str(source), check_text)
                    if row:
                        yield row["text"]

    open_source(source).close()
    return Tokenizer.train(texts(), vocab_size)


# Rows that keep their own length


@dataclass(eq=False)
class Rows(Sequence):
    """Rows of a JSON-lines file, read and encoded when they are asked for.

    Attributes:
        make: a row to an example.
        offsets: (N,) where each row begins in the file, in bytes.
        lengths: (N,) tokens.
        faults: what was left out or cut, with its count.
        sha256: of the whole file.
        columns: name to (N, …) values that examples get on top.
    """

    path: Path
    make: Callable[[dict], Example]
    offsets: np.ndarray
    lengths: np.ndarray
    faults: Counter
    sha256: str
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int | slice | list[int]) -> Example | Rows:
        if not isinstance(index, int | np.integer):  # some of the rows, still in the file
            columns = {name: values[index] for name, values in self.columns.items()}
            return replace(
                self, offsets=self.offsets[index], lengths=self.lengths[index], columns=columns
            )
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{self.path} has changed since its rows were found. Start again."
            ) from error
        return {
            **self.make(row),
            **{name: rows[index].tolist() for name, rows in self.columns.items()},
        }


Look = Callable[[dict], tuple[int, str | None]]


def read_rows(
    path: str | Path, check: Check, make: Callable[[dict], Example], look: Look, made_for: str,
    skip_bad_rows: bool = False,
) -> Rows:  # fmt: skip
    """Check every row of a JSON-lines file, and return those that are kept, to be read when needed.

    Args:
        make: a row to an example.
        look: a row to its length in tokens (0: it is left out) and what is to be counted as a fault.
        made_for: all that lengths and faults depend on beside the file: stage, tokenizer, limits.
        skip_bad_rows: leave out and count rows that `check` refuses, instead of stopping at the first.

    Raises:
        UserError: no file, a bad row, no good row.
    """
    path = Path(path)
    open_source(path).close()
    sha256 = fingerprint(path)
    if path.stat().st_size < SMALL:
        return Rows(path, make, *index_rows(path, check, look, skip_bad_rows), sha256)
    index = path.with_name(f"{path.stem}.{made_for.split()[0]}.index.npz")
    stamp = f"{made_for}, skip_bad_rows={bool(skip_bad_rows)}, {sha256}"
    with alone(index):
        found = load_index(index, stamp)
        if found is None:
            found = index_rows(path, check, look, skip_bad_rows)
            save_index(index, stamp, *found)
    return Rows(path, make, *found, sha256)


def index_rows(
    path: Path, check: Check, look: Look, skip: bool
) -> tuple[np.ndarray, np.ndarray, Counter]:
    """Return where the kept rows begin, their lengths, and the faults, counted."""
    offsets, lengths, faults = array("q"), array("i"), Counter()
    progress = tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, delay=2)
    rows = scan_jsonl(path, check, faults if skip else None)
    with progress, ThreadPoolExecutor(os.cpu_count()) as threads:  # encoding leaves Python's lock
        while block := list(islice(rows, BLOCK)):
            looks = threads.map(look, [row for _, row in block])
            for (offset, _), (length, fault) in zip(block, looks, strict=True):
                if fault:
                    faults[fault] += 1
                if length:
                    offsets.append(offset)
                    lengths.append(length)
            progress.update(offset - progress.n)
    return np.array(offsets, np.int64), np.array(lengths, np.int32), faults


def load_index(path: Path, stamp: str) -> tuple[np.ndarray, np.ndarray, Counter] | None:
    """Return what `save_index` stored under the same stamp, or None."""
    try:
        with np.load(path) as stored:
            about = json.loads(str(stored["about"]))
            if about["stamp"] == stamp:
                return stored["offsets"], stored["lengths"], Counter(about["faults"])
    except (OSError, ValueError, KeyError, BadZipFile):
        pass
    return None


def save_index(
    path: Path, stamp: str, offsets: np.ndarray, lengths: np.ndarray, faults: Counter
) -> None:
    """Keep an index beside its source."""
    about = json.dumps({"stamp": stamp, "faults": faults})
    write_atomically(
        path, lambda file: np.savez(file, offsets=offsets, lengths=lengths, about=about)
    )
