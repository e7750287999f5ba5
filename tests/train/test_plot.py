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
    ],
)
def test_any_run_can_be_drawn(pixels, full, lines):
    assert pixels(lines).shape == full.shape
