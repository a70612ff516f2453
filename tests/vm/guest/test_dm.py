# SPDX-License-Identifier: GPL-2.0-or-later
"""Device-mapper devices over the ublk device: tops of our own, and getting under live ones and out again."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.control import Control, Refused
from tests.nbd.datapath import Datapath, new_id
from tests.nbd.survival import Held
from tests.vm.guest import devices, nodes, ublk
from tests.vm.guest.ublk import MIB, Tracked

SIZE = 64 * MIB


@pytest.fixture
def live() -> Iterator[Path]:
    """A logical volume on a RAM disk."""
    with devices.brd(128 * MIB) as disk, devices.lvm_lv(disk, SIZE) as volume:
        yield volume


def test_hello_tells_of_device_mapper(datapath: Datapath) -> None:
    """It is there."""
    hello = datapath.control.call("hello", protocol=1)
    assert hello["dm"] == {"available": True, "reason": ""}
    assert "dm" in hello["features"]


def test_a_file_system_lives_on_a_top(datapath: Datapath, tmp_path: Path) -> None:
    """The top is the node; it cannot be removed under a mount, and leaves nothing behind when it goes."""
    with devices.brd(SIZE) as disk:
        tracked = nodes.tracked_top(datapath, disk, "blksnap-test")
        reading = tracked.origin.info()
        assert (str(tracked.node), reading.top) == ("/dev/mapper/blksnap-test", "blksnap-test")
        assert reading.clients == 0
        nodes.make_file_system(tracked.node, "ext4")
        with nodes.mounted(tracked.node, tmp_path / "m") as directory:
            ublk.fio("v", *ublk.verified_writes(directory / "file", 8 * MIB))
            assert tracked.origin.info().clients == 1
            with pytest.raises(Refused, match="in use") as refused:
                tracked.remove()
            assert refused.value.code == "busy"
            assert tracked.origin.info().state == "tracking"
        seen = ublk.read(tracked.node)
        assert tracked.maps().changed(0, live=True)
        tracked.remove()
        assert not tracked.node.exists()
        assert nodes.names() == set()
        assert ublk.read(disk) == seen


def test_a_live_volume_is_got_under_and_out_of(datapath: Datapath, live: Path, tmp_path: Path) -> None:
    """In and out under a mounted file system with verified writes running: no error, and the volume's own table after."""
    name = nodes.mapped_name(live)
    before = nodes.table(name)
    nodes.make_file_system(live, "ext4")
    with (
        nodes.mounted(live, tmp_path / "m") as directory,
        nodes.load(directory / "file", 8 * MIB),
    ):
        for _ in range(3):
            tracked = nodes.insert(datapath, name)
            assert tracked.origin.info().insert == name
            assert nodes.table(name) != before
            assert nodes.table(f"{name}-blksnap") == before
            written = tracked.counters()["writes"]
            while tracked.counters()["writes"] < written + 50:
                pass
            final = tracked.remove()
            assert final.changed(0, live=True)
            assert final.reading.state == "broken"
            assert nodes.table(name) == before
            assert nodes.names() == {name}
    assert nodes.is_clean(live, "ext4")


def test_a_snapshot_of_a_live_volume_stands_still(datapath: Datapath, live: Path, tmp_path: Path) -> None:
    """The image is clean and constant while the volume is written; the map names what differs."""
    nodes.make_file_system(live, "ext4")
    with nodes.mounted(live, tmp_path / "m") as directory:
        (directory / "kept").write_bytes(b"before" * 1000)
        tracked = nodes.insert(datapath, nodes.mapped_name(live))
        snapshot, (image,) = ublk.take(tracked)
        first = ublk.read(image)
        ublk.fio("v", *ublk.verified_writes(directory / "file", 8 * MIB))
        (directory / "kept").unlink()
        assert ublk.read(image) == first
        assert nodes.is_clean(image, "ext4")
        with nodes.mounted(image, tmp_path / "image", "-o", "ro,noload") as old:
            assert (old / "kept").read_bytes() == b"before" * 1000
    after, maps = ublk.read(tracked.node), tracked.maps()
    differ = ublk.differing(first, after, maps.reading.block_size)
    assert differ
    assert not differ - maps.changed(maps.reading.changes, live=True)
    snapshot.destroy()
    tracked.remove()


