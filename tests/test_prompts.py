import json

import pytest

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.prompts import Condition, read_conditions, read_prompts


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_skips_blank_lines_and_comments(tmp_path):
    path = write(tmp_path / "p.txt", "# heading\r\n\r\n a red star \r\nein grüner Kreis\n  # more\nlast")
    assert read_prompts(path) == ["a red star", "ein grüner Kreis", "last"]


def test_csv_quotes_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "p.csv", '\ufeffprompt,split\n"a star, red",train\na circle,test\n')
    assert read_prompts(path) == ["a star, red", "a circle"]


def test_jsonl(tmp_path):
    rows = [{"prompt": "a\nb"}, {"prompt": "c", "other": [1]}]
    path = write(tmp_path / "p.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert read_prompts(path) == ["a\nb", "c"]


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl"])
def test_images_are_relative_to_the_file(tmp_path, name):
    image = write(tmp_path / "first.png", b"")
    content = "prompt,image\na fox,first.png\n,first.png\nno image,\n"
    if name == "c.jsonl":
        content = '{"prompt": "a fox", "image": "first.png"}\n{"image": "first.png"}\n{"prompt": "no image"}\n'
    conditions = read_conditions(write(tmp_path / name, content))
    assert conditions == [Condition("a fox", image), Condition(image=image), Condition("no image")]
    with pytest.raises(UsageError, match="without a prompt"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["w.csv", "w.jsonl"])
def test_weights(tmp_path, name):
    content = "prompt,weight,weight.clip,weights\na,2,0.5,x\nb,,-1,\nc,,,\n"
    if name == "w.jsonl":
        content = (
            '{"prompt": "a", "weight": 2, "weight.clip": "0.5"}\n{"prompt": "b", "weight.clip": -1}\n{"prompt": "c"}\n'
        )
    a, b, c = read_conditions(write(tmp_path / name, content))
    assert [x.weight_of("clip") for x in (a, b, c)] == [1.0, -1.0, 1.0]
    assert [x.weight_of("other") for x in (a, b, c)] == [2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "# only\n\n", "is empty; write"),
        ("p.csv", "prompt\n", "is empty; write"),
        ("p.jsonl", "", "is empty; write"),
        ("p.txt", b"caf\xe9", "not UTF-8; save"),
        ("p.yaml", "[]", "ends in .csv, .tsv, .jsonl, .ndjson, .json, .parquet"),
        ("p.csv", "word\na star\n", r"has rows without a prompt"),
        ("p.csv", "prompt\na star, red\n", "line 2: 2 cells under a header of 1; write a text that has a ',' in"),
        ("p.csv", "prompt,image\na star,none.png\n", "line 2: no image .*none.png"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2: not JSON"),
        ("p.jsonl", '"a star"\n', "line 1: expected an object"),
        ("p.csv", "prompt,weight\na star,much\n", "line 2: expected a finite number as `weight`, got 'much'"),
        ("p.csv", "prompt,weight.x\na star,nan\n", "line 2: expected a finite number as `weight.x`, got 'nan'"),
        ("p.jsonl", '{"prompt": "a", "weight": [1]}\n', "line 1: expected a finite number as `weight`, got"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1: column 'prompt': expected text, got 3"),
    ],
)
def test_bad_files_end_in_a_sentence_that_names_them(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none\.txt.*No such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UsageError, match=r"folder\.txt holds no pictures"):
        read_prompts(tmp_path / "folder.txt")
