"""The checkpoint of a member, with a card that shows what it does."""

import shutil
from pathlib import Path

import gptoss_jax as gj
from convert import checksums
from convert.sources import NANO

from ..families.results import Results
from . import card
from .members import GREEDY, Member
from .questions import shown

README = "README.md"


def cut(member: Member, found: Results, evaluation: Path, rows: Path, models: Path) -> Path:
    """The member's checkpoint, with a card that shows what it was measured to do and answers of its own."""
    folder, unfinished = models / member.name, models.parent / "unfinished"
    if folder.exists():
        return folder
    shutil.rmtree(unfinished, ignore_errors=True)
    gj.prune(NANO, member.keep_sets, member.family, eval=evaluation, out=unfinished)
    asked = shown(rows, member.family)
    replies = gj.generate(unfinished, [one.question for one in asked], temperature=0, **GREEDY)
    sections = card.sections(member.name, member.family, found, list(zip(asked, replies, strict=True)))
    _extend(unfinished, sections)
    models.mkdir(exist_ok=True)
    return unfinished.rename(folder)


def _extend(folder: Path, sections: str) -> None:
    """Add sections to a checkpoint's card, whose digest is then another."""
    readme, sums = folder / README, folder / checksums.FILE
    digests = checksums.parse(sums.read_bytes())
    readme.write_text(card.extended(readme.read_text(encoding="utf-8"), sections), encoding="utf-8")
    sums.unlink()
    checksums.write(folder, {name: digest for name, digest in digests.items() if name != README})
