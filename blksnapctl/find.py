# SPDX-License-Identifier: GPL-2.0-or-later
"""
What a word on the command line means: a device, a snapshot, an image. Ambiguity is an error that lists the
choices.
"""

from __future__ import annotations

import os

from blksnap_tui.calls import absolute
from blksnap_tui.client import Client
from blksnap_tui.errors import BlksnapError
from blksnap_tui.model import ROOT_PATH, Device, Image, Snapshot


class NoSuchThingError(BlksnapError):
    """Raised when a word names nothing the service has, or more than one thing."""


async def find_device(client: Client, word: str) -> Device:
    """
    Find a device by path, link, name or object path.

    Raises NoSuchThingError, and what ResolveDevice raises for a path nothing is known of.
    """
    devices = client.state.devices
    if word.startswith(f"{ROOT_PATH}/"):
        matches = [device for device in devices if device.object_path == word]
    else:
        path = absolute(word)
        matches = [device for device in devices if path in (device.path, *device.symlinks)]
        if not matches and os.sep not in word:
            matches = [device for device in devices if device.name == word]
    if len(matches) > 1:
        raise NoSuchThingError(
            f"{word} may be any of {', '.join(device.path for device in matches)}: name one by path"
        )
    if matches:
        return matches[0]
    found = client.state.device(await client.resolve_device(word))
    if found is None:
        raise NoSuchThingError(f"{word}: the service has no such device; blksnapctl status lists what it has")
    return found


def find_snapshot(client: Client, word: str) -> Snapshot:
    """Find a snapshot by uuid, the beginning of one, or object path. Raises NoSuchThingError."""
    wanted = word.lower()
    snapshots = client.state.snapshots
    matches = [
        shot for shot in snapshots if wanted and (shot.id.startswith(wanted) or shot.object_path == word)
    ]
    if len(matches) > 1:
        raise NoSuchThingError(f"{word} is the beginning of {len(matches)} snapshots: write more of it")
    if not matches:
        raise NoSuchThingError(f"there is no snapshot {word}; blksnapctl snapshot list shows what there is")
    return matches[0]


async def find_image(client: Client, word: str) -> Image:
    """
    Find an image by object path, by snapshot, or by snapshot and device as `SNAPSHOT:DEVICE`.

    Raises NoSuchThingError, also when a snapshot has several images and none is named.
    """
    if word.startswith(f"{ROOT_PATH}/images/"):
        matches = [image for image in client.state.images if image.object_path == word]
        if not matches:
            raise NoSuchThingError(f"there is no image {word}")
        return matches[0]
    name, _, wanted = word.partition(":")
    snapshot = find_snapshot(client, name)
    images = client.state.images_of(snapshot)
    if wanted:
        device = await find_device(client, wanted)
        images = tuple(image for image in images if image.device == device.object_path)
    if len(images) == 1:
        return images[0]
    if not images:
        raise NoSuchThingError(f"snapshot {snapshot.id} has no image" + (f" of {wanted}" if wanted else ""))
    names = [client.state.device(image.device) for image in images]
    choices = ", ".join(device.path for device in names if device is not None)
    raise NoSuchThingError(f"snapshot {snapshot.id} has images of {choices}: write {name}:DEVICE")
