"""Messages about a store that doesn't suit what is asked for, or that gets new labels."""

from __future__ import annotations

from features.datasets.limit import DRAWN
from features.manifest import Manifest

SHOWN = 5  # how many classes are named
REMEDY = (
    "Give -o for another folder or --name for a store beside it; --overwrite stale makes it anew"
)
STALE = "Take --overwrite stale to compute those anew"


def of_other_images(stored: Manifest, asked: Manifest, *, has_all: bool) -> str:
    """Say what to do where a store has other images than are asked for, and nothing else differs.

    has_all: it has those that are asked for, too.
    """
    if line := two_roots(stored, asked):
        return line
    if has_all:
        return (
            "It has all that is asked for, and more: leave --limit out, or take -o for another "
            "place; --overwrite stale makes a smaller one of it"
        )
    if DRAWN in stored.note or DRAWN in asked.note:
        return (
            "--limit draws by label and split, so other labels or splits draw other images: leave "
            "--limit out, or give --name for a store of these"
        )
    return REMEDY


def two_roots(stored: Manifest, asked: Manifest) -> str:
    """Return a warning where images of one name lie in two folders: maybe of two data sets."""
    if str(stored.root) == str(asked.root):
        return ""
    return (
        f"It has images of {stored.root}, and these are of {asked.root}: give --name for a store "
        "of these, or --overwrite stale if they took the others' place"
    )


def other_labels(old: Manifest, new: Manifest) -> str:
    """Say which task, classes or column take the place of others, in a line; else nothing.

    An order of classes that was given counts: of two the last is the positive one. That of findings
    doesn't.
    """
    other_column = bool(old.label_from and new.label_from and old.label_from != new.label_from)
    same = (old.task, sorted(old.classes)) == (new.task, sorted(new.classes))
    given = "given" in (old.order_from, new.order_from)
    turned = same and given and old.task == "multiclass" and old.classes != new.classes
    if same and not other_column and not turned:
        return ""

    def described(one: Manifest) -> str:
        shown = ", ".join(one.classes[:SHOWN]) or "none"
        more = f" and {len(one.classes) - SHOWN} more" if one.classes[SHOWN:] else ""
        column = f" of column {one.label_from}" if other_column else ""
        return f"{one.task}, {shown}{more}{column}"

    order = ""
    if turned and len(new.classes) == 2:
        order = f"; the positive class is {new.classes[-1]} now, and was {old.classes[-1]}"
    if turned and old.order_from == "given" != new.order_from:
        order += "; the order was given by --classes before, and is not now"
    return f"{described(old)} -> {described(new)}{order}"
