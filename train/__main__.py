"""`python -m train --config FILE.gin`: trains, or goes on with a run that was stopped."""

import argparse
import pathlib
import signal
import sys
import time
from typing import NoReturn

from configs import loader
from train import processes, run
from train.compilation import keep_programs
from train.errors import TrainingError
from train.preflight import find_compiler
from train.stop import StopSignals


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as everything else that is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}\n')


def main() -> int:
    """Runs the command line and returns the exit code.

    2, with one line on standard error, for bad input; 1, with one too, if training cannot go on; 75 if it cannot because another
    process was lost, 70 if this one of several failed; 128 and the number of the signal if one ended it, its last step saved, 143
    if another process got one.
    """
    parser = _Parser(prog='python -m train', description=__doc__)
    parser.add_argument('--config', required=True, metavar='FILE.gin', help='the configuration to train')
    parser.add_argument(
        '--set',
        action='append',
        default=[],
        metavar="'NAME = value'",
        help='replace a macro or a bound value; may be given again',
    )
    parser.add_argument(
        '--run-dir', metavar='DIR', help='where to write; the default is runs/NAME of the configuration'
    )
    parser.add_argument('--print', action='store_true', help='show the configuration and the counts, train nothing')
    parser.add_argument(
        '--profile',
        type=int,
        metavar='N',
        help='take N steps by the clock and trace N more, show where their time goes, and stop there',
    )
    parser.add_argument(
        '--preflight',
        action='store_true',
        help='compile the step for --gpus H100s, which need not be there, show what it needs, and train nothing',
    )
    parser.add_argument('--gpus', type=int, metavar='N', help='of --preflight')
    together = parser.add_argument_group(
        'several processes',
        'One a GPU or one a host, with the same arguments and a DIR that all see. Tasks of srun need none of these.',
    )
    together.add_argument('--coordinator', metavar='HOST:PORT', help='where process 0 is, and a free port there')
    together.add_argument('--processes', type=int, metavar='N', help='how many there are')
    together.add_argument('--process', type=int, metavar='I', help='the number of this one, from 0')
    options = parser.parse_args()
    if options.preflight != (options.gpus is not None):
        parser.error('--preflight needs --gpus N, and --gpus is for --preflight')
    began = time.monotonic()
    stop = StopSignals()
    try:
        if options.preflight:
            find_compiler()
        else:
            keep_programs()
            if not options.print:
                processes.start(options.coordinator, options.processes, options.process)
        loader.parse(options.config, options.set)
        result = loader.call(
            run.train,
            run_dir=options.run_dir or str(pathlib.Path('runs') / pathlib.Path(options.config).stem),
            config_text=loader.operative_config,
            print_only=options.print,
            profile=options.profile,
            preflight=options.gpus,
            stop=stop,
        )
    except (ValueError, TypeError, OSError) as error:
        print(f'error: {error}'.partition('\n')[0], file=sys.stderr)
        return processes.ended(2)
    except TrainingError as error:
        print(f'error: {error}'.partition('\n')[0], file=sys.stderr)
        return processes.ended(1)
    if options.print:
        print(loader.operative_config(), end='')
    elif result is not None and not result.finished:
        who = '' if stop.received is not None else 'another process was asked to stop: '
        print(f'{who}step {result.step} is saved: the same command goes on from it', file=sys.stderr)
        return 128 + (stop.received or signal.SIGTERM)
    elif result is not None:
        processes.say(
            f'{result.heldout_bits_per_byte:.4f} held-out bits a byte after step {result.step}, '
            f'{time.monotonic() - began:.0f} s'
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
