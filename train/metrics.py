"""What a run writes down: `metrics.jsonl`, `timing.jsonl`, `loss.png`, and the progress on the terminal.

`metrics.jsonl` holds only what the training computes, so a resumed run writes the same bytes as an uninterrupted one;
the clock goes to `timing.jsonl`. One JSON object a line; a training line has `step` and `loss`, an evaluation line
`step` and `heldout_bits_per_byte`.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

import rich.console
import rich.progress

METRICS_FILE = 'metrics.jsonl'
TIMING_FILE = 'timing.jsonl'


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file as dictionaries; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding='utf-8').split('\n')
    return [json.loads(line) for line in lines[:-1]]


class MetricsFile:
    """Appends lines of one run; lines past the step that a run resumes from are dropped first."""

    def __init__(self, path: pathlib.Path, resume_step: int):
        kept = [line for line in read_jsonl(path) if line['step'] <= resume_step]
        temporary = path.with_suffix('.partial')
        temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept), encoding='utf-8')
        os.replace(temporary, path)
        self._file = path.open('a', encoding='utf-8')

    def write(self, **values: Any) -> None:
        """Appends one object and hands it to the operating system."""
        self._file.write(json.dumps(values) + '\n')
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class NoFile:
    """In the place of a `MetricsFile`, where another process writes."""

    def write(self, **values: Any) -> None:
        pass

    def close(self) -> None:
        pass


class ProgressDisplay:
    """A progress bar with loss, bits per byte, tokens/s and time left; lines of text when there is no terminal."""

    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, total_steps: int, step: int):
        self._total, self._first, self._began = total_steps, step, time.monotonic()
        self._last_line = self._began
        console = rich.console.Console(file=sys.stderr)
        columns = (
            rich.progress.TextColumn('training'),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn('{task.fields[values]}'),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn('left'),
            rich.progress.TimeRemainingColumn(),
        )
        self._bar = rich.progress.Progress(*columns, console=console) if console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task('', total=total_steps, completed=step, values='compiling')
            self._bar.start()

    def update(self, step: int, loss: float, bits_per_byte: float | None, tokens_per_second: float) -> None:
        """Shows the newest step."""
        values = f'loss {loss:.4f}'
        if bits_per_byte is not None:
            values += f'  {bits_per_byte:.3f} bits/byte'
        values += f'  {tokens_per_second:,.0f} tokens/s'
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=values)
            return
        now = time.monotonic()
        if step in (self._first + 1, self._total) or now - self._last_line >= self._SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._began) / (step - self._first) * (self._total - step)
            print(f'step {step}/{self._total}  {values}  {left:,.0f} s left', file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class NoDisplay:
    """In the place of a `ProgressDisplay`, where another process has one."""

    def update(self, step: int, loss: float, bits_per_byte: float | None, tokens_per_second: float) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
