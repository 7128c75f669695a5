"""Writes lists for a file of histories of any size. A job that was stopped goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simgr_jax.devices import distributed
from simgr_jax.errors import UserError
from simgr_jax.models import popularity
from simgr_jax.run import Run
from simgr_jax.serving import history_files
from simgr_jax.serving.histories import Histories, Recommendations
from simgr_jax.workdir.atomic_write import check_target, one_line_on_a_full_disk, write_json
from simgr_jax.workdir.lock import locked
from simgr_jax.workdir.read_files import read_json_object

PART = 8192  # Histories that are read and answered at once.
_DONE, _NAMES = "done.json", ("lists.jsonl", "bad.jsonl")
_ANEW = "remove the folder to begin anew"
_SECONDS = 28.0  # Where there is no terminal, a line says at least this often how far the job is.


class Done(NamedTuple):
    """What a job has done so far.

    Attributes:
      rows: of the input, from its begin.
      bytes: of the lists and of the bad rows' file.
      lists: how many there are, of which `popular` are for histories without any known item.
      unknown: how many ids of the histories are not in the catalog.
      bad: how many rows could not be read.
    """

    rows: int = 0
    bytes: tuple[int, int] = (0, 0)
    lists: int = 0
    popular: int = 0
    unknown: int = 0
    bad: int = 0


def bad_rows_file(output: Path) -> Path:
    """Where the rows are named that can't be read."""
    return output.with_name(f"{output.name}.bad.jsonl")


def recommend_file(run: Run, histories: Path, output: Path, k: int, filter_history: bool, part: int = PART) -> Done:
    """Writes `output`, one line per history in the order of the file: {"user": "A1", "items": ["B7", ...]}.

    Rows that can't be read are named in `bad_rows_file(output)`, if there are any. Until the end, what is written is in
    the folder OUTPUT.unfinished, from which the same call goes on.

    Args:
      histories: see `history_files`.
      part: histories that are answered at once.

    Raises:
      UserError: a file can't be read or written, k is more than the model can list, or OUTPUT.unfinished is of another
        job.
    """
    total = history_files.count_rows(histories)
    for target in (output, bad_rows_file(output)):
        check_target(target)
        if target.is_dir():
            raise UserError(f"{target}: is a folder; give the path of a file")
        if target.exists() and target.samefile(histories):
            raise UserError(f"{target}: is the file of the histories; give another --output")
    run.check_list_length(k)
    status = histories.stat()
    job = {
        "histories": [str(histories.resolve()), status.st_size, status.st_mtime_ns],
        "model": run.lists_fingerprint(),
        **{"k": k, "filter_history": filter_history, "part": part},
    }
    folder = output.with_name(f"{output.name}.unfinished")
    with one_line_on_a_full_disk(output), _Files(folder, job) as files, _progress(total) as show:
        popular = popularity.most_popular(run.split.train, run.dataset.num_items)[:k]
        show(files.done.rows)
        for rows in history_files.read_parts(histories, files.done.rows, part):
            asked = Histories.of_lists([history.items for history in rows.histories], run.dataset)
            found = asked.recommendations(*run.lists(asked.cases(), k, filter_history), popular)
            files.write(rows, found)
            show(rows.end)
        return files.finish(output)


class _Files:
    """The job's files in its folder. Only the first of several processes writes."""

    def __init__(self, folder: Path, job: dict[str, Any]):
        self.folder, self.job = folder, job

    def __enter__(self) -> _Files:
        if distributed.is_main():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.folder}: can't be made ({error.strerror}); choose another --output") from error
        with contextlib.ExitStack() as opened:
            opened.enter_context(distributed.main_holds(locked(self.folder, "a job is writing", "--output")))
            self.done = self._read_done()
            if distributed.is_main():
                self._lists, self._bad = (
                    opened.enter_context(self._begin(name, size))
                    for name, size in zip(_NAMES, self.done.bytes, strict=True)
                )
            self._open = opened.pop_all()
        return self

    def _read_done(self) -> Done:
        state = self.folder / _DONE
        if not state.exists():
            return Done()
        found = read_json_object(state)
        if found.get("job") != self.job:
            raise UserError(f"{state}: is of other histories, options or another model; {_ANEW}")
        try:
            return Done(**{**found["done"], "bytes": tuple(found["done"]["bytes"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{state}: is damaged; {_ANEW}") from error

    def _begin(self, name: str, size: int) -> IO[bytes]:
        """Opens a file for more, without what was written after the last count."""
        path = self.folder / name
        file = path.open("ab")
        if file.tell() < size:
            file.close()
            raise UserError(f"{path}: is damaged, as it is shorter than it was; {_ANEW}")
        file.truncate(size)
        return file

    def write(self, rows: history_files.Part, found: Recommendations) -> None:
        texts = [
            [
                {"user": history.user, "items": items}
                for history, items in zip(rows.histories, found.items, strict=True)
            ],
            [row._asdict() for row in rows.bad],
        ]
        data = ["".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode() for lines in texts]
        done = self.done
        self.done = Done(
            rows.end,
            (done.bytes[0] + len(data[0]), done.bytes[1] + len(data[1])),
            done.lists + len(found.items),
            done.popular + len(found.popular),
            done.unknown + found.unknown,
            done.bad + len(rows.bad),
        )
        if distributed.is_main():
            for file, new in zip((self._lists, self._bad), data, strict=True):
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
            write_json(self.folder / _DONE, {"job": self.job, "done": self.done._asdict()})

    def finish(self, output: Path) -> Done:
        """Moves the files to their places."""
        if distributed.is_main():
            bad_rows_file(output).unlink(missing_ok=True)  # An earlier job's.
            if self.done.bad:
                shutil.copyfile(self.folder / _NAMES[1], bad_rows_file(output))
            # A job that is killed after this begins anew.
            (self.folder / _DONE).unlink(missing_ok=True)
            os.replace(self.folder / _NAMES[0], output)
            shutil.rmtree(self.folder)
        distributed.barrier()
        return self.done

    def __exit__(self, *exception: object) -> None:
        self._open.close()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Gives a function that shows how many of the rows are done: in a bar, or in a line now and then."""
    if not distributed.is_main():
        yield lambda rows: None
        return
    if (console := Console()).is_terminal:
        columns = MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("histories")
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda rows: bar.update(task, completed=rows)
        return
    said = time.monotonic()

    def show(rows: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SECONDS:
            said = time.monotonic()
            print(f"{rows:,} of {total:,} rows", flush=True)

    yield show
