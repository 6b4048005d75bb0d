"""Every model of the zoo in one place."""

from __future__ import annotations

import inspect

import diffusers.models.transformers
from torch import nn

from tests.zoo import audio_and_more, image_joint, image_other, newcomers, spellings, video_cross, video_joint
from tests.zoo.entry import ZooEntry

DIFFUSERS: dict[str, tuple[ZooEntry, ...]] = {
    "video, text across": video_cross.ENTRIES,
    "video, joint": video_joint.ENTRIES,
    "image, joint": image_joint.ENTRIES,
    "image, other": image_other.ENTRIES,
    "audio and more": audio_and_more.ENTRIES,
}
HAND_WRITTEN: dict[str, tuple[ZooEntry, ...]] = {
    "spelling": spellings.ENTRIES,
    "newcomer": newcomers.ENTRIES,
}

KINDS: dict[str, tuple[ZooEntry, ...]] = {**DIFFUSERS, **HAND_WRITTEN}
ENTRIES: tuple[ZooEntry, ...] = tuple(entry for entries in KINDS.values() for entry in entries)


def entry_named(name: str) -> ZooEntry:
    return next(entry for entry in ENTRIES if entry.name == name)


def kind_of(name: str) -> str:
    return next(kind for kind, entries in KINDS.items() if name in {entry.name for entry in entries})


def exported_transformers() -> set[str]:
    """The names of all modules that diffusers.models.transformers exports."""
    members = vars(diffusers.models.transformers)
    return {name for name, member in members.items() if inspect.isclass(member) and issubclass(member, nn.Module)}
