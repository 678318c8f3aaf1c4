"""Data sets in every layout that people have: each caption is found as it was written, or what is wrong is said."""

import csv
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.prompts import read_conditions
from chopgrad_align.data.table import is_parquet_folder, list_dataset
from chopgrad_align.data.videofolder import list_folder, read_folder


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def captions(folder, columns=None):
    return {row.name: row.caption for row in read_folder(folder, columns)}


TWO = {"a.mp4": "a fox, red", "b.mp4": "ein grüner Kreis"}
ROWS = [{"file_name": name, "caption": text} for name, text in TWO.items()]


def as_csv(delimiter=",", header=("file_name", "caption")):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([header, *TWO.items()])
    return text.getvalue()


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", as_csv()),
        ("metadata.csv", "\ufeff" + as_csv()),
        ("metadata.csv", as_csv().encode("utf-16")),
        ("metadata.csv", as_csv().replace("\r\n", "\r")),
        ("metadata.csv", as_csv(";")),
        ("metadata.tsv", as_csv("\t")),
        ("metadata.csv", 'file_name, caption\na.mp4, "a fox, red"\nb.mp4, ein grüner Kreis\n'),
        ("metadata.csv", as_csv(header=("File_Name", " Caption "))),
        ("metadata.csv", as_csv(header=("video", "text"))),
        ("metadata.jsonl", "\n\n".join(json.dumps(row) for row in ROWS)),
        ("metadata.jsonl", "\r\n".join(json.dumps({"media_path": n, "prompt": t}) for n, t in TWO.items())),
        ("metadata.json", json.dumps(ROWS)),
        ("metadata.json", json.dumps(TWO)),
        ("metadata.json", json.dumps({name: {"caption": text} for name, text in TWO.items()})),
    ],
    ids=[
        *("csv", "mark", "utf16", "mac", "semicolon", "tsv", "spaces", "capitals", "names"),
        *("jsonl", "jsonl-names", "json", "json-captions", "json-objects"),
    ],
)
def test_tables(tmp_path, name, content):
    write(tmp_path / name, content)
    assert captions(tmp_path) == TWO
    assert captions(tmp_path / name) == TWO
    assert list_folder(tmp_path).rows[0].sources == {"target": tmp_path / "a.mp4"}


