"""Scores of files, folders and tables, from the command line."""

import csv
import io

import pytest
import torch
from chopgrad_rewards.clip_score import ClipScore
from script_runs import run_script

from chopgrad_align.data import procedural
from chopgrad_align.data.video import read_video, write_video

STAR = procedural.Scene("red", "star", "large", "plain", "spinning", "grass")
CIRCLE = procedural.Scene("blue", "circle", "large", "plain", "moving left", "sand")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with two videos in it, one in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name, scene in (("videos/star.mp4", STAR), ("videos/deeper/circle.mp4", CIRCLE)):
        write_video(tmp_path / name, procedural.render(scene, seed=0, frames=5).transpose(0, 1), fps=8)
    return tmp_path


def run(*arguments):
    """Exit status, rows and what was said."""
    status, printed, said = run_script("score.py", *arguments)
    return status, list(csv.DictReader(io.StringIO(printed))), said


def expected(path, prompt, **args):
    with torch.no_grad():
        return pytest.approx(ClipScore(**args)(read_video(path)[0][None], [prompt]).item(), rel=1e-5)


def test_a_file(folder, monkeypatch, capsys):
    star = folder / "videos" / "star.mp4"
    status, rows, said = run(
        monkeypatch, capsys, "--reward", "clip_score", "--video", star, "--prompt", STAR.caption, "frames=2"
    )
    assert status == 0
    assert [(row["video"], row["prompt"], row["error"]) for row in rows] == [(str(star), STAR.caption, "")]
    assert float(rows[0]["score"]) == expected(star, STAR.caption, frames=2)
    assert "1 scored, mean 0." in said
    assert "1/1" in said  # the progress bar


def test_folders_tables_and_files_that_cannot_be_read(folder, monkeypatch, capsys):
    (folder / "videos" / "zz.mp4").write_text("not a video")
    (folder / "videos" / "star.txt").write_text(STAR.caption + "\n")
    (folder / "table.csv").write_text(f"video,prompt\nvideos/star.mp4,{CIRCLE.caption}\nvideos/none.mp4,x\n")
    out = folder / "scores.csv"
    options = ["--video", "videos", "--csv", "table.csv", "--prompt", CIRCLE.caption, "--out", out]
    status, printed, said = run(monkeypatch, capsys, "--reward", "clip_score", *options)
    assert status == 1
    assert not printed
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [(row["video"], row["prompt"]) for row in rows] == [
        ("videos/deeper/circle.mp4", CIRCLE.caption),
        ("videos/star.mp4", STAR.caption),
        ("videos/zz.mp4", CIRCLE.caption),
        ("videos/star.mp4", CIRCLE.caption),
        ("videos/none.mp4", "x"),
    ]
    for row in rows:
        if row["video"] in ("videos/zz.mp4", "videos/none.mp4"):
            assert row["score"] == ""
            assert row["error"].startswith(f"cannot read the video {row['video']} ")
            assert row["error"] in said
        else:
            assert float(row["score"]) == expected(row["video"], row["prompt"])
            assert row["error"] == ""
    assert float(rows[1]["score"]) > float(rows[3]["score"])  # the right prompt
    assert "3 scored, mean" in said
    assert "(standard error); 2 not read:" in said

    status, _, said = run(monkeypatch, capsys, "--reward", "clip_score", *options)
    assert status == 2
    assert "scores.csv exists, and nothing is overwritten" in said
    assert list(csv.DictReader(io.StringIO(out.read_text()))) == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to score: give --video or --csv"),
        (["--video", "videos"], "videos/deeper/circle.mp4 has no prompt: give --prompt (an empty one"),
        (["--video", "empty", "--prompt", ""], "empty holds no video (.3g2, "),
        (["--csv", "rows.jsonl"], "rows.jsonl, line 1: expected a path as `video` (columns: prompt)"),
        (["--csv", "none.csv"], "cannot read none.csv: No such file"),
        (["--csv", "blank.csv"], "blank.csv, line 2 has no prompt: give --prompt"),
        (["--video", "videos", "--prompt", "", "--out", "no/s.csv"], "--out: there is no folder no"),
        (["--video", "videos", "--prompt", "", "frame=3"], "'frame'; did you mean 'frames'?"),
    ],
)
def test_what_can_be_wrong(folder, monkeypatch, capsys, options, message):
    (folder / "empty").mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "blank.csv").write_text("video\nvideos/star.mp4\n")
    status, rows, said = run(monkeypatch, capsys, "--reward", "clip_score", *options)
    assert status == 2
    assert message in said
    assert not rows
