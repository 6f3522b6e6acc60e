"""Choosing among the images of a session of a BIDS study, and finding the masks of images."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from beam_nifti.errors import UsageError
from beam_nifti.manifest.bids import BidsImage, Study
from beam_nifti.support.wording import counted, first_few

_SHOWN: Final = 3  # names in a note that concerns many
_OF_GRIDS: Final = ("space", "res", "den")  # entities of images on another grid than that of their source
_OF_MASKS: Final = (
    "desc",
    "label",
)  # entities that tell masks of an image apart, and are not those of images


def counts_text(images: Mapping[str, Sequence[BidsImage]]) -> str:
    """The suffixes of a study, with their numbers of images."""
    return ", ".join(f"{name} ({len(found)})" for name, found in sorted(images.items()))


def labels_text(key: str, images: Iterable[BidsImage]) -> str:
    """The labels of an entity of images."""
    labels = sorted({image.entities.get(key, "") for image in images})
    return ", ".join(label or "absent" for label in labels)


def reason_for_none(key: str, labels: Sequence[str], images: Sequence[BidsImage], prefix: str = "") -> str:
    """What was requested of an entity, and what exists."""
    wanted = " or ".join(f"{key}-{label}" if label else f"no {key}-" for label in labels)
    flag = "--session" if key == "ses" and not prefix else f"--entity {prefix}{key}"
    if not any(key in image.entities for image in images) and "" not in labels:
        return f"{wanted} was requested, but their names have no {key}-; drop {flag}"
    return f"{wanted} was requested, but {key} is {labels_text(key, images)}"


def refuse_several(
    root: str, groups: Sequence[Sequence[BidsImage]], prefix: str = "", *, has_all: bool, noun: str = "image"
) -> None:
    """Refuse several images where there can be one.

    Args:
        root: folder of the study.
        groups: images of each session.
        prefix: of keys in `--entity`, such as "T1w:".
        has_all: whether `--all-images` keeps all of them.
        noun: what the images are.

    Raises:
        UsageError: a group has several images; with the flags that select one of them.
    """
    several = [group for group in groups if len(group) > 1]
    if not several:
        return
    differing = sorted({key for group in several for key in varying(group)})
    among = list(itertools.chain(*several))
    texts = [f"{key} ({labels_text(key, among)})" for key in differing]
    raise UsageError(
        f"{root}: {counted(len(several), 'session', 'have')} several {noun}s, such as "
        f"{several[0][0].path} and {several[0][1].path}; they differ in {', '.join(texts)}. "
        f"{_advise(groups, differing, prefix, noun, has_all=has_all)}"
    )


def _advise(
    groups: Sequence[Sequence[BidsImage]], differing: Sequence[str], prefix: str, noun: str, *, has_all: bool
) -> str:
    """Flags that select one image of each session, with as few sessions as possible left without an image."""
    chosen = dict[str, list[str]]()

    def score(entities: Mapping[str, Sequence[str]]) -> tuple[int, int]:
        counts = [sum(image.has(entities) for image in group) for group in groups]
        return counts.count(0), sum(count > 1 for count in counts)

    for key in differing:
        labels = sorted({image.entities.get(key, "") for group in groups for image in group})
        options = [[label] for label in labels if label]
        options += [[*option, ""] for option in options if "" in labels]
        if noun == "mask" and "" in labels:
            options.insert(0, [""])  # such as no space-: that of the image
        chosen[key] = min(options, key=lambda labels: score({**chosen, key: labels}))
        lost, left = score(chosen)
        if not left:
            break
    otherwise = ", or keep all with --all-images" if has_all else ""
    if left:
        return f"Choose with --entity {prefix}KEY=LABEL (KEY= selects {noun}s without KEY){otherwise}"
    flags = " ".join(f"--entity {prefix}{key}={label}" for key, labels in chosen.items() for label in labels)
    article = "an" if noun == "image" else "a"
    without = f", which leaves {lost} of {len(groups)} sessions without {article} {noun}" if lost else ""
    return f"Choose with {flags}{without}{otherwise}"


def varying(images: Sequence[BidsImage]) -> dict[str, list[str]]:
    """Labels of the entities that differ between images, "" for none; without sub and ses."""
    keys = dict.fromkeys(key for image in images for key in image.entities if key not in ("sub", "ses"))
    columns = {key: [image.entities.get(key, "") for image in images] for key in keys}
    return {key: labels for key, labels in columns.items() if len(set(labels)) > 1}


Row = tuple[BidsImage, ...]


def match_masks(
    study: Study, suffix: str, entities: Mapping[str, Sequence[str]], rows: Sequence[Row]
) -> tuple[list[Row], list[BidsImage], list[str]]:
    """Find the mask of the first image of each row.

    A mask is that of an image of the same session if entities that both have are equal, except desc and
    label. An image with a space (or res, den) has masks with the same one.

    Args:
        study: where the masks are.
        suffix: suffix of the masks.
        entities: labels of the masks to select, by key.
        rows: images of each row.

    Returns:
        The rows that have a mask, their masks, and notes on the others.

    Raises:
        UsageError: there are no such masks, several of an image, or several images of one.
    """
    of_suffix = study.images.get(suffix, ())
    if not of_suffix:
        there = counts_text(study.images) or "none"
        raise UsageError(
            f"{study.root}: no {suffix} images for --mask-suffix; there are: {there}; if the masks are those "
            "of a derivative, name it with --derivatives"
        )
    selected = [mask for mask in of_suffix if mask.has(entities)]
    if not selected:
        reasons = (reason_for_none(key, entities[key], of_suffix, f"{suffix}:") for key in entities)
        raise UsageError(
            f"{study.root}: none of the {len(of_suffix)} {suffix} images is selected: {'; '.join(reasons)}"
        )
    of_session = defaultdict[tuple[str, str], list[BidsImage]](list)
    for mask in sorted(selected, key=lambda mask: mask.path):
        of_session[mask.session].append(mask)
    groups = [[mask for mask in of_session[row[0].session] if _is_of(mask, row[0])] for row in rows]
    refuse_several(study.root, groups, f"{suffix}:", has_all=False, noun="mask")
    found = [(row, group[0]) for row, group in zip(rows, groups, strict=True) if group]
    lacking = [row[0].stem for row, group in zip(rows, groups, strict=True) if not group]
    if not found:
        raise UsageError(
            f"{study.root}: none of the {len(selected)} {suffix} images is a mask of one of the {len(rows)} "
            f"images, such as {selected[0].stem} and {rows[0][0].stem}: participant, session or entities "
            "differ"
        )
    owners = dict[str, BidsImage]()
    for row, mask in found:
        if (other := owners.setdefault(mask.path, row[0])) is not row[0]:
            raise UsageError(
                f"{mask.path} could be the mask of {other.stem} and of {row[0].stem}; select one image of "
                "each session with --entity"
            )
    notes = []
    if lacking:
        shown = first_few(lacking, _SHOWN)
        notes.append(f"not used: {counted(len(lacking), 'image')} ({shown}) without a mask")
    if unused := sorted(mask.stem for mask in selected if mask.path not in owners):
        notes.append(
            f"not used: {counted(len(unused), 'mask')} ({first_few(unused, _SHOWN)}) of other images"
        )
    return [row for row, _ in found], [mask for _, mask in found], notes


def _is_of(mask: BidsImage, image: BidsImage) -> bool:
    """Whether the names of a mask and an image of one session allow that they belong together."""
    for key, label in mask.entities.items():
        if key not in _OF_MASKS and image.entities.get(key, label) != label:
            return False
    return all(mask.entities.get(key) == image.entities[key] for key in _OF_GRIDS if key in image.entities)