def test_parquet(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(
        pyarrow.table({key: [row[key] for row in ROWS] for key in ROWS[0]}), tmp_path / "metadata.parquet"
    )
    assert captions(tmp_path) == TWO
    write(tmp_path / "metadata.parquet", "not one")
    with pytest.raises(UsageError, match=r"cannot read .*metadata\.parquet: "):
        read_folder(tmp_path)


@pytest.mark.parametrize("lists", ["prompts.txt", "prompt.txt", "captions.txt"])
def test_two_lists(tmp_path, lists):
    write(tmp_path / "videos.txt", "videos/a.mp4\nvideos/b.mp4\n\n")
    write(tmp_path / lists, "a fox, red\n\n")
    with pytest.raises(UsageError, match=r"videos\.txt has 2 lines, and .* 1: line by line"):
        read_folder(tmp_path)
    write(tmp_path / lists, "a fox, red\r\nein grüner Kreis\n")
    assert captions(tmp_path) == {f"videos/{name}": text for name, text in TWO.items()}
    (tmp_path / lists).unlink()
    with pytest.raises(UsageError, match=r"holds videos\.txt and no prompts\.txt"):
        read_folder(tmp_path)


def test_files_beside_the_clips(tmp_path):
    touch(tmp_path, "a.MP4", "deep/b.webm", "deep/c.mov", "videos/d.mp4", "e.mp4", "f/1.png")
    write(tmp_path / "a.txt", "\ufeffa fox, red\n")
    write(tmp_path / "deep/b.caption", "two\nlines")
    write(tmp_path / "deep/c.json", json.dumps({"text": "c", "fps": 8}))
    write(tmp_path / "labels/d.txt", "as CogVideo has it")
    write(tmp_path / "f.txt", "of frames")
    listing = list_folder(tmp_path)
    assert {row.name: row.caption for row in listing.rows} == {
        "a.MP4": "a fox, red",
        "deep/b.webm": "two\nlines",
        "deep/c.mov": "c",
        "e.mp4": "",
        "f": "of frames",
        "videos/d.mp4": "as CogVideo has it",
    }
    assert listing.summary() == ("6 clips, 5 with a caption; 1 without (e.mp4); 1 have several lines (deep/b.webm)")


def test_a_table_holds_for_the_folder_that_it_is_in(tmp_path):
    touch(tmp_path, "x/a.mp4", "x/b.mp4", "x/c.mp4", "y.mp4")
    write(tmp_path / "x/metadata.csv", as_csv())
    assert captions(tmp_path) == {"y.mp4": "", "x/a.mp4": TWO["a.mp4"], "x/b.mp4": TWO["b.mp4"]}
    assert "left out: 1 not named in metadata.csv (x/c.mp4)" in list_folder(tmp_path).summary()


def tar_of(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_shards(tmp_path):
    tar_of(
        tmp_path / "0.tar", {"x/1.mp4": b"one", "x/1.txt": b"a fox", "x/2.json": b'{"caption": "b"}', "x/2.mp4": b"22"}
    )
    tar_of(
        tmp_path / "1.tar", {"3.mp4": b"3", "3.txt": b"c", "3.json": b'{"text": "c"}', "4.txt": b"alone", "3.wav": b""}
    )
    listing = list_folder(tmp_path)
    found = {row.name: (row.caption, row.sources["target"]()) for row in listing.rows}
    assert found == {"0.tar/x/1.mp4": ("a fox", b"one"), "0.tar/x/2.mp4": ("b", b"22"), "1.tar/3.mp4": ("c", b"3")}
    assert "1 of a suffix that is not read, .wav (1.tar/3)" in listing.summary()
    assert "1 with no videos (1.tar/4)" in listing.summary()
    assert [row.identity for row in listing.rows[:2]] == [row.identity for row in read_folder(tmp_path / "0.tar")]
    tar_of(tmp_path / "1.tar", {"3.mp4": b"3", "3.txt": b"c", "3.json": b'{"text": "d"}'})
    with pytest.raises(UsageError, match=r"1\.tar/3 has different captions in \.txt and \.json"):
        read_folder(tmp_path)
    write(tmp_path / "1.tar", b"\x1f\x8b no tar")
    with pytest.raises(UsageError, match=r"cannot read .*1\.tar as a tar file"):
        read_folder(tmp_path)


def test_data_sets_of_the_hub_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"video": ["a.mp4", "b.mp4"], "text": ["a", None], "id": [1, 2]})
    table.to_parquet(str(tmp_path / "data/train-00000-of-00001.parquet"))
    assert is_parquet_folder(str(tmp_path))
    listing = list_dataset(str(tmp_path))
    assert [row.caption for row in listing.rows] == ["a", ""]
    assert listing.unread == ["id"]
    datasets.Dataset.from_dict({"video": ["a.mp4"], "text": [["a", "b"]]}).save_to_disk(str(tmp_path / "lists"))
    with pytest.raises(UsageError, match=r"lists\[0\], column 'text': expected text, got \['a', 'b'\]"):
        list_dataset(str(tmp_path / "lists"))


# --- captions that would be lost or garbled ---------------------------------------------------------------------------


def test_a_row_without_the_key_does_not_empty_the_others(tmp_path):
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.mp4"}\n{"file_name": "b.mp4", "caption": "b", "id": 3}')
    assert captions(tmp_path) == {"a.mp4": "", "b.mp4": "b"}
    assert list_folder(tmp_path).summary() == (
        "2 clips, 1 with a caption; 1 without (a.mp4); columns that are not read: id"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("jsonl", '{"file_name": "a.mp4", "caption": ["a", "b"]}', r"line 1: column 'caption': expected text, got \["),
        ("jsonl", '{"file_name": "a.mp4", "caption": 3}', r"line 1: column 'caption': expected text, got 3"),
        ("jsonl", '{"file_name": "a.mp4", "caption": NaN}', r"line 1: column 'caption': expected text, got nan"),
        ("jsonl", '{"file_name": "a.mp4", "caption": "a", "caption": "b"}', r"line 1: .*the key 'caption' twice"),
        (
            "jsonl",
            '{"file_name": "a.mp4", "caption": "a", "text": "b"}',
            r"the columns caption and text, each of which",
        ),
        ("json", '{"videos": [1]}', r"expected a caption or an object for 'videos', got \[1\]"),
        ("json", '"a"', r"expected a list of objects, or an object by files, got 'a'"),
        ("csv", "file_name,caption,caption\na.mp4,a,b\n", r"has two columns 'caption'"),
        ("csv", "file_name,captoin\na.mp4,a\n", r"a column 'captoin', which is not read; did you mean 'caption'\?"),
        ("csv", "name,caption\na.mp4,a\n", r"no column for the target \(file_name, .*It has: name, caption"),
        ("csv", "file_name,caption\na.mp4,a fox, red\n", r"line 2: 3 cells under a header of 2; write a text that"),
        ("csv", "file_name,caption\na.mp4\n", r"line 2: 1 cells under a header of 2"),
        ("csv", 'file_name,caption\na.mp4,"a fox\nb.mp4,b\n', r"not CSV \(unexpected end of data\); close quotes"),
        (
            "csv",
            'file_name,caption\na.mp4,"a fox\nb.mp4,b\nc.mp4,"\n',
            r"a cell has the next rows in it, 'a fox.*close",
        ),
        ("csv", "file_name,caption\na.mp4,caf\xe9\n".encode("latin-1"), r"metadata.csv: not UTF-8; save it in that"),
        ("csv", "file_name,caption\na.mp4,a\0b\n", r"line 2: column 'caption': expected text without control char"),
        ("csv", "file_name,caption\n", r"has no rows; write one for each clip"),
        ("csv", f"file_name,caption\na.mp4,{'a' * 200_000}\n", r"a text of 200,000 characters, .* row or line of its"),
    ],
    ids=[
        *("list", "number", "nan", "key-twice", "two-captions", "json-list", "json-text", "column-twice", "nearly"),
        *("no-target", "comma", "short", "unclosed", "swallowed", "latin1", "nul", "empty", "long"),
    ],
)
def test_what_cannot_be_told_for_certain_is_refused(tmp_path, name, content, message):
    path = write(tmp_path / f"metadata.{name}", content)
    with pytest.raises(UsageError, match=message) as caught:
        read_folder(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_bytes_are_no_caption(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"file_name": ["a.mp4"], "caption": [b"a"]}), tmp_path / "metadata.parquet")
    with pytest.raises(UsageError, match=r"row 1: column 'caption': expected text, got b'a'"):
        read_folder(tmp_path)


