"""Small files of strangers and our own: encodings, bounds, one-step writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.errors import CheckpointError, InputError
from edge_reasoner.files import (
    decode_text,
    exists,
    foreign_encoding,
    is_file,
    parse_json,
    read_bytes,
    read_json,
    read_rows,
    read_text,
    write_atomically,
)


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ['{"a": 1}\r\n', "Name a fruit, größer as possible."])
def test_wide_encodings_are_named(codec: str, text: str):
    """UTF-16 and UTF-32, with a byte order mark or without, are refused by name, with what converts them."""
    with pytest.raises(InputError, match=rf"^x: UTF-{codec[4:6]}\S* text.*iconv -f"):
        decode_text(text.encode(codec), "x")


@given(st.text())
def test_utf8_is_never_taken_for_another_encoding(text: str):
    """Text without NULs is not mistaken for UTF-16, and comes back as it was but for a mark at its start."""
    text = text.replace("\0", "")
    assert foreign_encoding(text.encode()) is None
    assert decode_text(b"\xef\xbb\xbf" + text.encode(), "x") == text.lstrip("\ufeff")


def test_the_first_bad_byte_is_named():
    """Text in Latin-1 is refused with the place of its first byte that UTF-8 does not know."""
    with pytest.raises(InputError, match="x: not UTF-8 at byte 3"):
        decode_text("Spaß".encode("latin-1"), "x")


def test_the_size_is_bounded(tmp_path: Path):
    """One byte above the limit is refused with the caller's error; a file of exactly the limit is read."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 9)
    assert read_text(path, 9) == "x" * 9
    with pytest.raises(CheckpointError, match="larger than the 8 bytes"):
        read_bytes(path, 8, error=CheckpointError)


def test_a_pipe_does_not_hang_a_reader_of_regular_files(tmp_path: Path):
    """A named pipe in a stranger's folder is refused at once instead of waited for."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="not a regular file"):
        read_bytes(tmp_path / "config.json", 100, regular=True)


@pytest.mark.parametrize("name", ["missing", ""])
def test_unreadable_paths_are_one_clear_error(tmp_path: Path, name: str):
    """A missing file and a directory are errors of our tree."""
    with pytest.raises(InputError, match="cannot be read"):
        read_bytes(tmp_path / name, 100)


@pytest.mark.parametrize("text", ["NaN", '{"a": [1, -Infinity]}'])
def test_nan_is_a_choice(text: str):
    """Numbers that JSON lacks are refused by name, or taken where the caller says so."""
    with pytest.raises(InputError, match=r"x: not JSON: .*(NaN|-Infinity) is no JSON number"):
        parse_json(text, "x")
    assert parse_json(text, "x", allow_nan=True) is not None


def test_the_last_of_two_equal_keys_counts():
    """As in every reader of JSON that people use."""
    assert parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}


@given(st.binary(max_size=200) | st.sampled_from([b"[" * 200_000, b"9" * 10_000, b'"\\ud800"', b"\xff\xfe"]))
def test_whatever_the_bytes_json_stays_in_our_error_tree(data: bytes):
    """Any bytes parse, or are an InputError."""
    try:
        parse_json(data, "x")
    except InputError as error:
        assert "\n" not in str(error)


def test_json_with_a_mark_and_crlf(tmp_path: Path):
    """What Windows editors make of a JSON file is read."""
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{\r\n"a": "\xc3\xa4"\r\n}\r\n')
    assert read_json(path, 1000) == {"a": "ä"}


def test_rows_of_joined_files(tmp_path: Path):
    """Marks at the start and in the middle (joined files), CRLF and blank lines leave rows and numbers."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n\xef\xbb\xbf{"a": NaN, "b": "\xe2\x80\xa8"}\n\xef\xbb\xbf')
    rows = list(read_rows(path))
    assert [number for number, _ in rows] == [1, 3]
    assert rows[0][1] == {"a": 1} and rows[1][1]["b"] == "\u2028"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}\n'.encode("utf-16-le"), "UTF-16"),
        (b'{"a": "\xe4"}\n', "line 1: not UTF-8 at byte 7"),
        (b'{"a": 1}\n[]\n', "line 2: a list"),
        (b'{"a": "\\ud800"}\n', "line 1: a lone surrogate"),
        (b'{"a": 1\n', "line 1: not JSON"),
        (b"\xef\xbb\xbf\r\n", "no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, data: bytes, said: str):
    """The file, the line and what is wrong with it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said):
        list(read_rows(path))


def test_a_write_through_a_link_keeps_the_link(tmp_path: Path):
    """What a symlink points to is replaced, not the symlink."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    for data in (b"made", b"replaced"):
        write_atomically(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_bytes() == data


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path):
    """A named pipe, like a device, stays what it is: its reader gets the data."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, [b"some", b"thing"])
        assert os.read(reader, 100) == b"something"
    finally:
        os.close(reader)
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    """A generator that fails half-way changes nothing; the next write replaces and keeps the permissions."""
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    path.chmod(0o600)

    def parts():
        yield b"new"
        raise KeyError

    with pytest.raises(KeyError):
        write_atomically(path, parts())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, (json.dumps(i).encode() for i in range(3)))
    assert path.read_bytes() == b"012" and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "missing", "file/below"])
def test_what_cannot_be_looked_at_is_not_there(tmp_path: Path, name: str) -> None:
    """A name too long, a NUL, a path through a file: absent, and no error of the system."""
    (tmp_path / "file").write_text("")
    assert not exists(tmp_path / name) and not is_file(tmp_path / name)
    assert exists(tmp_path) and not is_file(tmp_path) and is_file(tmp_path / "file")