def test_a_table_of_several_targets_moves_whole(datapath: Datapath, tmp_path: Path) -> None:
    """Segments keep their order and their places."""
    sectors = SIZE // 512
    with devices.brd(2 * SIZE) as disk:
        table = f"0 2048 linear {disk} {sectors}\n2048 {sectors - 2048} linear {disk} 0\n"
        with devices.dm("pieces", table) as node:
            nodes.make_file_system(node, "ext4")
            before = ublk.read(node)
            tracked = nodes.insert(datapath, "pieces")
            assert ublk.read(tracked.node) == before
            with nodes.mounted(node, tmp_path / "m") as directory:
                ublk.fio("v", *ublk.verified_writes(directory / "file", 8 * MIB))
            seen = ublk.read(node)
            assert tracked.remove().reading.state == "tracking"
            assert ublk.read(node) == seen


@pytest.mark.parametrize(
    "name, words",
    [
        ("nothing", "no such device"),
        ("paths", "multipath"),
        ("fixed", "read-only"),
        ("stopped", "another program"),
    ],
)
def test_what_cannot_be_got_under_is_refused_and_untouched(datapath: Datapath, name: str, words: str) -> None:
    """In words; and no device is left behind."""
    sectors = SIZE // 512
    devices.modprobe("dm-multipath")
    devices.modprobe("dm-service-time")
    devices.modprobe("scsi_mod")
    with devices.scsi_debug(2 * SIZE) as disk:
        tables = {
            "paths": f"0 {sectors} multipath 0 0 1 1 service-time 0 1 1 {disk} 1",
            "fixed": f"0 {sectors} linear {disk} 0",
            "stopped": f"0 {sectors} linear {disk} 0",
        }
        if name in tables:
            options = ("--readonly",) if name == "fixed" else ()
            devices.run("dmsetup", "create", name, "--table", tables[name], *options)
        if name == "stopped":
            devices.run("dmsetup", "suspend", name)
        try:
            left = nodes.names()
            with pytest.raises(Refused, match=words):
                nodes.insert(datapath, name)
            assert nodes.names() == left
        finally:
            if name in tables:
                devices.run("dmsetup", "resume", name)
                devices.run("dmsetup", "remove", "--retry", name)


def test_a_second_tracker_under_one_device_is_refused(datapath: Datapath, live: Path) -> None:
    """The first one goes on."""
    name = nodes.mapped_name(live)
    tracked = nodes.insert(datapath, name)
    with pytest.raises(Refused) as refused:
        datapath.control.call("origin.add", origin="other", generation=new_id(), front="ublk", insert=name)
    assert refused.value.code == "exists"
    ublk.write(tracked.node, 0, b"x" * 4096)
    assert tracked.maps().changed(0, live=True) == {0}
    tracked.remove()


def test_a_failure_half_way_leaves_the_live_device_alone(
    datapath: Datapath, live: Path, tmp_path: Path
) -> None:
    """Here the driver is gone when the ublk device is to be made; the file system never notices."""
    name = nodes.mapped_name(live)
    before = nodes.table(name)
    nodes.make_file_system(live, "ext4")
    with nodes.mounted(live, tmp_path / "m") as directory, nodes.load(directory / "file", 4 * MIB):
        devices.run("modprobe", "--remove", "ublk_drv")
        with pytest.raises(Refused):
            nodes.insert(datapath, name)
        assert nodes.table(name) == before
        assert nodes.names() == {name}
    assert nodes.is_clean(live, "ext4")


def test_a_table_that_another_program_loads_ends_the_generation(datapath: Datapath, live: Path) -> None:
    """As LVM does. The tracker is broken, loudly; nothing is taken; the other program's table stays."""
    name = nodes.mapped_name(live)
    own = nodes.table(name)
    tracked = nodes.insert(datapath, name)
    snapshot, _ = ublk.take(tracked)
    with datapath.events() as events:
        devices.run("dmsetup", "reload", name, "--table", own)
        devices.run("dmsetup", "resume", name)
        with pytest.raises(Refused, match="another program") as refused:
            ublk.take(tracked)
        assert refused.value.code == "invalid-state"
        event = events.wait_for("origin.broken")
        assert "another program" in event["reason"]
    assert tracked.origin.info().state == "broken"
    assert snapshot.info().state == "failed"
    tracked.remove(force=True)
    assert nodes.table(name) == own
    assert nodes.names() == {name}