def test_what_is_odd_about_captions_is_said(tmp_path):
    texts = ["nan", "caf\ufffd", "two\nlines", "same", "same", ""]
    rows = [{"file_name": f"{i}.mp4", "caption": text} for i, text in enumerate(texts)]
    write(tmp_path / "metadata.json", json.dumps([*rows, rows[3]]))
    assert list_folder(tmp_path).summary() == (
        "7 clips, 6 with a caption (4 different); 1 without (5.mp4); 1 read 'nan' (0.mp4); 1 hold the sign U+FFFD, "
        "which stands for letters that were lost (1.mp4); 1 have several lines (2.mp4); 1 there more than once (3.mp4)"
    )


# --- files that are left out ------------------------------------------------------------------------------------------


def test_every_file_that_is_left_out_is_named_with_its_reason(tmp_path, monkeypatch):
    touch(
        tmp_path,
        "a.mp4",
        "b.FLV",
        "c.wmv",
        "d.gif",
        "e.3gp",
        ".f.mp4",
        ".cache/g.mp4",
        "cover.jpg",
        "h.webp2",
        "own.csv",
    )
    write(tmp_path / "alone.txt", "a caption")
    (tmp_path / "i.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "closed").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    iterdir = type(tmp_path).iterdir

    def refusing(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", refusing)
    listing = list_folder(tmp_path)
    assert [row.name for row in listing.rows] == ["a.mp4", "b.FLV", "c.wmv", "d.gif", "e.3gp"]
    assert set(listing.left_out) == {
        ("hidden", ".f.mp4"),
        ("hidden", ".cache"),
        ("beside videos", "cover.jpg"),
        ("of a kind that is not read, .webp2", "h.webp2"),
        ("tables of another name than metadata", "own.csv"),
        ("texts without a clip of their name", "alone.txt"),
        ("links to nothing", "i.mp4"),
        ("neither files nor folders", "pipe.mp4"),
        ("unreadable, Permission denied", "closed"),
    }
    assert "left out: 2 hidden (.cache, .f.mp4); 1 " in listing.summary()


def test_links_are_followed_into_each_folder_once(tmp_path):
    touch(tmp_path, "data/a.mp4", "data/deep/b.mp4", "elsewhere/c.mp4")
    (tmp_path / "data/deep/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/twice").symlink_to(tmp_path / "elsewhere")
    listing = list_folder(tmp_path / "data")
    assert [row.name for row in listing.rows] == ["a.mp4", "deep/b.mp4", "more/c.mp4"]
    assert set(listing.left_out) == {
        ("links to a folder that is listed already", name) for name in ("deep/loop", "twice")
    }


# --- first images -----------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_a_data_set_of_first_images(tmp_path):
    for name in ("a.png", "deep/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    write(tmp_path / "a.txt", "a fox")
    found = [(c.image, c.prompt) for c in read_conditions(tmp_path)]
    assert found == [(tmp_path / "a.png", "a fox"), (tmp_path / "deep/b.jpg", "")]
    write(tmp_path / "metadata.csv", "file_name,text\na.png,a cat\n")
    for path in (tmp_path, tmp_path / "metadata.csv"):
        assert [(c.image, c.prompt) for c in read_conditions(path)] == [(tmp_path / "a.png", "a cat")]
