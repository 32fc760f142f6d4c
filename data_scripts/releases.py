"""The archives that ActionFormer's authors pass on: from a file or an address to the documented folders, and what is missing there."""
import argparse
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from actloc.core.files import read_json, replacing

from command_line import DONE, MISSING, BadInput, check_folder, run, say
from downloads import download, how_to_go_on, md5_of, size_of, unpacked

SHOWN = 100   # missing features on the screen; the list on the disk has all

WHERE = """where the archive comes from:
  Its authors keep it on personal cloud drives whose addresses change, so none is built in. The README of their release
  (github.com/happyharrycn/actionformer_release) has the links under "{section}". Either download {archives}
  in a browser and give the file as SOURCE, or give the direct address of the file as --url (what "copy download link" says in the
  browser's list of downloads; a share link is the address of a web page, which is noticed and refused).
  A download that broke is continued by the same command.

{results}
then a report: annotated videos per subset, features found, every missing feature by name, files that no annotation names.
exit code: 0 all features are there, 3 some are missing (named), 2 refused (one sentence says why), 130 interrupted"""

RESULT = """{archive} (MD5 {md5}) becomes, below DATA:
{files}  {listing} (only if features are missing)
"""


@dataclass(frozen=True)
class Release:
    "One archive of the release and where its parts belong."
    archive: str                  # its name
    md5: str
    folder: str                   # below DATA
    videos: tuple[str, ...]       # files in annotations/ that list the videos
    features: str                 # folder of the features
    section: str                  # of the authors' README
    prefix: str = ""              # file of a video: prefix + id + suffix
    suffix: str = ".npy"
    others: tuple[str, ...] = ()  # further files in annotations/

    @property
    def annotations(self) -> tuple[str, ...]: return self.videos + self.others

    @property
    def lists(self) -> str: return f"missing_{self.features}.txt"

    def result(self) -> str:
        files = "".join(f"  {self.folder}/annotations/{name}\n" for name in self.annotations) + f"  {self.folder}/{self.features}/{self.prefix}ID{self.suffix}\n"
        return RESULT.format(archive=self.archive, md5=self.md5, files=files, listing=f"{self.folder}/{self.lists}")


@dataclass(frozen=True)
class Inventory:
    "What annotations ask for and what is there."
    subsets: dict[str, int]     # annotated videos
    missing: dict[str, str]     # file name -> reason
    extra: tuple[str, ...]      # files that no annotation names

    @property
    def total(self) -> int: return sum(self.subsets.values())


# --- What is there ---

def take_inventory(release: Release, data: Path) -> Inventory | None:
    "Compares annotations and feature files; None if an annotation file is missing. Raises ValueError for an annotation file that cannot be read."
    folder = data / release.folder
    if not all((folder / "annotations" / name).is_file() for name in release.annotations): return None
    subsets = {}
    for name in release.videos: subsets |= subsets_of(folder / "annotations" / name)
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder / release.features)} if (folder / release.features).is_dir() else {}
    wanted = [f"{release.prefix}{id}{release.suffix}" for id in sorted(subsets)]
    missing = {name: "empty" if name in sizes else "absent" for name in wanted if not sizes.get(name)}
    return Inventory(dict(sorted(Counter(subsets.values()).items())), missing, tuple(sorted(sizes.keys() - set(wanted))))


def subsets_of(path: Path) -> dict[str, str]:
    "{video: subset} of an annotation file."
    content = read_json(path)
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict) or not database or not all(isinstance(entry, dict) for entry in database.values()):
        raise BadInput(f'{path}: {{"database": {{id: {{"subset", ...}}}}}} with at least one video is needed, something else came; unpack or download the archive again')
    return {id: str(entry.get("subset", "no subset")) for id, entry in database.items()}


def report(release: Release, data: Path, found: Inventory, vouched: str) -> int:  # exit code
    "Says what there is and names what is missing, on the screen and in a file."
    folder, listing = data / release.folder, data / release.folder / release.lists
    print(f"{folder}: {vouched}")
    print(f"annotated videos: {found.total:,} (" + ", ".join(f"{subset} {n:,}" for subset, n in found.subsets.items()) + ")")
    print(f"features: {found.total - len(found.missing):,} of {found.total:,} in {folder / release.features}")
    if found.extra: print(f"files that no annotation names: {len(found.extra):,} ({shortened(found.extra, 10)})")
    if not found.missing:
        listing.unlink(missing_ok=True)
        return DONE
    with replacing(listing) as file: file.writelines(f"{name}\t{reason}\n" for name, reason in found.missing.items())
    for name in list(found.missing)[:SHOWN]: print(f"missing: {name} ({found.missing[name]})")
    if len(found.missing) > SHOWN: print(f"missing: {len(found.missing) - SHOWN:,} more")
    print(f"all {len(found.missing):,} missing features are listed in {listing}")
    return MISSING


def shortened(names: tuple[str, ...], most: int) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# --- From the archive to the folders ---

def obtain(release: Release, url: str, data: Path) -> Path:  # the archive, or what there is of it
    "Downloads the archive, unless it is there."
    archive, part = data / release.archive, data / f"{release.archive}.part"
    if archive.exists():
        say(f"using {archive}, downloaded earlier (delete it to download it again)")
        return archive
    say(f"downloading {url}")
    if download(url, part): say(f"all {size_of(part):,} bytes of {release.archive} are here")
    return part


