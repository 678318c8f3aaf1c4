"""Scores of files, folders and tables, from the command line."""

import csv
import io
import weakref

import pytest
import torch
from chopgrad_rewards.clip_score import ClipScore
from chopgrad_rewards.colorfulness import Colorfulness
from script_runs import run_script

from chopgrad_align.data import procedural
from chopgrad_align.data.video import read_video, write_video
from chopgrad_align.data.video_file import VideoFile
from chopgrad_align.evaluation.score import Clip, score_clips

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
    assert "(standard error); 2 not scored:" in said

    status, _, said = run(monkeypatch, capsys, "--reward", "clip_score", *options)
    assert status == 2
    assert "scores.csv exists, and nothing is overwritten" in said
    assert list(csv.DictReader(io.StringIO(out.read_text()))) == rows


def write_rewards(folder):
    (folder / "mine.py").write_text(
        """
import torch
from chopgrad_align import FrameReward, FrameSampler, SampledReward

class Root(FrameReward):
    def score_frames(self, frames, prompts):
        return (frames.mean((1, 2, 3)) - 1).sqrt()

class Frames(SampledReward):
    fps = 0.0

    def at_fps(self, fps):
        told = Frames(frames=self.frames)
        told.fps = fps
        return told

    def score_video(self, video, prompts):
        return torch.full((len(video),), video.shape[1] + 1000 * self.fps)

def count(video, prompts):
    return video.new_tensor([video.shape[1]])

def plain():
    return count
"""
    )


def test_a_score_that_is_no_number(folder, monkeypatch, capsys):
    write_rewards(folder)
    status, rows, said = run(monkeypatch, capsys, "--reward", "mine.py:Root", "--video", "videos", "--prompt", "")
    assert status == 1
    assert [row["score"] for row in rows] == ["nan", "nan"]
    assert rows[0]["error"] == "the score of videos/deeper/circle.mp4 is nan, not a number"
    assert "0 scored; 2 not scored:" in said


@pytest.mark.parametrize(
    ("reward", "frames"), [("mine.py:Frames", [5, 7]), ("mine.py:Frames frames=2", [2, 2]), ("mine.py:plain", [5, 7])]
)
def test_every_file_has_its_own_rate_and_length(folder, monkeypatch, capsys, reward, frames):
    write_rewards(folder)
    write_video(folder / "videos" / "fast.mp4", procedural.render(STAR, seed=0, frames=7).transpose(0, 1), fps=12)
    files = ["--video", "videos/star.mp4", "--video", "videos/fast.mp4"]
    name, *arguments = reward.split()
    status, rows, _ = run(monkeypatch, capsys, "--reward", name, *files, "--prompt", "", *arguments)
    assert status == 0
    rates = [0, 0] if "plain" in reward else [8000, 12000]
    found = [float(row["score"]) for row in rows]
    assert found == [rate + count for rate, count in zip(rates, frames, strict=True)]


def test_frames_that_are_not_read_take_no_memory(folder):
    video = procedural.render(STAR, seed=0, frames=5).transpose(0, 1).repeat(40, 1, 1, 1)
    write_video(folder / "long.mp4", video, fps=8)
    alive, most = set(), 0

    def frame_is_made(self, *arguments):
        nonlocal most
        for frame in frames_at(self, *arguments):
            alive.add(id(frame))
            weakref.finalize(frame, alive.discard, id(frame))
            most = max(most, len(alive))
            yield frame

    frames_at = VideoFile.frames_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoFile, "frames_at", frame_is_made)
        every = Colorfulness(frames_per_chunk=4)
        (scored,) = score_clips(every, "every", [Clip(folder / "long.mp4", "")], torch.device("cpu"))
        assert most <= 9  # two chunks
        assert scored.score == pytest.approx(every(read_video(folder / "long.mp4")[0][None], [""]).item(), rel=1e-5)


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
        (["--video", "latin"], "latin/a.txt: not UTF-8; save it in that encoding"),
        (["--csv", "latin/a.csv"], "latin/a.csv: not UTF-8; save it in that encoding"),
        (["--csv", "open.csv"], "open.csv, line 2: not CSV (unexpected end of data); close quotes"),
        (["--csv", "huge.csv"], "huge.csv, line 2 has no prompt: give --prompt"),
    ],
)
def test_what_can_be_wrong(folder, monkeypatch, capsys, options, message):
    (folder / "empty").mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "blank.csv").write_text("video\nvideos/star.mp4\n")
    (folder / "open.csv").write_text('video,prompt\nvideos/star.mp4,"a star\n')
    (folder / "huge.csv").write_text(f"video,notes\nvideos/star.mp4,{'x' * 200_000}\n")
    (folder / "latin").mkdir()
    (folder / "latin" / "a.mp4").touch()
    (folder / "latin" / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "latin" / "a.csv").write_bytes("video,prompt\na.mp4,caf\u00e9\n".encode("latin-1"))
    status, rows, said = run(monkeypatch, capsys, "--reward", "clip_score", *options)
    assert status == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not rows
