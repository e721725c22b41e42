"""MovieLens-100K without a browser: the copy inside the RecBole wheel on PyPI.

The data (F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM TiiS 2015) may be used for
research but not passed on, so it is fetched on each machine, checked, and never stored elsewhere.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from pathlib import Path

from .files import sha256_of_bytes
from .interactions import Interactions

WHEEL = "recbole-1.2.1-py3-none-any.whl"
REQUIREMENT = "recbole==1.2.1"
FOLDER = "recbole/dataset_example/ml-100k/"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}

logger = logging.getLogger(__name__)


def load_movielens(cache: Path = Path("data/cache"), wheel: Path | None = None) -> Interactions:
    """MovieLens-100K: 943 users, 1,682 films, 100,000 ratings (all kept, as interactions).

    cache: directory that holds the wheel, or will after one download of 2 MB.
    wheel: a wheel that is already there; then nothing is downloaded.
    Titles carry the release year. Raises ValueError when the data cannot be had or is altered.
    """
    path = fetch_wheel(cache) if wheel is None else Path(wheel)
    interactions, films = (_member(path, name) for name in SHA256)
    users, items, times = [], [], []
    for line in interactions.splitlines()[1:]:
        user, item, _rating, time = line.split("\t")
        users.append(user)
        items.append(item)
        times.append(float(time))
    titles = {}
    for line in films.splitlines()[1:]:
        item, title, year, _genres = line.split("\t")
        titles[item] = f"{title} ({year})" if year else title
    return Interactions.from_events(users, items, times, titles)


def fetch_wheel(cache: Path) -> Path:
    """Path of the wheel in ``cache``, downloading it with pip when it is not there yet."""
    path = cache / WHEEL
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s (2 MB) into %s", REQUIREMENT, cache)
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(cache)]
    # pip draws its progress bar on stdout; show it where somebody watches.
    shown = sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(
        [*command, REQUIREMENT], stdout=shown, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0 or not path.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else "pip gave no reason"
        raise ValueError(
            f"MovieLens-100K could not be downloaded ({reason}); go online, or fetch {WHEEL} from "
            f"PyPI on another machine and name it with --wheel or put it into {cache}"
        )
    return path


def _member(wheel: Path, name: str) -> str:
    """One verified text file out of the wheel."""
    remedy = f"delete it and download {REQUIREMENT} again"
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(FOLDER + name)
    except FileNotFoundError:
        raise ValueError(f"{wheel} does not exist; name an existing {WHEEL}") from None
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ValueError(f"{wheel} holds no readable {FOLDER}{name} ({error}); {remedy}") from None
    found = sha256_of_bytes(data)
    if found != SHA256[name]:
        raise ValueError(
            f"{FOLDER}{name} in {wheel} has sha256 {found[:12]}.., "
            f"expected {SHA256[name][:12]}..; {remedy}"
        )
    return data.decode("utf-8")
