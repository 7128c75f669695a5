import errno
import io
import json
import logging
import os
import struct

import pytest
from tensorboardX.proto import event_pb2

from simgr_jax.errors import UserError
from simgr_jax.training import metric_writer
from simgr_jax.training.metric_writer import MetricWriter
from simgr_jax.workdir.read_files import read_log

TRAIN = {"train/loss": 2.5, "train/targets_per_second": 12345.6}
VALIDATION = {"validation/NDCG@10": 0.125}


def events(workdir):
    """(tag, step, value) of every scalar. A record is its length, a checksum, the event and a checksum."""
    for file in sorted((workdir / "tensorboard").iterdir()):
        data = io.BytesIO(file.read_bytes())
        while header := data.read(12):
            event = event_pb2.Event.FromString(data.read(struct.unpack("<Q", header[:8])[0]))
            data.read(4)
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value


def log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_write_is_a_line_and_tensorboard_scalars(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(5, TRAIN)
        writer.write(10, VALIDATION)
    assert log(tmp_path) == [{"step": 5} | TRAIN, {"step": 10} | VALIDATION]
    assert list(events(tmp_path)) == [
        ("train/loss", 5, 2.5),
        ("train/targets_per_second", 5, pytest.approx(12345.6)),
        ("validation/NDCG_10", 10, 0.125),  # TensorBoard allows no @ in names.
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(5, TRAIN)
        assert log(tmp_path) == [{"step": 5} | TRAIN]


class FullDisk:
    """A file that takes `room` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self):
        self.file.close()


def test_lines_wait_while_the_disk_is_full_and_none_is_lost(tmp_path, caplog):
    """The first line is written in part."""
    with MetricWriter(tmp_path, 0) as writer, caplog.at_level(logging.WARNING):
        disk = writer._lines._file = FullDisk(writer._lines._file, room=10)
        writer.write(5, TRAIN)
        writer.write(10, VALIDATION)
        full = f"{tmp_path}/metrics.jsonl: can't be written (No space left on device); "
        assert caplog.messages == [f"{full}its lines wait in memory"]
        with pytest.raises(UserError) as caught:
            writer.require_written()
        assert str(caught.value).startswith(full)
        disk.room = 1000
        writer.require_written()
        assert log(tmp_path) == [{"step": 5} | TRAIN, {"step": 10} | VALIDATION]


def test_a_writer_closes_on_a_full_disk(tmp_path):
    """Without an error, which would hide the one that ended training."""
    with MetricWriter(tmp_path, 0) as writer:
        writer._lines._file = FullDisk(writer._lines._file, room=0)
        writer.write(5, TRAIN)
    assert log(tmp_path) == []


@pytest.mark.parametrize("broken", ["write", "flush"])
def test_tensorboard_never_stops_training(tmp_path, monkeypatch, caplog, broken):
    """Many more events than a queue holds."""
    from tensorboardX import record_writer

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricWriter(tmp_path, 0) as writer, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(record_writer.RecordWriter, broken, full)
        for step in range(1, 101):
            writer.write(step, TRAIN)
    assert len(log(tmp_path)) == 100
    folder = tmp_path / "tensorboard"
    assert caplog.messages == [
        f"{folder}: can't be written (No space left on device); the run goes on without TensorBoard events"
    ]


def test_a_run_trains_without_a_place_for_tensorboard(tmp_path, caplog):
    (tmp_path / "tensorboard").touch()
    with caplog.at_level(logging.WARNING), MetricWriter(tmp_path, 0) as writer:
        writer.write(5, TRAIN)
    assert log(tmp_path) == [{"step": 5} | TRAIN]
    assert [message.partition("; ")[2] for message in caplog.messages] == ["the run goes on without TensorBoard events"]


def test_a_run_that_continues_drops_the_lines_that_it_will_write_again(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        for step in (5, 10, 15):
            writer.write(step, VALIDATION)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "train/lo')
    with MetricWriter(tmp_path, 10) as writer:
        writer.write(15, TRAIN)
    assert log(tmp_path) == [{"step": 5} | VALIDATION, {"step": 10} | VALIDATION, {"step": 15} | TRAIN]


@pytest.mark.parametrize("line", [b"{}", b"[]", b"1", b'{"step": "5"}', b"\xff", b'{"step": 1' + b"0" * 5000 + b"}"])
def test_a_line_that_is_not_a_steps_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 5}\n' + line + b"\n")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not .*; remove the line"):
        MetricWriter(tmp_path, 10)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not .*; remove the line"):
        read_log(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writer.distributed, "is_main", lambda: False)
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(5, TRAIN)
    assert not list(tmp_path.iterdir())
