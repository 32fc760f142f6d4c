"""What all scripts of this folder share at their door: errors of one sentence, exit codes, progress bars."""
import os
import sys
from pathlib import Path
from typing import Callable

DELAY_S = 2.   # a job that takes less shows no bar

DONE, REFUSED, MISSING, INTERRUPTED = 0, 2, 3, 130   # exit codes


class BadInput(ValueError):
    "Something at the door that cannot be used; the message says what came, what was needed, what to do."


def progress(what: str, total: int | None, unit: str, start: int = 0):
    "A bar on stderr, seen only once the job has taken two seconds; `unit` B counts bytes."
    from tqdm import tqdm
    every = .2 if sys.stderr.isatty() else 10   # a log file gets a line now and then
    return tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B", initial=start, delay=DELAY_S, mininterval=every, maxinterval=every, file=sys.stderr)


def say(text: str):
    "A note that is no result."
    print(text, file=sys.stderr, flush=True)


def run(
    program: str,
    work: Callable[[], int],            # gives the exit code
    out: Path,                          # named where the system does not say which file it could not write
    expected: type[Exception] = BadInput,
) -> int:                               # exit code: 2 refused, 130 interrupted, or what `work` gives
    "Does the work; what goes wrong becomes one sentence on stderr."
    try: return work()
    except expected as error: message = str(error)
    except OSError as error: message = f"{error.filename or out}: {error.strerror or error}; check permissions and free space, then run again"
    except KeyboardInterrupt:
        say(f"{program}: interrupted; run the same command again")
        return INTERRUPTED
    say(f"{program}: {message}")
    return REFUSED


def check_folder(out: Path, called: str = "OUT"):
    "Raises BadInput, before any work, if `out` is not and cannot become a folder that we may write to."
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir(): raise BadInput(f"{called} {out}: {above} is a file, a folder is needed; give another {called}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(f"{called} {out}: no permission to write in {above}; give a folder that you may write to")
