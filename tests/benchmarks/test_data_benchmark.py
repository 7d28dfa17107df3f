"""The data benchmark runs every stage and refuses unusable files."""

import sys

import data as data_benchmark
import pytest
from solid import write_solid_dataset

from maskrcnn.config import AugmentConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing


def test_all_tables_are_printed(tmp_path, monkeypatch, capsys):
    root = write_solid_dataset(tmp_path / "solid")
    options = ["--min-size", "64", "--images", "16", "--workers", "0"]
    monkeypatch.setattr(data_benchmark.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["data.py", str(root), *options])
    data_benchmark.main()
    output = capsys.readouterr().out
    for name in ("decode", "flip and resize", "masks", "collate", "all stages", *data_benchmark.AUGMENTATIONS):
        (line,) = (line for line in output.splitlines() if line.startswith(f"{name:22}"))
        assert float(line[22:].split()[0]) > 0
    assert "loader, 0 worker(s):" in output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_and_its_processes_are_measured(monkeypatch, capsys):
    monkeypatch.setenv("MASKRCNN_CACHE", "")  # restores what the benchmark sets
    monkeypatch.setattr(data_benchmark.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["data.py", "--images", "100", "--workers", "1", "--samples", "8"])
    data_benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    for name in ("pycocotools", "maskrcnn, first", "maskrcnn, cached", "64 images", "100 images"):
        (line,) = (line for line in lines if line.startswith(f"{name:22}"))
        numbers = [float(number) for number in line[22:].split()]
        assert min(numbers) > 0
        assert "images" not in name or numbers[1] > numbers[0]  # MiB of one process, and of two


def test_an_unusable_file_is_an_error(tmp_path):
    dataset = CocoDataset.load(write_solid_dataset(tmp_path / "solid"), "train")
    dataset.images[1].path.write_bytes(b"")
    with pytest.raises(UserError, match="empty file"):
        data_benchmark.sample_seconds(dataset, Preprocessing(min_size_px=64), AugmentConfig(), 4)
    with pytest.raises(UserError, match="empty file"):
        data_benchmark.loader_rate(dataset, Preprocessing(min_size_px=64), 0, 40)