def test_a_top_in_use_goes_on_without_the_tracker(datapath: Datapath, tmp_path: Path) -> None:
    """Put aside under verified writes, and got under again: no error, and the map of the time between is not believed."""
    with devices.brd(SIZE) as disk:
        tracked = nodes.tracked_top(datapath, disk, "blksnap-test")
        nodes.make_file_system(tracked.node, "ext4")
        with (
            nodes.mounted(tracked.node, tmp_path / "m") as directory,
            nodes.load(directory / "file", 8 * MIB),
        ):
            ok = datapath.control.call("origin.bypass", origin=tracked.origin.name, reason="a test")
            assert ok["state"] == "broken"
            assert datapath.control.call("list")["origins"] == []
            again = nodes.insert(datapath, "blksnap-test")
            written = again.counters()["writes"]
            while again.counters()["writes"] < written + 50:
                pass
            again.remove()
        assert nodes.is_clean(tracked.node, "ext4")
        devices.run("dmsetup", "remove", "--retry", "blksnap-test")


def test_the_end_of_the_data_path_stops_no_file_system(live: Path, tmp_path: Path) -> None:
    """``stop`` by force: a live device has its own table again, a top lies straight on its origin."""
    devices.modprobe("ublk_drv")
    name = nodes.mapped_name(live)
    before = nodes.table(name)
    nodes.make_file_system(live, "ext4")
    directory = tmp_path / "run"
    directory.mkdir()
    running = Datapath(directory)
    try:
        with devices.null_blk(SIZE) as disk:
            top = nodes.tracked_top(running, disk, "blksnap-test")
            nodes.make_file_system(top.node, "ext4")
            with (
                nodes.mounted(live, tmp_path / "a") as first,
                nodes.mounted(top.node, tmp_path / "b") as second,
            ):
                nodes.insert(running, name)
                with nodes.load(first / "file", 4 * MIB), nodes.load(second / "file", 4 * MIB):
                    with running.connect() as control:
                        control.call("stop", force=True)
                    assert running.process.wait(30) == 0
                    time.sleep(2)
                assert nodes.table(name) == before
            assert nodes.is_clean(live, "ext4")
            assert nodes.is_clean(top.node, "ext4")
            devices.run("dmsetup", "remove", "--retry", "blksnap-test")
    finally:
        running.kill()


def test_deaths_of_the_data_path_stop_no_file_system(live: Path, tmp_path: Path) -> None:
    """Killed with -9, also while it freezes and takes: it comes back under both, lets all go on, and can be got out."""
    devices.modprobe("ublk_drv")
    name = nodes.mapped_name(live)
    before = nodes.table(name)
    nodes.make_file_system(live, "ext4")
    (tmp_path / "run").mkdir()

    def take(control: Control, tracked: list[Tracked]) -> None:
        nodes.take_all(tracked, control=control)

    held = Held(tmp_path / "run")
    try:
        with devices.null_blk(SIZE) as disk:
            top = nodes.tracked_top(held, disk, "blksnap-test")
            nodes.make_file_system(top.node, "ext4")
            with (
                nodes.mounted(live, tmp_path / "a") as first,
                nodes.mounted(top.node, tmp_path / "b") as second,
            ):
                inserted = nodes.insert(held, name)
                readings = [one.origin.info() for one in (top, inserted)]
                with nodes.load(first / "file", 4 * MIB), nodes.load(second / "file", 4 * MIB):
                    for number in range(6):
                        with held.connect() as control:
                            taking = nodes.Attempt(take, control, [top, inserted])
                            time.sleep(0.1 * number)
                            held.die()
                            assert taking.ended(60)
                        again = [one.origin.info() for one in (top, inserted)]
                        assert [one.state for one in again] == ["tracking", "tracking"]
                        assert [one.node for one in again] == [one.node for one in readings]
                        assert [one.generation for one in again] == [one.generation for one in readings]
                        for target in (first, second):
                            (target / f"after-{number}").write_bytes(b"x" * 4096)
                        for snapshot in held.control.call("list")["snapshots"]:
                            held.control.call("snapshot.destroy", snapshot=snapshot["snapshot"])
                    inserted.remove()
                    assert nodes.table(name) == before
            top.remove()
            assert nodes.names() == {name}
            assert nodes.is_clean(live, "ext4")
        held.control.call("stop", force=True)
        assert held.process.wait(30) == 0, held.story()
    finally:
        held.kill()


