import matplotlib.image
import numpy as np
import pytest

from train.plot import plot_run


def step_line(step: int, loads: int = 2, mtp_loss: float = 1.5) -> dict:
    spread = [1.0 + layer for layer in range(loads)]
    return {'step': step, 'loss': 5 / step, 'mtp_loss': mtp_loss, 'load_max_over_mean': spread}


def evaluation_line(step: int, loads: int = 2) -> dict:
    return {'step': step, 'heldout_bits_per_byte': 3 / step, 'expert_load': [[0.25] * 4] * loads}


FULL = [*(step_line(step) for step in range(1, 121)), evaluation_line(60), evaluation_line(120)]


@pytest.fixture(scope='module')
def pixels(tmp_path_factory):
    """Draws lines and returns the picture's pixels."""
    folder = tmp_path_factory.mktemp('plot')

    def pixels(lines: list[dict]) -> np.ndarray:
        plot_run(lines, folder / 'loss.png')
        assert [file.name for file in folder.iterdir()] == ['loss.png'], 'replaced in one go'
        return matplotlib.image.imread(folder / 'loss.png')

    return pixels


@pytest.fixture(scope='module')
def full(pixels):
    return pixels(FULL)


def test_picture_shows_the_lines(pixels, full):
    height, width, _ = full.shape
    assert width > 3 * height, 'four panels side by side'
    empty = pixels([])
    assert empty.shape == full.shape
    # Each of the four panels holds something that an empty run's does not.
    quarters = np.split(np.arange(width - width % 4), 4)
    assert all((full[:, part] != empty[:, part]).any(axis=-1).mean() > 0.005 for part in quarters)


@pytest.mark.parametrize(
    'lines',
    [
        pytest.param([step_line(1)], id='before the first evaluation'),
        pytest.param([evaluation_line(1)], id='evaluations alone'),
        pytest.param([step_line(1, loads=0, mtp_loss=0.0), evaluation_line(1, loads=0)], id='a dense model'),
        pytest.param([step_line(1, loads=58), evaluation_line(1, loads=58)], id='many layers'),
        pytest.param([step_line(1), {**step_line(2), 'loss': float('nan')}], id='a loss that is no number'),
        pytest.param([{**step_line(1), 'loss': float('nan'), 'skipped': 'why'}], id='nothing but skipped steps'),
    ],
)
def test_any_run_can_be_drawn(pixels, full, lines):
    assert pixels(lines).shape == full.shape


def test_skipped_steps_are_marked_and_leave_the_curve_whole(pixels, full):
    spoilt = [{**line, 'loss': float('nan'), 'skipped': 'why'} if line['step'] == 70 else line for line in FULL]
    marked = pixels(spoilt)
    panel = np.arange(full.shape[1] // 4)
    assert (marked[:, panel] != full[:, panel]).any()
    # Two curves and a mark; without the mark as many points are drawn as if the step had not been.
    orange = lambda picture: (np.abs(picture[:, panel, :3] - [1, 0.498, 0.055]) < 0.1).all(-1).sum()  # noqa: E731
    assert orange(marked) > 0.9 * orange(full)


def test_average_has_a_curve_of_its_own(pixels, full):
    lines = [{**line, 'heldout_ema_bits_per_byte': 0.04} if 'expert_load' in line else line for line in FULL]
    assert (pixels(lines) != full).any()
