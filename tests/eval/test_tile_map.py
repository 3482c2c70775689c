"""The picture of the tile map."""

from __future__ import annotations

from pathlib import Path

import pytest
from dma_hf_eval.cli import main
from matplotlib.image import imread

Capture = pytest.CaptureFixture[str]


def test_a_picture_shows_the_formats_of_the_setting(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "map.png"
    assert main(["tile-map", "--tokens", "1024", "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"written: {path}\n"
    pixels = imread(path)[..., :3]
    high = (abs(pixels - [0x1F / 255, 0x5F / 255, 0x99 / 255]) < 0.01).all(-1).sum()
    low = (abs(pixels - [0xCF / 255, 0xE3 / 255, 0xF5 / 255]) < 0.01).all(-1).sum()
    # Of 8 x 8 tiles, 15 are high (8 on the diagonal, 8 in the first column), 21 low.
    assert low / high == pytest.approx(21 / 15, rel=0.1)


def test_the_same_map_is_the_same_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        assert main(["tile-map", "--config", "diagonal=256", "--output", str(path)]) == 0
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--output", "map.gif"], "--output 'map.gif' must end in .svg, .png"),
        (["--output", "map.svg", "--tokens", "1000000"], "--tokens must be at most 131072, got 1000000"),
        (
            ["--output", "map.svg", "--config", "low=mxfp3"],
            "--config 'low=mxfp3': low='mxfp3' is not a format",
        ),
        ([], "the following arguments are required: --output"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tile-map", *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert complaint in captured.err
    assert not list(tmp_path.iterdir())