def test_a_mounted_top_grows_with_its_origin(datapath: Datapath, tmp_path: Path) -> None:
    """Twice, on any kernel, under verified writes: the history goes on with the new part marked, and an image as it was."""
    sizes = (SIZE // 2, SIZE * 3 // 4, SIZE)
    with devices.brd(SIZE) as disk, devices.dm("grows", f"0 {sizes[0] // 512} linear {disk} 0") as origin:
        tracked = nodes.tracked_top(datapath, origin, "blksnap-test")
        nodes.make_file_system(tracked.node, "ext4")
        snapshot, (image,) = ublk.take(tracked)
        content, before = ublk.read(image), tracked.origin.info()
        with (
            nodes.mounted(tracked.node, tmp_path / "m") as directory,
            nodes.load(directory / "file", 8 * MIB),
        ):
            for size in sizes[1:]:
                devices.run("dmsetup", "load", "grows", "--table", f"0 {size // 512} linear {disk} 0")
                devices.run("dmsetup", "suspend", "grows")
                devices.run("dmsetup", "resume", "grows")
                datapath.control.call("origin.resize", origin=tracked.origin.name)
                reading = tracked.origin.info()
                assert (reading.size, reading.state, reading.clients) == (size, "tracking", 1)
                assert (reading.generation, reading.node) == (before.generation, before.node)
                devices.run("resize2fs", str(tracked.node))
        assert set(range(sizes[0] >> 16, SIZE >> 16)) <= tracked.maps().changed(1, live=True)
        assert ublk.read(image) == content
        assert len(ublk.read(tracked.node)) == SIZE
        assert len(ublk.fronts()) == 2
        assert nodes.is_clean(tracked.node, "ext4")
        snapshot.destroy()
        tracked.remove()
        assert (ublk.fronts(), nodes.names()) == ([], {"grows"})


def test_a_shrunk_origin_is_broken(datapath: Datapath) -> None:
    """And says why: what is behind its end is not there any more."""
    with devices.brd(SIZE) as disk, devices.dm("shrinks", f"0 {SIZE // 512} linear {disk} 0") as origin:
        tracked = nodes.tracked_top(datapath, origin, "blksnap-test")
        devices.run("dmsetup", "load", "shrinks", "--table", f"0 {SIZE // 1024} linear {disk} 0")
        devices.run("dmsetup", "suspend", "shrinks")
        devices.run("dmsetup", "resume", "shrinks")
        with pytest.raises(Refused, match="smaller") as refused:
            datapath.control.call("origin.resize", origin=tracked.origin.name)
        assert refused.value.code == "invalid-state"
        assert tracked.origin.info().state == "broken"
        tracked.remove(force=True)


def test_a_disk_that_hangs_hangs_no_attach(datapath: Datapath) -> None:
    """Nothing is read from it before somebody wants to: not even its partition table."""
    with devices.brd(SIZE) as disk, devices.dm("hangs", f"0 {SIZE // 512} linear {disk} 0") as origin:
        devices.run("dmsetup", "suspend", "hangs")
        try:
            tracked = nodes.tracked_top(datapath, origin, "blksnap-test")
            assert tracked.origin.info().state == "tracking"
        finally:
            devices.run("dmsetup", "resume", "hangs")
        ublk.write(tracked.node, 0, b"x" * 4096)
        tracked.remove()


def test_a_saved_map_is_not_continued_under_a_device_in_use(
    datapath: Datapath, live: Path, tmp_path: Path
) -> None:
    """What was written since it was saved is not in it."""
    nodes.make_file_system(live, "ext4")
    name = nodes.mapped_name(live)
    saved = tmp_path / "saved"
    saved.write_bytes(bytes(SIZE // (64 << 10)))
    with (
        nodes.mounted(live, tmp_path / "m"),
        saved.open("rb") as file,
        pytest.raises(Refused, match="new generation") as refused,
    ):
        datapath.control.call(
            "origin.add", [file.fileno()], origin="a", generation=new_id(), front="ublk", insert=name
        )
    assert refused.value.code == "invalid"
    assert nodes.names() == {name}