def verified(release: Release, archive: Path, verify: bool) -> bool:
    "Has the archive the release's MD5? Raises BadInput if not, unless nobody wants to know (then that is said)."
    md5 = md5_of(archive)
    if md5 == release.md5: return True
    came = f"{archive} ({size_of(archive):,} bytes) has MD5 {md5}, the release's {release.archive} has {release.md5}"
    if not verify:
        say(f"NOT VERIFIED: {came}; nobody vouches for its annotations ({', '.join(release.annotations)}) nor for any file in {release.features}")
        return False
    if archive.suffix != ".part":
        raise BadInput(f"{came}: it is cut off, damaged or another file; copy or download it again, or add --no-verify to use it unverified")
    raise BadInput(f"{came}: it is cut off, damaged or another file; {how_to_go_on(archive)}; if that ends here again, delete {archive} to begin anew, "
                   "or add --no-verify to use it unverified")


def root_of(release: Release, folder: Path, archive: Path) -> Path:
    "The folder in the unpacked archive that holds annotations/ and the features; raises BadInput if it is incomplete."
    roots = sorted(path.parents[1] for path in folder.rglob(f"annotations/{release.videos[0]}"))
    if len(roots) != 1:
        raise BadInput(f"{archive}: {len(roots)} files annotations/{release.videos[0]} in it, one is needed; give {release.archive} as its authors distribute it")
    lost = [f"annotations/{name}" for name in release.annotations if not (roots[0] / "annotations" / name).is_file()]
    lost += [] if (roots[0] / release.features).is_dir() else [f"{release.features}/"]
    if lost: raise BadInput(f"{archive}: {', '.join(lost)} not in it beside annotations/{release.videos[0]}; give {release.archive} as its authors distribute it")
    return roots[0]


def install(release: Release, root: Path, target: Path):
    "Moves the release's parts to their place. Killed at any moment, annotations are there only with all features of the archive."
    (target / "annotations").mkdir(parents=True, exist_ok=True)
    came = sorted(path.name for path in (root / "annotations").iterdir() if path.is_file())
    for name in came: (target / "annotations" / name).unlink(missing_ok=True)
    move(root / release.features, target / release.features)
    for name in came: os.replace(root / "annotations" / name, target / "annotations" / name)


def move(source: Path, target: Path):
    "A folder to its place: at once where there is none yet, otherwise file by file over what is there."
    if not target.exists(): return os.replace(source, target)
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir(): place.mkdir(exist_ok=True)
        else: os.replace(path, place)


def fetch(release: Release, source: Path | None, url: str | None, data: Path, verify: bool = True) -> int:  # exit code
    "From SOURCE or --url to the folders and the report; raises ValueError. What is complete already is only reported."
    if source and url: raise BadInput(f"SOURCE {source} and --url {url} came, one of them is needed; leave one out")
    check_folder(data, "DATA")
    before = take_inventory(release, data)
    if before and (not before.missing or not (source or url)):
        say(f"nothing is fetched: {data / release.folder} is {'incomplete' if before.missing else 'complete'}" +
            (f" (give {release.archive} as SOURCE, or --url)" if before.missing else f" (delete {data / release.folder / release.features} to unpack it again)"))
        return report(release, data, before, "as found, not verified now")
    if not (source or url):
        raise BadInput(f"neither SOURCE nor --url came and {data / release.folder} is not there; give {release.archive} as SOURCE or its address as --url (--help says where from)")
    if source and not source.is_file(): raise BadInput(f"{source}: no such file; give {release.archive}, or --url to download it (--help says where from)")
    archive = source or obtain(release, url, data)
    good = verified(release, archive, verify)
    with unpacked(archive, data / f".{release.folder}.unpacking") as folder:
        install(release, root_of(release, folder, archive), data / release.folder)
    if not source:
        if archive.suffix == ".part": archive = archive.replace(archive.with_suffix(""))
        say(f"{archive} is unpacked; it may be deleted")
    return report(release, data, take_inventory(release, data), f"unpacked from {archive.name}, " + ("MD5 as in the release" if good else "NOT VERIFIED"))


def parser(description: str, releases: dict[str, Release]) -> argparse.ArgumentParser:
    "The command line of a fetch script, with one release or a choice of them."
    all_of = list(releases.values())
    epilog = WHERE.format(section=all_of[0].section, archives=" or ".join(r.archive for r in all_of), results="\n".join(r.result() for r in all_of))
    found = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("source", metavar="SOURCE", nargs="?", type=Path, help="the archive on this machine (without SOURCE and --url: report what is there)")
    found.add_argument("--url", help="download the archive from this address, to DATA")
    found.add_argument("--data", type=Path, default=Path("data"), help="folder for everything (default: data)")
    found.add_argument("--no-verify", action="store_true", help="use an archive with another MD5 (a mirror's, your own); what nobody vouches for is said")
    if len(releases) > 1: found.add_argument("--features", choices=list(releases), default=next(iter(releases)), help=f"default: {next(iter(releases))}")
    return found


def main(program: str, description: str, releases: dict[str, Release], arguments: list[str] | None) -> int:  # exit code
    "A fetch script."
    options = parser(description, releases).parse_args(arguments)
    release = releases[getattr(options, "features", next(iter(releases)))]
    return run(program, lambda: fetch(release, options.source, options.url, options.data, not options.no_verify), options.data, ValueError)
