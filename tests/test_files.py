import pytest

from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.files import whole_file


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "note.txt"
    for text in ("first", "second"):
        with whole_file(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a defect"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(tmp_path, error):
    def fail():
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    path = tmp_path / "note.txt"
    path.write_text("old")
    with pytest.raises(UsageError if isinstance(error, OSError) else type(error)) as caught:
        fail()
    if isinstance(error, OSError):  # which alone a user can correct
        assert str(caught.value).startswith(f"cannot write {path}: No space left on device; free some space")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"), whole_file(tmp_path / "file" / "note.txt"):
        pass
