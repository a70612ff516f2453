# SPDX-License-Identifier: GPL-2.0-or-later
"""
The commands: each takes a connected client and the parsed options, and writes its result. Errors are left to
`__main__`.
"""

from __future__ import annotations

import argparse
import os
import sys

from blksnap_tui.client import Client
from blksnapctl import output
from blksnapctl.find import find_device, find_image, find_snapshot

COPY_BYTES = 1 << 20


async def status(client: Client, options: argparse.Namespace) -> None:
    """Show everything the service shows."""
    state = client.state
    if options.json:
        output.put_json(state)
        return
    if state.manager is not None:
        can = [backend.name for backend in state.manager.backends if backend.available]
        print(f"blksnapd {state.manager.version}, backends: {', '.join(can) or 'none'}\n")
    if state.devices:
        output.put_table(output.DEVICE_TITLES, [output.device_row(device) for device in state.devices])
    else:
        print("no devices; blksnapctl add FILE adds an image file")
    print()
    _put_snapshots(client)


def _put_snapshots(client: Client) -> None:
    state = client.state
    if not state.snapshots:
        print("no snapshots")
        return
    output.put_table(
        output.SNAPSHOT_TITLES, [output.snapshot_row(state, snapshot) for snapshot in state.snapshots]
    )


async def add(client: Client, options: argparse.Namespace) -> None:
    """Make a device of an image file."""
    path = await client.add_image_file(options.file)
    device = client.state.device(path)
    if options.json:
        output.put_json(device if device is not None else {"object_path": path})
    else:
        print(path if device is None else device.path)


async def attach(client: Client, options: argparse.Namespace) -> None:
    """Start tracking; prints what programs must use from then on."""
    device = await find_device(client, options.device)
    await client.attach(
        device.object_path,
        backend=options.backend,
        block_size=options.block_size,
        persistent=options.persistent,
    )
    attached = client.state.device(device.object_path)
    tracker = None if attached is None else attached.tracker
    if options.json:
        output.put_json(tracker)
    elif tracker is not None:
        print(tracker.node)


async def detach(client: Client, options: argparse.Namespace) -> None:
    """Stop tracking."""
    device = await find_device(client, options.device)
    await client.detach(device.object_path, force=options.force)
    if options.json:
        output.put_json({"object_path": device.object_path, "path": device.path})


async def snapshot_create(client: Client, options: argparse.Namespace) -> None:
    """Take a snapshot; prints its uuid, and where its images are."""
    devices = [await find_device(client, word) for word in options.device]
    path = await client.create_snapshot(
        [device.object_path for device in devices],
        limit=options.limit,
        storage=options.storage,
        chunk_size=options.chunk_size,
        attach=options.attach,
        description=options.description,
    )
    snapshot = client.state.snapshot(path)
    if snapshot is None:
        output.put_json({"object_path": path}) if options.json else print(path)
        return
    images = client.state.images_of(snapshot)
    if options.json:
        output.put_json({"snapshot": snapshot, "images": images})
        return
    print(snapshot.id)
    for image in images:
        output.say(output.image_line(client.state, image))


async def snapshot_list(client: Client, options: argparse.Namespace) -> None:
    """List snapshots."""
    if options.json:
        output.put_json({"snapshots": client.state.snapshots, "images": client.state.images})
    else:
        _put_snapshots(client)


async def snapshot_destroy(client: Client, options: argparse.Namespace) -> None:
    """Destroy snapshots, in the order given; the first that cannot be ends the command."""
    snapshots = [find_snapshot(client, word) for word in options.snapshot]
    for snapshot in snapshots:
        await client.destroy_snapshot(snapshot.object_path)
    if options.json:
        output.put_json([snapshot.id for snapshot in snapshots])


async def changes(client: Client, options: argparse.Namespace) -> None:
    """Print what changed since a number, as byte offset and length."""
    device = await find_device(client, options.device)
    generation = options.generation or (device.tracker.generation_id if device.tracker is not None else "")
    ranges = client.changed_ranges(
        device.object_path, options.since, generation_id=generation, view=options.view
    )
    if not options.json:
        async for offset, length in ranges:
            print(f"{offset}\t{length}")
        return
    found = [pair async for pair in ranges]
    output.put_json(
        {
            "device": device.path,
            "generation_id": generation,
            "since": options.since,
            "view": options.view,
            "bytes": sum(length for _, length in found),
            "ranges": found,
        }
    )


async def map_(client: Client, options: argparse.Namespace) -> None:
    """Copy the map, one byte per block, into a file or to stdout; prints what its bytes mean."""
    device = await find_device(client, options.device)
    with await client.open_map(device.object_path, view=options.view) as shown:
        size = shown.size
        if options.output == "-":
            _copy(shown.fd, size, sys.stdout.fileno())
            return
        target = os.open(options.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _copy(shown.fd, size, target)
        finally:
            os.close(target)
        if options.json:
            output.put_json({**shown.info, "file": options.output})
        else:
            output.put_facts({**shown.info, "file": options.output})


def _copy(source: int, size: int, target: int) -> None:
    """Write `size` bytes from the start of one descriptor to another."""
    offset = 0
    while offset < size:
        part = memoryview(os.pread(source, min(COPY_BYTES, size - offset), offset))
        if not part:
            raise OSError(f"the map ended at block {offset} of {size}")
        offset += len(part)
        while part:
            part = part[os.write(target, part) :]


async def info(client: Client, options: argparse.Namespace) -> None:
    """Show a device and, when tracked, a fresh reading of its tracker."""
    device = await find_device(client, options.device)
    reading = None if device.tracker is None else await client.get_info(device.object_path)
    if options.json:
        output.put_json({"device": device, "info": reading})
    else:
        output.put_facts(output.device_facts(device, reading))


async def mark(client: Client, options: argparse.Namespace) -> None:
    """Mark ranges as changed, or everything."""
    device = await find_device(client, options.device)
    if options.all:
        await client.mark_all_dirty(device.object_path)
    else:
        await client.mark_dirty(device.object_path, options.range)
    if options.json:
        output.put_json({"device": device.path, "all": options.all, "ranges": options.range})


async def export(client: Client, options: argparse.Namespace) -> None:
    """Serve an image over NBD; prints the URI."""
    image = await find_image(client, options.image)
    uri = await client.export_image(image.object_path)
    if options.json:
        output.put_json({"image": image.object_path, "uri": uri})
    else:
        print(uri)
